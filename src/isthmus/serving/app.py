"""The application: OpenAI's endpoints over :class:`isthmus.decoding.online.Online`.

``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``, ``/health``, ``/metrics``, and for
the page at ``/`` the stream of rounds ``/api/trace``, whose events are
:class:`isthmus.serving.trace.TraceRound`.

No handler blocks the event loop: prompts are read in a thread, and the engine's thread hands tokens
over. A stream that nobody reads holds up nobody, for at most ``max_tokens`` tokens can wait in it.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from isthmus import __version__
from isthmus.decoding.model import Model
from isthmus.decoding.online import BusyError
from isthmus.errors import InvalidInputError, IsthmusError, MissingExtraError
from isthmus.serving.guard import LOCAL, Guard, body_of
from isthmus.serving.metrics import CONTENT_TYPE, resident_bytes
from isthmus.serving.schema import ChatRequest, Common, CompletionRequest, TraceRequest
from isthmus.serving.server import Answer, Events, Limits, Server
from isthmus.serving.trace import trace_round


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _whole(events: AsyncIterator[str], flow: Any) -> AsyncIterator[str]:
    """A stream with its end, or the error in its place; whatever happens, its jobs are let go."""
    try:
        async for event in events:
            yield event
        yield "data: [DONE]\n\n"
    except HTTPException as failed:
        yield _event(body_of(failed.status_code, str(failed.detail)))
    finally:
        await flow.aclose()


STREAM = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Stream(StreamingResponse):
    """A stream of events; a client that does not read it in time is let go.

    Args:
        events: The events.
        seconds: Time for all of it.
    """

    def __init__(self, events: AsyncIterator[str], seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers=STREAM)
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)


def create_app(
    model: Model,
    *,
    name: str = "isthmus",
    limits: Limits | None = None,
    drafter: str = "auto",
    num_draft_tokens: int | None = None,
    api_key: str = "",
    hosts: Sequence[str] = LOCAL,
    log: Callable[[str], None] | None = None,
) -> FastAPI:
    """The application, with its engine running.

    Args:
        model: A model with a tokenizer; from now on the server's alone.
        name: What clients call it.
        limits: See :class:`Limits`.
        drafter: Drafter of all requests.
        num_draft_tokens: As for generate.
        api_key: Key that clients have to send; empty asks for none.
        hosts: Names of this server; empty allows all.
        log: Takes one JSON line for every request instead of standard error.

    Raises:
        InvalidInputError: A limit out of range, or a drafter that cannot serve.
    """
    limits = limits or Limits()
    server = Server(
        model, name, limits, drafter=drafter, num_draft_tokens=num_draft_tokens, log=log
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.loop = asyncio.get_running_loop()
        yield
        await run_in_threadpool(server.engine.stop, limits.timeout_s)

    app = FastAPI(
        title="isthmus",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={
            code: {"description": text}
            for code, text in (
                (400, "Something cannot be honoured"),
                (401, "No key, or a wrong one"),
                (404, "Unknown model"),
                (413, "The body is too large"),
                (429, "All places are taken"),
                (504, "No answer in time"),
            )
        },
    )
    app.state.server = server

    def error(status: int, message: str, param: str | None = None) -> JSONResponse:
        headers = {"retry-after": "1"} if status == 429 else None
        return JSONResponse(body_of(status, message, param), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, found: RequestValidationError) -> JSONResponse:
        first = found.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
        return error(400, f"{place}: {first['msg']}" if place else str(first["msg"]), place or None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, found: HTTPException) -> JSONResponse:
        return error(found.status_code, str(found.detail))

    @app.exception_handler(BusyError)
    async def busy(request: Request, found: BusyError) -> JSONResponse:
        return error(429 if server.engine.alive else 503, str(found))

    @app.exception_handler(IsthmusError)
    async def bad(request: Request, found: IsthmusError) -> JSONResponse:
        return error(501 if isinstance(found, MissingExtraError) else 400, str(found))

    @app.get("/health")
    async def health() -> Response:
        alive = server.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        engine = server.engine
        gauges = {
            "isthmus_requests_running": ("Requests at work.", float(engine.running)),
            "isthmus_requests_waiting": ("Requests in the line.", float(engine.waiting)),
            "process_resident_memory_bytes": ("Resident size.", resident_bytes()),
        }
        return PlainTextResponse(server.metrics.render(gauges), media_type=CONTENT_TYPE)

    def card() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": server.created, "owned_by": "isthmus"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        server.check_name(model_id)
        return card()

    async def answer(
        request: Request,
        body: Common,
        kind: str,
        made: tuple[list[Answer], Events],
        n: int,
        choice: Callable[..., dict[str, Any]],
        opening: Callable[[Answer], dict[str, Any]] | None = None,
        echo: bool = False,
    ) -> Response:
        answers, queue = made
        chat = kind == "chat.completion"
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }
        flow = server.tokens(request, kind, answers, queue)
        if not body.stream:
            async for _ in flow:
                pass
            if any(not a.job.done.is_set() for a in answers):
                return Response(status_code=499)  # nobody is there any more
            choices = []
            for a in answers:
                text = (a.echo if echo else "") + a.job.result.text
                found = server.logprobs(a, chat)
                choices.append(choice(a, text, found, a.job.result.finish_reason, False))
            return JSONResponse({**head, "choices": choices, "usage": server.usage(answers, n)})
        chunk = {**head, "object": "chat.completion.chunk" if chat else kind}
        waiting = {"usage": None} if body.usage else {}
        # the first token decides between an answer and a refusal with a status of its own
        first = await anext(flow, None)
        if first is None:
            return Response(status_code=499)  # nobody is there any more

        async def events() -> AsyncIterator[str]:
            for a in answers:
                if opening is not None:
                    yield _event({**chunk, "choices": [opening(a)], **waiting})
                elif echo:
                    part = choice(a, a.echo, None, None, True)
                    yield _event({**chunk, "choices": [part], **waiting})
            entry: Any = first
            while entry is not None:
                a, tokens, done = entry
                text = a.push(tokens, last=done)
                found = server.logprobs(a, chat)
                if text or found or done:
                    reason = a.job.result.finish_reason if done else None
                    part = choice(a, text, found, reason, True)
                    yield _event({**chunk, "choices": [part], **waiting})
                entry = await anext(flow, None)
            if body.usage:
                yield _event({**chunk, "choices": [], "usage": server.usage(answers, n)})

        return Stream(_whole(events(), flow), 2 * limits.timeout_s)

    @app.post("/v1/completions")
    async def completions(request: Request, body: Annotated[CompletionRequest, Body()]) -> Response:
        server.check_name(body.model)
        given = body.prompt
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        prompts: list[Any] = [given] if single else list(given)
        if not prompts:
            raise InvalidInputError("the prompt is empty; give some text to continue")
        made = await run_in_threadpool(
            server.prepare, body, prompts, body.max_tokens or 16, logprobs=body.logprobs
        )

        def choice(
            a: Answer, text: str, logprobs: Any, reason: str | None, delta: bool
        ) -> dict[str, Any]:
            return {
                "index": a.index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": reason,
            }

        return await answer(
            request, body, "text_completion", made, body.n or 1, choice, echo=bool(body.echo)
        )

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: Annotated[ChatRequest, Body()]) -> Response:
        server.check_name(body.model)
        messages = [{"role": m.role, "content": m.text} for m in body.messages]
        prompt, stops = await run_in_threadpool(server.chat_prompt, messages)
        budget = body.max_completion_tokens or body.max_tokens or min(512, limits.max_tokens)
        top = (body.top_logprobs or 0) if body.logprobs else None
        made = await run_in_threadpool(
            server.prepare, body, [prompt], budget, logprobs=top, stops=stops
        )

        def choice(
            a: Answer, text: str, logprobs: Any, reason: str | None, delta: bool
        ) -> dict[str, Any]:
            message: dict[str, Any] = {"content": text}
            if not delta:
                message = {"role": "assistant", "content": text, "refusal": None}
            return {
                "index": a.index,
                "delta" if delta else "message": message,
                "logprobs": logprobs,
                "finish_reason": reason,
            }

        def opening(a: Answer) -> dict[str, Any]:
            delta = {"role": "assistant", "content": ""}
            return {"index": a.index, "delta": delta, "logprobs": None, "finish_reason": None}

        return await answer(request, body, "chat.completion", made, body.n or 1, choice, opening)

    @app.post("/api/trace")
    async def trace(request: Request, body: Annotated[TraceRequest, Body()]) -> Response:
        wanted: dict[str, Any] = {"temperature": body.temperature, "seed": body.seed}
        if body.json_schema is not None:
            schema = {"name": "answer", "schema": body.json_schema}
            wanted["response_format"] = {"type": "json_schema", "json_schema": schema}
        answers, queue = await run_in_threadpool(
            server.prepare,
            Common(**wanted),
            [body.prompt],
            body.max_tokens,
            logprobs=None,
            trace=True,
        )
        flow = server.tokens(request, "trace", answers, queue)
        first = await anext(flow, None)
        if first is None:
            return Response(status_code=499)
        start = time.monotonic()

        async def events() -> AsyncIterator[str]:
            shown, count = 0, 0
            entry: Any = first
            while entry is not None:
                a, tokens, done = entry
                count += len(tokens)
                rounds = a.job.result.rounds
                if tokens and shown < len(rounds):
                    made = rounds[shown]
                    shown += 1
                    text = a.push(tokens, last=False)
                    yield _event(
                        asdict(
                            trace_round(
                                made,
                                tokens,
                                server.shown_text,
                                seconds=time.monotonic() - start,
                                forwards=shown,
                                count=count,
                            )
                        )
                        | {"text": text}
                    )
                if done:
                    result = a.job.result
                    yield _event(
                        {
                            "text": a.push((), last=True),
                            "finish_reason": result.finish_reason,
                            "stats": result.stats.to_dict(),
                            "notes": result.notes,
                        }
                    )
                entry = await anext(flow, None)

        return Stream(_whole(events(), flow), 2 * limits.timeout_s)

    static = str(files("isthmus.serving") / "static")
    app.mount("/", StaticFiles(directory=static, html=True), name="page")
    guarded: Any = app
    guarded.add_middleware(
        Guard,
        max_body=limits.max_body_bytes,
        body_s=min(30.0, limits.timeout_s),
        api_key=api_key,
        hosts=tuple(hosts),
    )
    return app
