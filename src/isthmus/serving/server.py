"""What the handlers of a server share: its limits, its engine, and answers on their way."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from isthmus.decoding import constraint
from isthmus.decoding.model import Model
from isthmus.decoding.online import BusyError, Job, Online
from isthmus.decoding.penalties import Penalties
from isthmus.decoding.stopping import Detokenizer
from isthmus.errors import InvalidInputError, IsthmusError
from isthmus.serving.metrics import Metrics
from isthmus.serving.schema import Common

CHAT_STOPS = ("\nuser:", "\nsystem:")
"""Where an answer ends that a model without a chat template writes after ``assistant:``."""

LOOK_S = 0.25
"""Seconds between two looks whether a client is still there."""

Events = asyncio.Queue[tuple[int, list[int], bool]]
"""Number of a choice, its new tokens, and whether it is done."""


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        batch_size: Requests at work at once.
        queue: Requests that may wait besides; more are answered with 429.
        max_tokens: Largest budget of one answer.
        max_prompt_tokens: Longest prompt; 0 is the model's context.
        max_body_bytes: Largest body.
        timeout_s: Seconds for one request, waiting included.
    """

    batch_size: int = 16
    queue: int = 64
    max_tokens: int = 4096
    max_prompt_tokens: int = 0
    max_body_bytes: int = 2**20
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens", "max_body_bytes", "timeout_s"):
            if getattr(self, name) <= 0:
                raise InvalidInputError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass
class Answer:
    """One choice on its way to a client: its job, and the text that may be shown already."""

    index: int
    job: Job
    detokenizer: Detokenizer
    hold: int
    echo: str = ""
    shown: int = 0
    told: int = 0
    offset: int = 0

    def push(self, tokens: Sequence[int], *, last: bool) -> str:
        """New text; a beginning of a stop string is held back."""
        if last:
            text = self.job.result.text
        elif self.job.result.finish_reason:
            return ""  # where a stop string cuts the text is told at the end
        else:
            self.detokenizer.push(tokens)
            text = self.detokenizer.text[: max(self.shown, len(self.detokenizer.text) - self.hold)]
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


