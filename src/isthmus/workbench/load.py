"""A load test for servers with OpenAI's interface: honest clients and hostile ones at once.

Clients speak HTTP over loopback sockets of their own. An honest one asks for a text that is known
beforehand, as :meth:`isthmus.decoding.model.Model.generate` writes it with the same seed, and
compares what it gets. Hostile ones leave in the middle of a stream, read slowly, or send bodies
that are too large, no JSON, or no UTF-8. What counts is that every honest client is answered in
full and right, whatever the others do.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.decoding.model import Model
from isthmus.errors import IsthmusError
from isthmus.workbench import pycode

HOSTILE = {
    "leaves": 0.08,
    "reads slowly": 0.06,
    "too large": 0.05,
    "no JSON": 0.05,
    "no UTF-8": 0.05,
    "wrong field": 0.03,
}
"""Shares of the requests that are not honest; a slow reader is honest but for its pace."""

REFUSED = {"too large": 413, "no JSON": 400, "no UTF-8": 400, "wrong field": 400}
"""How a server has to answer them."""

STARTUP_S = 120.0
"""A server has to answer within this."""


class ServerFailedError(IsthmusError):
    """A server under test did not start or died."""


@dataclass(frozen=True)
class Known:
    """A request and the text that answers it.

    Attributes:
        body: Body of ``POST /v1/completions``.
        text: The answer.
    """

    body: dict[str, Any]
    text: str


@dataclass
class Reply:
    """What came back.

    Attributes:
        status: HTTP status, 0 where the connection broke.
        text: Text of the answer so far.
        finished: Whether it ended as it should: ``[DONE]`` for streams.
        tokens: Tokens of the answer by its usage.
        first_s: Seconds to the first text.
        seconds: Seconds to the end.
        note: What a refusal said.
    """

    status: int = 0
    text: str = ""
    finished: bool = False
    tokens: int = 0
    first_s: float = 0.0
    seconds: float = 0.0
    note: str = ""


@dataclass
class Tally:
    """Counts of one load.

    Attributes:
        clients: Clients at once.
        seconds: How long.
        asked: Requests by kind.
        right: Those that were answered as they had to be.
        wrong: What was wrong with the others, some of them in words.
        busy: Answers of 429, which are asked again.
        tokens: Tokens of finished answers.
        first_s: Seconds to the first text of honest streams.
        total_s: Seconds of honest requests.
        resident: Seconds since the start and resident bytes of the server.
    """

    clients: int
    seconds: float = 0.0
    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    busy: int = 0
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Throughput."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def growth(self) -> float:
        """Resident size at the end over that after the first quarter of the time, minus one."""
        sizes = [size for _, size in self.resident]
        if len(sizes) < 8:
            return 0.0
        window = max(1, len(sizes) // 8)
        start = len(sizes) // 4
        early = statistics.median(sizes[start : start + window])
        return statistics.median(sizes[-window:]) / early - 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 2),
            "asked": dict(self.asked),
            "right": dict(self.right),
            "wrong": self.wrong,
            "busy": self.busy,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens_per_s, 2),
            "first_s": quantiles(self.first_s),
            "total_s": quantiles(self.total_s),
            "resident_growth": round(self.growth, 4),
            "resident": [(round(t, 1), size) for t, size in self.resident],
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile.

    Example:
        >>> quantiles([3.0, 1.0, 2.0])
        {'p50': 2.0, 'p95': 3.0, 'p99': 3.0}
    """
    ordered = sorted(values) or [0.0]
    return {
        f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 4)
        for p in (50, 95, 99)
    }


