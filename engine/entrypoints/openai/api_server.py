"""``python -m fastdeploy.entrypoints.openai.api_server``: run one replica in the foreground."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from ...common import log
from ...common.addresses import addresses_of, is_loopback
from ...common.errors import ConfigError
from ...common.file_limit import allow_open_files, descriptors_of
from ...common.ports import require_free
from ...config import ModelConfig
from .options import API_SERVER, ServeConfig, parse_arguments
from .serve import serve

_log = logging.getLogger("fastdeploy.api_server")

EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None, prog: str = API_SERVER) -> int:
    """Serve until SIGTERM or SIGINT.

    The exit status is 0 after such a signal, 2 for wrong arguments, 3 if the replica has failed.
    """
    log.configure()
    try:
        config = parse_arguments(sys.argv[1:] if argv is None else argv, prog)
        log.configure(f"replica={config.engine.data_parallel_rank}", "api_server.log")
        addresses = _check(config)
    except (ConfigError, OSError) as error:
        print(f"api_server: ERROR ({error})", file=sys.stderr)
        return EXIT_USAGE
    serve(config, addresses)
    return 0


def _check(config: ServeConfig) -> tuple[str, ...]:
    """Check model, ports and limits before any process starts. Return the addresses to listen on."""
    try:
        addresses = addresses_of(config.host)
    except ConfigError as error:
        raise ConfigError(f"--host: {error}") from None
    ModelConfig.from_directory(config.engine.model)
    allow_open_files(descriptors_of(config.threads), f"--max-concurrency {config.max_concurrency}")
    require_free(config.host, config.port, "--port")
    if config.metrics_port is not None:
        require_free(config.host, config.metrics_port, "--metrics-port")
    if config.engine_worker_queue_port:
        require_free("127.0.0.1", config.engine_worker_queue_port, "--engine-worker-queue-port")
    shown = " and ".join(addresses)
    if all(map(is_loopback, addresses)):
        _log.info("listening on %s only; use --host 0.0.0.0 to serve the network", shown)
    elif not config.api_keys:
        _log.warning("listening on %s without an API key; set one with --api-key", shown)
    return addresses


if __name__ == "__main__":
    sys.exit(main())