class Server:
    """What the handlers share.

    Args:
        model: The model.
        name: What clients call it.
        limits: See :class:`Limits`.
        drafter: Drafter of all requests.
        num_draft_tokens: As for generate.
        log: Called with one JSON line for every request.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        limits: Limits,
        *,
        drafter: str = "auto",
        num_draft_tokens: int | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        if model.tokenizer is None:
            raise InvalidInputError("a server needs a model with a tokenizer")
        self.model, self.name, self.limits, self.metrics = model, name, limits, Metrics()
        self.engine = Online(
            model,
            drafter=drafter,
            num_draft_tokens=num_draft_tokens,
            batch_size=limits.batch_size,
            queue=limits.queue,
        )
        self.created = int(time.time())
        self.log = log or (lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        self._reading = threading.Lock()  # tokenizers are not for several threads at once
        self._texts: dict[int, str] = {}

    def token_text(self, token: int) -> str:
        """Text of a single token."""
        if token not in self._texts:
            self._texts[token] = self.model.tokenizer.decode([token])
        return self._texts[token]

    def shown_text(self, token: int) -> str:
        """Text of a single token as a reader sees it: that of an end token is empty."""
        return "" if token in self.model.tokenizer.all_special_ids else self.token_text(token)

    def check_name(self, name: str) -> None:
        """Refuse another model's name; none at all is taken.

        Raises:
            HTTPException: 404.
        """
        if name not in ("", self.name):
            raise HTTPException(404, f"there is no model {name[:200]!r} here, only {self.name!r}")

    def prepare(
        self,
        body: Common,
        prompts: Sequence[str | list[int]],
        max_tokens: int,
        *,
        logprobs: int | None,
        stops: Sequence[str] = (),
        trace: bool = False,
    ) -> tuple[list[Answer], Events]:
        """Read prompts and options; runs in a thread.

        Raises:
            InvalidInputError: Anything that cannot be honoured.
        """
        limits, model = self.limits, self.model
        if max_tokens > limits.max_tokens:
            raise InvalidInputError(
                f"this server writes {limits.max_tokens} tokens at most, not {max_tokens}"
            )
        most = limits.batch_size + limits.queue
        if len(prompts) * (body.n or 1) > most:
            raise InvalidInputError(
                f"this server writes {most} answers at once at most; ask for fewer prompts or n"
            )
        wanted = _constraint(body)
        stops = [*body.stops, *stops]
        sampling = {
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_k": body.top_k or 0,
            "min_p": body.min_p or 0.0,
            "repetition_penalty": body.repetition_penalty or 1.0,
        }
        bias = _bias(body)
        first = random.SystemRandom().getrandbits(48) if body.seed is None else body.seed
        loop: asyncio.AbstractEventLoop = self.loop
        queue: Events = asyncio.Queue()
        answers: list[Answer] = []
        with self._reading:
            for prompt in prompts:
                ids = model.encode(prompt).tolist()
                longest = limits.max_prompt_tokens
                if longest and len(ids) > longest:
                    raise InvalidInputError(
                        f"this server reads prompts of {longest} tokens at most, not {len(ids)}"
                    )
                for _ in range(body.n or 1):
                    index = len(answers)
                    options: dict[str, Any] = dict(sampling)
                    if body.presence_penalty or body.frequency_penalty or bias:
                        penalties = Penalties(
                            len(ids),
                            presence=body.presence_penalty or 0.0,
                            frequency=body.frequency_penalty or 0.0,
                            bias=bias,
                            vocab_size=model.target.vocab_size,
                        )
                        options["processors"] = [penalties]

                    def listen(job: Job, tokens: list[int], index: int = index) -> None:
                        entry = (index, tokens, job.done.is_set())
                        loop.call_soon_threadsafe(queue.put_nowait, entry)

                    job = self.engine.prepare(
                        ids if not model.target.encoder_decoder else prompt,
                        listen,
                        max_new_tokens=max_tokens,
                        stop=stops,
                        seed=(first + index) % 2**63,
                        logprobs=logprobs,
                        trace=trace,
                        ignore_end=bool(body.ignore_eos),
                        constraint=wanted,
                        **options,
                    )
                    job.result.prompt_tokens = len(ids)
                    hold = max(map(len, stops), default=1) - 1
                    echo = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
                    detokenizer = Detokenizer(model.tokenizer)
                    answers.append(Answer(index, job, detokenizer, hold, echo))
        return answers, queue

    loop: asyncio.AbstractEventLoop

    async def tokens(
        self,
        request: Request,
        endpoint: str,
        answers: list[Answer],
        queue: Events,
    ) -> AsyncIterator[tuple[Answer, list[int], bool]]:
        """Put jobs to work and yield what comes; whoever stops reading lets go of all of them.

        Raises:
            BusyError: No room.
            HTTPException: 504 after the time limit, 500 where the engine failed.
        """
        start, first = time.monotonic(), True
        status, left, looked = 200, len(answers), start
        try:
            self.engine.submit([answer.job for answer in answers])
            while left:
                now = time.monotonic()
                if now - looked >= LOOK_S:
                    looked = now
                    if await request.is_disconnected():
                        status = 499
                        return
                patience = start + self.limits.timeout_s - now
                try:
                    index, tokens, done = await asyncio.wait_for(
                        queue.get(), max(0.0, min(LOOK_S, patience))
                    )
                except TimeoutError:
                    if patience <= 0:
                        status = 504
                        raise HTTPException(
                            504, f"no answer within {self.limits.timeout_s:g} s"
                        ) from None
                    continue
                if first:
                    first = False
                    self.metrics.observe(
                        "isthmus_time_to_first_token_seconds",
                        "From the request to its first token.",
                        time.monotonic() - start,
                    )
                answer = answers[index]
                left -= done
                if answer.job.result.finish_reason == "error":
                    status = 500
                    raise HTTPException(500, "; ".join(answer.job.result.notes) or "it failed")
                yield answer, tokens, done
        except BusyError:
            status = 429
            raise
        except (asyncio.CancelledError, GeneratorExit):
            status = 499
            raise
        finally:
            for answer in answers:
                if not answer.job.done.is_set():
                    answer.job.cancel()
            self._account(endpoint, answers, status, time.monotonic() - start)

    def _account(self, endpoint: str, answers: list[Answer], status: int, seconds: float) -> None:
        results = [answer.job.result for answer in answers]
        new = sum(len(r.tokens) for r in results)
        forwards = sum(r.stats.target_forwards for r in results)
        m = self.metrics
        m.add("isthmus_requests_total", "Requests.", endpoint=endpoint, status=str(status))
        m.add("isthmus_prompt_tokens_total", "Tokens read.", sum(r.prompt_tokens for r in results))
        m.add("isthmus_generated_tokens_total", "Tokens written.", new)
        m.add("isthmus_target_forwards_total", "Rounds of all requests.", forwards)
        for name, count in (
            ("drafted", sum(r.stats.drafted for r in results)),
            ("accepted", sum(r.stats.accepted for r in results)),
        ):
            m.add(f"isthmus_{name}_tokens_total", f"Draft tokens that were {name}.", count)
        m.observe("isthmus_request_seconds", "From a request to its end.", seconds)
        line = {
            "time": round(time.time(), 3),
            "event": "request",
            "endpoint": endpoint,
            "status": status,
            "choices": len(results),
            "prompt_tokens": sum(r.prompt_tokens for r in results),
            "new_tokens": new,
            "forwards": forwards,
            "seconds": round(seconds, 4),
            "finish": sorted({r.finish_reason or "cancelled" for r in results}),
        }
        self.log(json.dumps(line))

    def usage(self, answers: list[Answer], n: int) -> dict[str, int]:
        """Tokens read and written; a prompt counts once for all its choices."""
        read = sum(a.job.result.prompt_tokens for a in answers[::n])
        new = sum(len(a.job.result.tokens) for a in answers)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    def logprobs(self, answer: Answer, chat: bool) -> dict[str, Any] | None:
        """Log-probabilities of the tokens that were not told of yet."""
        job = answer.job
        if job.top is None:
            return None
        entries = job.logprobs[answer.told : len(job.result.tokens)]
        answer.told += len(entries)
        if chat:

            def named(token: int, logprob: float) -> dict[str, Any]:
                text = self.token_text(token)
                return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

            content = [
                {
                    **named(e.token, e.logprob),
                    "top_logprobs": [named(t, p) for t, p in e.top[: job.top]],
                }
                for e in entries
            ]
            return {"content": content, "refusal": None}
        texts = [self.token_text(e.token) for e in entries]
        offsets = []
        for text in texts:
            offsets.append(answer.offset)
            answer.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": [{self.token_text(t): p for t, p in e.top} for e in entries],
            "text_offset": offsets,
        }

    def chat_prompt(self, messages: list[dict[str, str]]) -> tuple[str | list[int], Sequence[str]]:
        """Prompt of a chat, and where its answer ends; runs in a thread.

        Raises:
            InvalidInputError: The template refuses the messages.
        """
        tokenizer = self.model.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            lines = [f"{m['role']}: {m['content']}\n" for m in messages]
            return "".join(lines) + "assistant:", CHAT_STOPS
        try:
            with self._reading:
                text = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
                ids = tokenizer(text, add_special_tokens=False).input_ids
        except Exception as error:  # whatever a template of Jinja raises
            raise InvalidInputError(f"the model's chat template refuses this: {error}") from error
        return list(ids), ()


def _constraint(body: Common) -> Any:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return constraint.json_object()
    if wanted.json_schema is None:
        raise InvalidInputError("response_format of type json_schema needs the field json_schema")
    try:
        schema = json.dumps(wanted.json_schema.schema_, ensure_ascii=False)
        schema.encode()  # half a surrogate pair is no text
        return constraint.json_schema(schema)
    except (RecursionError, ValueError) as error:
        if isinstance(error, IsthmusError):
            raise
        raise InvalidInputError("the schema cannot be read") from error


def _bias(body: Common) -> dict[int, float]:
    given = body.logit_bias or {}
    if len(given) > 1024 or not all(k.isdecimal() and len(k) < 12 for k in given):
        raise InvalidInputError("logit_bias maps at most 1024 token ids to numbers")
    if not all(map(math.isfinite, given.values())):
        raise InvalidInputError("logit_bias must hold finite numbers")
    return {int(k): v for k, v in given.items()}
