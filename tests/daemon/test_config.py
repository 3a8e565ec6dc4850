"""dp.toml: each mistake is reported in one line with file, line and key, and with the correct form."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.config import loader as dp_toml
from fastdeploy.daemon.config.documentation import document
from fastdeploy.daemon.config.loader import Config, load, parse

ROOT = Path(__file__).parents[2]
PREFIX = Path("/tmp/fd")


def read(text: str) -> Config:
    return parse(text, "dp.toml", PREFIX, PREFIX)


def model(text: str = "") -> str:
    return '[model]\npath = "demo"\n' + text


def test_minimal_config_has_the_ports_of_fastdeploy_documentation() -> None:
    config = read(model())
    assert config.parallel.data_parallel_size == 8
    assert config.engine.ports == (1811, 1822, 1833, 1844, 1855, 1866, 1877, 1888)
    assert config.engine.metrics_ports == (3101, 3201, 3301, 3401, 3501, 3601, 3701, 3801)
    assert config.engine.engine_worker_queue_ports == (25611, 25621, 25631, 25641, 25651, 25661, 25671, 25681)
    assert config.router.port == 30000
    assert (config.metrics.host, config.metrics.port) == ("127.0.0.1", 30001)


def test_the_daemons_metrics_can_be_switched_off() -> None:
    assert read(model("[metrics]\nport = 0\n")).metrics.port == 0


def test_shipped_file_is_valid_and_has_eight_replicas() -> None:
    config = load(ROOT / "etc/dp.toml", PREFIX)
    assert config.parallel.data_parallel_size == 8
    assert config.model.path == "demo"


def test_the_documentation_is_the_generated_one() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == document(), "run `make docs`"


def test_every_option_has_one_sentence_of_help() -> None:
    for line in document().splitlines():
        if re.match(r"\| `\w", line):
            assert re.search(r"\S.*[.;)]\S* \|$|\.\.\. \|$", line), line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "1: model.path: is missing; Directory of the checkpoint, or `demo` for the demo model.",
        ),
        ("[model]\npath = ''", "2: model.path: is ''; it must not be empty"),
        ("[model]\npath = 3", "2: model.path: is 3; it must be a string"),
        (model("[paths]\nrun = '.'\n"), "4: paths.run: is '.'; it must be a directory of its own"),
        ("[model", "1: not TOML: expected ']' at the end of a table declaration"),
        ('[model]\npath = "demo"\n\nx = [1, 2\n', "4: not TOML: unclosed array"),
        ("path = 'demo'", "1: path: unknown key outside of a section; did you mean 'paths'?"),
        (model("[engin]\n"), "3: engin: unknown section; did you mean 'engine'?"),
        (
            model("[zzz]\n"),
            "3: zzz: unknown section; known are engine, metrics, model, parallel, paths, router, supervise",
        ),
        (model("engine = 3\n"), "3: model.engine: unknown key; known are path, served_name"),
        ("engine = 3\n" + model(), "1: engine: is 3; it must be a section, [engine]"),
        (model("[engine]\nprots = 1\n"), "4: engine.prots: unknown key; did you mean 'ports'?"),
        (model("[engine]\nthreads = -1\n"), "4: engine.threads: is -1; it must be at least 0"),
        (model("[engine]\nthreads = true\n"), "4: engine.threads: is True; it must be an integer"),
        (model("[engine]\nthreads = 1.5\n"), "4: engine.threads: is 1.5; it must be an integer"),
        (
            model("[engine]\ndevice = 'tpu'\n"),
            "4: engine.device: is 'tpu'; it must be one of 'auto', 'cpu', 'gpu'",
        ),
        (
            model("[engine]\ngpus = ['0', 'H200']\n"),
            '4: engine.gpus: \'H200\' is neither an index like "0" nor a UUID like "GPU-..."',
        ),
        (
            model("[engine]\ngpus = ['0', '1']\n"),
            "4: engine.gpus: has 2 GPUs; it must have one per replica, and parallel.data_parallel_size is 8",
        ),
        (
            model("[parallel]\ndata_parallel_size = 1\n[engine]\ndevice = 'cpu'\ngpus = ['0']\n"),
            "7: engine.gpus: names GPUs, and engine.device is 'cpu'; remove one of them",
        ),
        (
            model("[engine]\ndevice = 'gpu'\n"),
            "4: engine.device: is 'gpu', and parallel.expert_parallel is true; on a GPU each replica holds "
            "all experts: set expert_parallel to false",
        ),
        (
            model("[engine]\ndtype = 'float16'\n"),
            "4: engine.dtype: is 'float16'; it must be one of 'bfloat16', 'float32'",
        ),
        (
            model("[engine]\nquantization = 'int4'\n"),
            "4: engine.quantization: is 'int4'; it must be one of '', 'wint4', 'wint8'",
        ),
        (
            model("[engine]\n# a comment\nports = [1, 2]\n"),
            "5: engine.ports: has 2 ports; it must have one per replica, "
            "and parallel.data_parallel_size is 8",
        ),
        (
            model("[engine]\nports = 65530\n"),
            "4: engine.ports: contains 65541; a port is between 1 and 65535",
        ),
        (
            model("[engine]\nports = '1811'\n"),
            "4: engine.ports: is '1811'; it must be one port (the base) or a list with one per replica",
        ),
        (
            model("[engine]\nports = 30000\n"),
            "4: engine.ports: port 30000 is both router.port and engine.ports[0]; use each port once",
        ),
        (
            model("[parallel]\ndata_parallel_size = 2\n[engine]\nports = [5000, 5000]\n"),
            "6: engine.ports: port 5000 is both engine.ports[0] and engine.ports[1]; use each port once",
        ),
        (
            model("[metrics]\nport = 30000\n"),
            "4: metrics.port: port 30000 is both router.port and metrics.port; use each port once",
        ),
        (
            model("[router]\nport = 30001\n"),
            "1: metrics.port: port 30001 is both router.port and metrics.port; use each port once",
        ),
        (
            model("[metrics]\nport = 3201\n"),
            "4: metrics.port: port 3201 is both engine.metrics_ports[1] and metrics.port; use each port once",
        ),
        (
            model("[metrics]\nhost = 'localhost'\n"),
            "4: metrics.host: is 'localhost'; it must be an IP address, for example 127.0.0.1",
        ),
        (
            model("[parallel]\ntensor_parallel_size = 2\n"),
            "4: parallel.tensor_parallel_size: is 2; it must be 1",
        ),
        (
            model("[parallel]\nredundant_experts = -1\n"),
            "4: parallel.redundant_experts: is -1; it must be at least 0",
        ),
        (
            model("[parallel]\nbalance_experts = 1\n"),
            "4: parallel.balance_experts: is 1; it must be a boolean",
        ),
        (
            model("[parallel]\ncollective_timeout = 0\n"),
            "4: parallel.collective_timeout: is 0; it must be at least 1",
        ),
        (
            model("[parallel]\nstall_kill = 0\n"),
            "4: parallel.stall_kill: is 0; it must be at least 1",
        ),
        (
            model("[supervise]\nbox_calm = 1" + 400 * "0"),
            "4: supervise.box_calm: is 1" + 400 * "0" + "; it must be a finite number",
        ),
        (model("[engine]\nthreads = " + 5000 * "9"), "1: not TOML: exceeds the limit"),
        (model("[engine]\nports = " + 5000 * "["), "1: not TOML: nested too deeply"),
        (model("[engine]\nports = [1, 2, 3, 4, 5, 6, 7, true]\n"), "4: engine.ports: is [1, 2, 3"),
        (model("[engine]\ndevice = 3\n"), "4: engine.device: is 3; it must be one of 'auto', 'cpu'"),
        (model("[engine.env]\nA = ['5ecret']\n"), "3: engine.env: A is a list"),
        (model("[paths]\nrun = 3\n"), "4: paths.run: is 3; it must be a path"),
        (
            model("[supervise]\nhang_after = '9'\n"),
            "4: supervise.hang_after: is '9'; it must be a number",
        ),
        (
            model("[supervise]\nunhealthy_after = 9\n\nstall_after = 9\n"),
            "6: supervise.stall_after: is the old name of unhealthy_after, which line 4 sets, too; "
            "remove stall_after",
        ),
        (
            model("[engine]\nextra_args = '--x'\n"),
            "4: engine.extra_args: is a string; it must be a list of strings",
        ),
        (
            model("[router]\ncors_origins = ['*', 'http://app.example/']\n"),
            "4: router.cors_origins: 'http://app.example/' is not an origin as browsers send it",
        ),
        (
            model("[engine]\nextra_args = ['--api-key', '5ecret']\n"),
            "4: engine.extra_args: it must not contain --api-key: every user of this machine can read "
            "command lines; write api_keys_file = FILE",
        ),
        (
            model("[engine]\nextra_args = ['--api-key=x']\n"),
            "4: engine.extra_args: it must not contain --api-key",
        ),
        (
            model("[engine]\nenv = { A = 1 }\n"),
            '4: engine.env: A is an integer; it must be a string, A = "..."',
        ),
        (
            model("[engine.env]\n'A B' = '1'\n"),
            "3: engine.env: 'A B' is not a valid name of an environment variable",
        ),
        (
            model("[engine.env]\nFD_LOG_DIR = '/'\n"),
            "3: engine.env: FD_LOG_DIR is set by the daemon; remove it",
        ),
        (
            model('[engine]\nextra_args = ["\\u0000"]\n'),
            "4: engine.extra_args: must not contain",
        ),
        (model("[router]\nport = 70000\n"), "4: router.port: is 70000; it must be between 1 and 65535"),
        (model("[router]\npolicy = 'magic'\n"), "4: router.policy: is 'magic'; it must be one of '"),
        (model("[supervise]\nbudget = 0\n"), "4: supervise.budget: is 0; it must be at least 1"),
        (
            model("[supervise]\nbackoff_max = inf\n"),
            "4: supervise.backoff_max: is inf; it must be a finite number",
        ),
        (
            model("[supervise]\nbackoff_max = nan\n"),
            "4: supervise.backoff_max: is nan; it must be a finite number",
        ),
        (
            model("[paths]\nrun = 'a;b'\n"),
            "4: paths.run: is '/tmp/fd/a;b'; supervisord does not support ';' in paths",
        ),
        (model("[paths]\nrun = '100%'\n"), "4: paths.run: is '/tmp/fd/100%'; supervisord does not"),
        (
            model(f"[paths]\nrun = '/{'x' * 83}'\n"),
            f"4: paths.run: /{'x' * 83} has 84 bytes; the limit is 83, because the paths of the sockets in "
            "it may have 107; use a shorter --prefix or [paths] run",
        ),
    ],
)
def test_each_error_names_its_place_and_the_correct_form(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith(f"dp.toml:{message}")
    assert "\n" not in str(caught.value)


def test_socket_paths_fit_in_the_longest_run_directory(tmp_path: Path) -> None:
    run = Path(f"{tmp_path}/".ljust(83, "x"))
    assert parse(model(f"[paths]\nrun = '{run}'\n"), "dp.toml", PREFIX, PREFIX).paths.run == run
    run.mkdir()
    # supervisord binds a name that contains its pid; pids are at most 2**22.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run / "supervisor.sock.4194304"))


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ("parallel", "stall_kill", "collective_timeout"),
        ("supervise", "stall_after", "unhealthy_after"),
        ("supervise", "stall_kill", "unhealthy_kill_after"),
        ("supervise", "hang_after", "no_progress_timeout"),
    ],
)
def test_old_names_are_accepted_and_reported_once(section: str, old: str, new: str) -> None:
    config = read(model(f"[{section}]\n{old} = 7\n"))
    assert getattr(getattr(config, section), new) == 7
    assert config.deprecations == (f"dp.toml:4: {section}.{old}: is the old name of {new}; rename it",)
    renamed = read(model(f"[{section}]\n{new} = 7\n"))
    assert getattr(renamed, section) == getattr(config, section)
    assert renamed.deprecations == ()


def test_missing_and_non_utf8_files_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "dp.toml")
    (tmp_path / "dp.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"byte 0 \(line 1\) is not UTF-8"):
        load(tmp_path / "dp.toml")


@given(st.text())
def test_any_text_is_a_configuration_or_one_clear_line(text: str) -> None:
    # Random text is never a valid configuration: it would need the path of a model.
    with pytest.raises(ConfigError, match=r"^dp\.toml:\d+: "):
        read(text)


def test_config_without_prefix_uses_system_and_file_relative_paths(
    tmp_path: Path,
) -> None:
    file = tmp_path / "dp.toml"
    file.write_text('[model]\npath = "models/x"\n[paths]\nlogs = "log"\n')
    config = load(file)
    assert config.model.path == str(tmp_path / "models/x")
    assert config.paths.state == Path("/var/lib/fd")
    assert config.paths.run == Path("/run/fd")
    assert config.paths.logs == tmp_path / "log"


def test_all_paths_are_below_the_prefix() -> None:
    config = read('[model]\npath = "models/x"\n[paths]\nlogs = "elsewhere"\n')
    assert config.model.path == "/tmp/fd/models/x"
    assert (config.paths.state, config.paths.run) == (PREFIX / "state", PREFIX / "run")
    assert config.paths.logs == PREFIX / "elsewhere"


def test_port_steps_are_those_of_the_documentation() -> None:
    text = document()
    for key, step in dp_toml.PORT_STEPS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{key}`"))
        assert f"b+{step}, b+{2 * step}, ..." in line
