"""From paths to a server that answers."""

import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from switchworks.config import ConfigError
from switchworks.engine import Engine
from switchworks.generate import load_with_tokenizer
from switchworks.serve.app import KEY, create_app
from switchworks.serve.config import ServeConfig

LOOPBACK = ("127.0.0.1", "::1", "localhost")
BACKLOG = 2048
GRACE = 5
"""Seconds after the last answer's `timeout` in which clients may still read, once it shuts down."""


def serve(paths: Sequence[Path], config: ServeConfig, host: str, port: int, **weights: Any) -> None:
    """Answers at `host` and `port` (0: any that is free) until SIGTERM or Ctrl-C; then what was
    taken is still answered. Raises CheckpointError for a model that cannot be read, ConfigError for
    an address that cannot be used, and for no path."""
    if not paths:
        raise ConfigError(
            "serve needs a model, and there is none.\n"
            "  Give a run directory, a checkpoint or a model directory: switchworks serve runs/a"
        )
    with _bind(host, port) as listener:
        signal.signal(signal.SIGTERM, _leave)
        models = dict[str, Engine]()
        for path in paths:
            print(f"loading {path} ...", file=sys.stderr, flush=True)
            model, tokenizer = load_with_tokenizer(path, **weights)
            models[_name(path, models)] = Engine(model, tokenizer, config.engine)
        listener.listen(BACKLOG)  # who reads the address can come at once
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        print(f"serving {', '.join(models)} at {address}", flush=True)
        if host not in LOOPBACK and not os.environ.get(KEY):
            print(f"warning: anybody who reaches {host} may use it. Set {KEY}.", file=sys.stderr)
        _answer(create_app(models, config), config, listener)


def _answer(app: FastAPI, config: ServeConfig, listener: socket.socket) -> None:
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(config.timeout) + GRACE,
    )
    uvicorn.Server(settings).run(sockets=[listener])


def _leave(*_: object) -> None:
    """Ends well: uvicorn raises the signal once more when all is answered."""
    sys.exit(0)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"{host}:{port} cannot be used: {str(error).rstrip('.')}.\n"
            "  Choose another --port or --host; 0 is any port that is free."
        ) from error
    return listener


def _name(path: Path, taken: dict[str, Engine]) -> str:
    """What clients call the model: the last part of its path, told apart from others."""
    name = path.resolve().name or "model"
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(each for each in names if each not in taken)
