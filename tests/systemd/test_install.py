"""make install on a machine with systemd, with real replicas; an upgrade, and an uninstallation."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from . import installed
from .booted import Machine
from .conftest import CONFIG, Service

_KEY = "correct-horse-battery-staple"
#: Takes the key from its standard input, as command lines are visible to other users.
_ASK = """\
import json, sys, urllib.error, urllib.request
body = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 16}
headers = {"Content-Type": "application/json"}
if key := sys.stdin.read():
    headers["Authorization"] = "Bearer " + key
url = "http://127.0.0.1:30000/v1/completions"
request = urllib.request.Request(url, json.dumps(body).encode(), headers)
try:
    answer = urllib.request.urlopen(request)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode())
"""


@pytest.fixture
def fresh(machine: Machine) -> Iterator[Service]:
    """A machine as it is before `make install`, except for the virtual environment."""
    installed.install_environment(machine)
    remove_user(machine)
    service = Service(machine)
    yield service
    if service.show("LoadState") == "loaded":
        service.stop()
    service.override_nothing()
    remove_user(machine)


def remove_user(machine: Machine) -> None:
    machine.run("userdel", "fd", code=None)
    # userdel removes the group as well, unless it has other members.
    machine.run("groupdel", "fd", code=None)


def ask(service: Service, key: str = "") -> str:
    return service.run("/opt/fd-dp/bin/python", "-c", _ASK, stdin=key, timeout=120.0).stdout


def test_install_is_complete_and_uninstall_keeps_the_operators_files(fresh: Service) -> None:
    machine, root = fresh.machine, fresh.machine.root
    machine.write(CONFIG, f"{installed.SMALL}# mine\n")
    assert "systemctl enable --now fd-dp" in installed.install(machine)
    user = machine.run("getent", "passwd", "fd").stdout.split(":")
    assert user[5:] == ["/var/lib/fd", "/usr/sbin/nologin\n"]
    config = (root / "etc/fd/dp.toml").stat()
    assert (config.st_uid, config.st_gid, stat.S_IMODE(config.st_mode)) == (0, int(user[3]), 0o640)
    assert machine.run("fdctl", "check", CONFIG).stdout.startswith(f"{CONFIG}: valid")
    for page in ("man8/fd-dp.8", "man1/fdctl.1"):
        assert (root / "usr/local/share/man" / page).exists()
    machine.run("mkdir", "-p", "/var/lib/fd/models")

    installed.install(machine, "--uninstall")
    assert fresh.show("LoadState") == fresh.show("LoadState", "fd-dp-engines") == "not-found"
    left = machine.run("find", "/etc", "/opt", "/usr/local", "/run", "/var/lib", "-name", "*fd*").stdout
    ours = {path for path in left.split() if "fd-dp" in path or "fdctl" in path or path.endswith("/fd")}
    assert ours == {"/etc/fd", "/var/lib/fd"}
    assert "# mine" in (root / "etc/fd/dp.toml").read_text()
    assert (root / "var/lib/fd/models").is_dir()


def test_replicas_serve_with_credential_keys_and_outlive_an_upgrade(fresh: Service) -> None:
    machine, root = fresh.machine, fresh.machine.root
    machine.run("groupadd", "--system", "fd")
    machine.write("/etc/fd/api-keys", f"{_KEY}\n", 0o600)
    machine.write(CONFIG, f'{installed.SMALL}[router]\napi_keys_file = "credential:api-keys"\n')
    installed.install(machine)
    fresh.override("fd-dp-engines", "LoadCredential=api-keys:/etc/fd/api-keys")
    fresh.run("systemctl", "enable", "--now", "fd-dp", timeout=120.0)
    assert fresh.show("StatusText") == "1/1 ready"
    assert ask(fresh).startswith("401 ")
    assert ask(fresh, _KEY).startswith("200 ")

    places = ("/run/fd", "/var/log/fd", "/var/lib/fd", "/etc/systemd", "/opt/fd-dp/bin")
    assert fresh.run("grep", "-rlsF", _KEY, *places, code=1).stdout == ""
    assert not any(_KEY in line for line in machine.command_lines().values())
    assert _KEY not in fresh.run("fdctl", "render").stdout
    assert _KEY not in fresh.run("journalctl", "--no-pager").stdout

    before = fresh.pids()
    assert "systemctl restart fd-dp" in installed.install(machine)
    fresh.run("systemctl", "restart", "fd-dp")
    assert fresh.pids() == before
    assert fresh.sockets() == {"fd-dp.sock", "supervisor.sock", "router.sock"}
    fresh.stop()
    assert fresh.processes() == {}
    assert fresh.sockets() == set()
    assert [*(root / "dev/shm").iterdir()] == []


@pytest.mark.slow
def test_a_fresh_machine_serves_the_demo_model_with_eight_replicas(fresh: Service) -> None:
    with installed.lent_models(fresh.machine):
        installed.install(fresh.machine, timeout=240.0)
        fresh.run("systemctl", "enable", "--now", "fd-dp", timeout=240.0)
        assert fresh.show("StatusText") == "8/8 ready"
        assert "Paris" in ask(fresh)
        fresh.stop()
