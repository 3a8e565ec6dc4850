"""The API of a replica, in this process, whose worker follows a script."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from werkzeug.serving import make_server

from fastdeploy.config import EngineConfig
from fastdeploy.entrypoints.openai.app import create_app
from fastdeploy.entrypoints.openai.engine_client import EngineClient, EngineState
from fastdeploy.entrypoints.openai.options import ServeConfig
from fastdeploy.entrypoints.openai.served_model import ServedModel

from .conftest import TINY, wait_until

SCRIPTED = Path(__file__).with_name("scripted_worker.py")


def served_by(script: str, **settings: Any) -> AbstractContextManager[tuple[ServedModel, int]]:
    """Yield the replica and the port of its API.

    Args:
        settings: further fields of its `ServeConfig`.
    """
    return serving([sys.executable, str(SCRIPTED), script], **settings)


@contextmanager
def serving(worker: Sequence[str], **settings: Any) -> Iterator[tuple[ServedModel, int]]:
    """Do the same with the command of a worker."""
    config = EngineConfig(model=TINY)
    engine = EngineClient(config, 0, print, worker)
    served = ServedModel(ServeConfig(config, "tiny", **settings), engine)
    app = create_app(served)

    def named_as_by_gunicorn(environ: dict[str, Any], start_response: Any) -> Any:
        environ["gunicorn.socket"] = environ["werkzeug.socket"]
        return app(environ, start_response)

    engine.start()
    server = make_server("127.0.0.1", 0, named_as_by_gunicorn, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        wait_until(lambda: engine.status.state is EngineState.READY, "ready")
        yield served, server.port
    finally:
        engine.close(timeout=1)
        server.shutdown()
        thread.join()
        server.server_close()
