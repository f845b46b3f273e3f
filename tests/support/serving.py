"""A server in this process, at a port of its own."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import uvicorn

from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.engine import Engine, EngineConfig
from switchworks.model import SwitchTransformer
from switchworks.serve import ServeConfig, create_app
from switchworks.serve.run import _bind


@contextmanager
def serving(
    models: Mapping[str, SwitchTransformer], config: ServeConfig | None = None
) -> Iterator[str]:
    """The address of a server of `models`, which read and write bytes. Until the block ends."""
    config = config or ServeConfig(engine=EngineConfig(max_rows=8))
    engines = {name: Engine(m, ByteTokenizer(), config.engine) for name, m in models.items()}
    with listening(engines, config) as address:
        yield address


@contextmanager
def listening(engines: Mapping[str, Engine], config: ServeConfig) -> Iterator[str]:
    """The address of a server of `engines`."""
    listener = _bind("127.0.0.1", 0)
    app = create_app(engines, config)
    settings = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
