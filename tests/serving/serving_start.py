"""A server on a free loopback port, in a thread of the test process."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

import isthmus
from isthmus.serving.app import create_app


@dataclass
class Running:
    """A server at work."""

    url: str
    app: Any
    server: uvicorn.Server
    thread: threading.Thread
    logs: list[str] = field(default_factory=list)

    @property
    def engine(self) -> Any:
        return self.app.state.server.engine

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def idle(self) -> bool:
        deadline = time.time() + 60
        while (self.engine.running or self.engine.waiting) and time.time() < deadline:
            time.sleep(0.02)
        return not self.engine.running and not self.engine.waiting


def start(**options: Any) -> Running:
    logs: list[str] = []
    app = create_app(isthmus.load(), name="pycode-t", log=logs.append, **options)
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return Running(f"http://127.0.0.1:{bound.getsockname()[1]}", app, server, thread, logs)


def end(running: Running) -> None:
    running.server.should_exit = True
    running.thread.join(30)
    assert not running.thread.is_alive()