def known(
    model: Model, count: int, *, greedy: bool = False, max_tokens: int = 96, seed: int = 0
) -> list[Known]:
    """Requests whose answers are known: prompts of held-out code, each with its own options.

    Args:
        model: The model that is served.
        count: How many.
        greedy: No sampling, and all of one budget.
        max_tokens: Largest budget.
        seed: Other seeds give other requests.
    """
    rng, found = random.Random(seed), []
    for number, ids in enumerate(pycode.prompts(count, model.tokenizer, 48, seed=seed)):
        prompt = model.tokenizer.decode(ids)
        budget = max_tokens if greedy else rng.randint(max(1, max_tokens // 6), max_tokens)
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": budget, "temperature": 0.0}
        if not greedy:
            body |= {"temperature": rng.choice((0.0, 0.7, 1.0)), "seed": 1000 * seed + number}
            body["top_p"] = rng.choice((1.0, 0.9))
            if rng.random() < 0.25:
                body["stop"] = ["\n\n"]
        answer = model.generate(
            prompt,
            max_new_tokens=budget,
            drafter="none",
            temperature=body["temperature"],
            top_p=body.get("top_p", 1.0),
            stop=body.get("stop", ()),
            seed=body.get("seed"),
        )
        found.append(Known(body, answer.text))
    return found


@dataclass
class Served:
    """A server process.

    Attributes:
        port: Port on 127.0.0.1.
        process: The process.
        name: What the server calls the model.
    """

    port: int
    process: subprocess.Popen[bytes]
    name: str

    def resident(self) -> int:
        """Resident size in bytes; 0 where it cannot be read."""
        try:
            statm = Path(f"/proc/{self.process.pid}/statm").read_text()
        except OSError:
            return 0
        return int(statm.split()[1]) * 4096


@contextmanager
def started(command: Sequence[str], name: str, *, port: int = 0) -> Iterator[Served]:
    """Start a server and stop it at the end.

    Args:
        command: The command.
        name: What the server calls the model.
        port: Port it was told; 0 reads ``http://127.0.0.1:PORT`` from what it says.

    Raises:
        ServerFailedError: It did not answer in time.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        process = subprocess.Popen(list(command), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + STARTUP_S
            while True:
                said = (Path(folder) / "log").read_text(errors="replace")
                address = re.search(r"http://127\.0\.0\.1:(\d+)", said)
                place = port or (int(address.group(1)) if address else 0)
                if place and _answers(place):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    last = (said.strip().splitlines() or ["it said nothing"])[-1]
                    raise ServerFailedError(f"{command[0]} does not serve: {last}")
                time.sleep(0.2)
            yield Served(place, process, name)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as link:
            link.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
            return link.recv(64).split(b" ")[1:2] == [b"200"]
    except OSError:
        return False


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
        return port


async def ask(
    port: int,
    body: bytes,
    *,
    path: str = "/v1/completions",
    pause_s: float = 0.0,
    leave_after: int | None = None,
) -> Reply:
    """Send one request and read its answer.

    Args:
        port: Port on 127.0.0.1.
        body: The body.
        path: The path.
        pause_s: Seconds between two reads.
        leave_after: Close the connection after that many lines.
    """
    reply, start = Reply(), time.perf_counter()
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        # a server that refuses a body may close before it has read all of it
        with suppress(ConnectionError):
            await writer.drain()
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        reply.status = int(headers.split(b" ", 2)[1])
        stream = b"text/event-stream" in headers
        seen, whole = 0, b""
        async for line in _lines(reader, b"transfer-encoding: chunked" in headers):
            if not stream:
                whole += line + b"\n"
                continue
            _read_event(line, reply, start)
            seen += bool(line)
            if leave_after is not None and seen >= leave_after:
                break
            if pause_s and line:
                await asyncio.sleep(pause_s)
        if not stream:
            _read_whole(whole, reply)
    except (OSError, asyncio.IncompleteReadError) as error:
        reply.note = reply.note or f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()
    reply.seconds = time.perf_counter() - start
    return reply


def _read_event(line: bytes, reply: Reply, start: float) -> None:
    data = line.removeprefix(b"data: ").strip()
    if not line.startswith(b"data: "):
        return
    if data == b"[DONE]":
        reply.finished = True
        return
    event = json.loads(data)
    if "error" in event:
        reply.note = str(event["error"])
        return
    reply.tokens = (event.get("usage") or {}).get("completion_tokens", reply.tokens)
    for choice in event["choices"]:
        if choice["text"] and not reply.text:
            reply.first_s = time.perf_counter() - start
        reply.text += choice["text"]


def _read_whole(body: bytes, reply: Reply) -> None:
    found = json.loads(body)
    if reply.status != 200:
        reply.note = str(found)[:200]
        return
    reply.text, reply.finished = found["choices"][0]["text"], True
    reply.tokens = found["usage"]["completion_tokens"]


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    rest = b""
    while True:
        if chunked:
            size = int((await reader.readline()).split(b";")[0].strip() or b"0", 16)
            part = await reader.readexactly(size)
            await reader.readline()
        else:
            part = await reader.read(65536)
        if not part:
            break
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


async def load(
    served: Served,
    requests: Sequence[Known],
    *,
    clients: int,
    seconds: float,
    hostile: bool = False,
    compare: bool = True,
    extra: dict[str, Any] | None = None,
    max_body_bytes: int = 2**20,
    seed: int = 0,
) -> Tally:
    """Let clients ask one request after the other for some time.

    Args:
        served: The server.
        requests: What to ask for.
        clients: How many at once.
        seconds: No request begins after this.
        hostile: Mix in the clients of :data:`HOSTILE`, and answers that are not streamed.
        compare: Texts have to be the known ones.
        extra: Further fields of every body.
        max_body_bytes: Largest body that the server takes.
        seed: Seed of all choices.
    """
    tally, start = Tally(clients), time.perf_counter()

    async def client(rng: random.Random) -> None:
        while time.perf_counter() - start < seconds:
            await one(rng)

    async def one(rng: random.Random) -> None:
        kind, dice = "honest", rng.random()
        for name, share in HOSTILE.items() if hostile else ():
            dice -= share
            if dice < 0:
                kind = name
                break
        wanted = rng.choice(requests)
        streamed = not hostile or kind != "honest" or rng.random() < 0.85
        body = {"model": served.name, **wanted.body, **(extra or {}), "stream": streamed}
        data = _spoiled(json.dumps(body).encode(), kind, max_body_bytes, rng)
        while True:
            tally.asked[kind] += 1
            reply = await ask(
                served.port,
                data,
                pause_s=rng.uniform(0.02, 0.1) if kind == "reads slowly" else 0.0,
                leave_after=rng.randint(1, 8) if kind == "leaves" else None,
            )
            if reply.status != 429:
                break
            tally.asked[kind] -= 1
            tally.busy += 1
            await asyncio.sleep(1.0)
        fault = _fault(kind, reply, wanted.text if compare else None)
        if fault:
            tally.wrong.append(f"{kind}: {fault}")
            return
        tally.right[kind] += 1
        late = time.perf_counter() - start > seconds
        if kind in ("honest", "reads slowly") and not (hostile and late):
            tally.tokens += reply.tokens
        if kind == "honest":
            tally.total_s.append(reply.seconds)
            if streamed and reply.text:
                tally.first_s.append(reply.first_s)

    async def weigh() -> None:
        while True:
            tally.resident.append((time.perf_counter() - start, served.resident()))
            await asyncio.sleep(1.0)

    scale = asyncio.create_task(weigh())
    await asyncio.gather(*(client(random.Random(seed * 10_000 + c)) for c in range(clients)))
    scale.cancel()
    # slow readers end late: what comes after the time is compared then, but not counted
    tally.seconds = seconds if hostile else time.perf_counter() - start
    return tally


def _spoiled(body: bytes, kind: str, max_body_bytes: int, rng: random.Random) -> bytes:
    if kind == "too large":
        return body[:-1] + b', "user": "' + b"x" * max_body_bytes + b'"}'
    if kind == "no JSON":
        return body[: rng.randrange(1, len(body) - 1)]
    if kind == "no UTF-8":
        cut = body.index(b'"prompt": "') + 11
        return body[:cut] + bytes([rng.choice((0xFF, 0xC0, 0x80))]) + body[cut:]
    if kind == "wrong field":
        return body[:-1] + rng.choice((b', "n": -1}', b', "max_tokens": "x"}', b', "mystery": 1}'))
    return body


def _fault(kind: str, reply: Reply, text: str | None) -> str:
    """What is wrong with a reply; empty if nothing is."""
    if kind in REFUSED:
        if reply.status == REFUSED[kind]:
            return ""
        # the server may refuse and close before a large body is sent, which breaks the connection
        lost = kind == "too large" and reply.status == 0
        return "" if lost else f"status {reply.status}, {reply.note}"
    if reply.status != 200:
        return f"status {reply.status}, {reply.note}"
    if kind == "leaves":
        whole = text is None or text.startswith(reply.text)
        return "" if whole else f"{reply.text!r} is no beginning of {text!r}"
    # not every server says [DONE]
    if not reply.finished and (text is not None or not reply.tokens):
        return f"the stream broke off, {reply.note}"
    if text is not None and reply.text != text:
        return f"{reply.text!r} is not {text!r}"
    return ""


async def gauges(port: int) -> dict[str, float]:
    """The values without labels of ``/metrics``."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    lines = (line for line in text.splitlines() if re.match(r"[a-z_]+ [\d.e+]+$", line))
    rows = (line.rsplit(" ", 1) for line in lines)
    return {name: float(value) for name, value in rows}


async def all_places_free(served: Served, wait_s: float = 20.0) -> bool:
    """Whether nothing is at work or waits, once everybody has left."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        found = await gauges(served.port)
        if not found["isthmus_requests_running"] and not found["isthmus_requests_waiting"]:
            return True
        await asyncio.sleep(0.2)
    return False


async def finishes_when_told(served: Served, wanted: Known) -> bool:
    """Whether a stream that runs when the server is told to end is finished; ends the server."""
    body = json.dumps({**wanted.body, "stream": True}).encode()
    stream = asyncio.create_task(ask(served.port, body, pause_s=0.01))
    while not (await gauges(served.port))["isthmus_requests_running"] and not stream.done():
        await asyncio.sleep(0.005)
    served.process.terminate()
    reply = await stream
    code = await asyncio.to_thread(served.process.wait, 60)
    # a process that ends itself by the signal it was sent says so in its code
    return reply.finished and reply.text == wanted.text and code in (0, -signal.SIGTERM)
