"""``isthmus serve``: a model behind an interface that OpenAI's clients speak."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus.cli.output import console, quiet_transformers
from isthmus.errors import InvalidInputError, require

KEY = "ISTHMUS_API_KEY"


def serve(
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"])] = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "",
    drafter: Annotated[str, Parameter(name=["--drafter", "-d"])] = "auto",
    draft_model: str = "",
    num_draft_tokens: int | None = None,
    batch_size: int = 16,
    queue: int = 64,
    max_tokens: int = 4096,
    max_prompt_tokens: int = 0,
    max_body_bytes: int = 1_048_576,
    timeout_s: float = 300.0,
    api_key: str = "",
    allowed_host: tuple[str, ...] = (),
    dtype: str = "auto",
    device: str = "auto",
) -> int:
    """Serve a model over HTTP until interrupted; streams that run are finished first.

    The interface is OpenAI's: /v1/models, /v1/completions and /v1/chat/completions, with streaming.
    The page at / shows how a text is decoded; /health and /metrics are for machines. Everything
    is decoded together by continuous batching, with drafts that shrink as the batch grows.

    Args:
        model: Folder or hub id of a checkpoint, or a reference model; default the embedded one.
        host: Address to listen on. Anything but a loopback address lets others in: give a key.
        port: Port; 0 takes a free one.
        name: What clients call the model; default the last part of its name.
        drafter: Drafter of all requests, as for isthmus generate.
        draft_model: Smaller model with the same vocabulary, for drafters that need one.
        num_draft_tokens: Draft tokens a round, instead of the drafter's default.
        batch_size: Requests that are decoded together at most.
        queue: Requests that may wait besides; more are answered with 429.
        max_tokens: Largest budget of one answer.
        max_prompt_tokens: Longest prompt; 0 is the model's context.
        max_body_bytes: Largest body of a request.
        timeout_s: Seconds for one request, waiting included.
        api_key: Key that clients have to send; better given in the environment as ISTHMUS_API_KEY.
        allowed_host: Names this server may be called by besides loopback ones; may be given
            several times, "*" allows all.
        dtype: As for isthmus generate.
        device: auto, cpu, cuda, cuda:1 ...
    """
    uvicorn = require("uvicorn", "serve")
    require("fastapi", "serve")
    if not 0 <= port < 65536:
        raise InvalidInputError(f"port must be 0 to 65535, got {port}")
    quiet_transformers()
    from isthmus.api import EMBEDDED, load
    from isthmus.serving.app import create_app
    from isthmus.serving.guard import LOCAL
    from isthmus.serving.server import Limits

    limits = Limits(
        batch_size=batch_size,
        queue=queue,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_body_bytes=max_body_bytes,
        timeout_s=timeout_s,
    )
    hosts = () if "*" in allowed_host else (*LOCAL, host, *allowed_host)
    loaded = load(model, dtype=dtype, device=device, draft_model=draft_model)
    app = create_app(
        loaded,
        name=name or Path(model).name or EMBEDDED,
        limits=limits,
        drafter=drafter,
        num_draft_tokens=num_draft_tokens,
        api_key=api_key or os.environ.get(KEY, ""),
        hosts=hosts,
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(timeout_s) + 1,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server: Any = _announcing(uvicorn)(config)
    server.run()
    if not server.started:
        raise InvalidInputError(
            f"nothing can listen on {host}:{port}; choose another --port, or 0 for a free one"
        )
    return 0


def _announcing(uvicorn: Any) -> Any:
    class Announcing(uvicorn.Server):  # type: ignore[misc]
        """Says where it listens once it does."""

        async def startup(self, sockets: Any = None) -> None:
            try:
                await super().startup(sockets=sockets)
            except SystemExit:  # the port is taken; said by whoever started it
                self.should_exit = True
                return
            if self.started:
                for bound in self.servers:
                    for socket in bound.sockets:
                        place = socket.getsockname()
                        address = f"[{place[0]}]" if ":" in place[0] else place[0]
                        console(stderr=True).print(
                            f"isthmus serves on http://{address}:{place[1]}", highlight=False
                        )

    return Announcing
