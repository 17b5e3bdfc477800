"""``isthmus bench serve``: a server under load, beside that of transformers."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import InvalidInputError


def serve(
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"])] = "",
    drafter: Annotated[str, Parameter(name=["--drafter", "-d"])] = "auto",
    clients: int = 64,
    seconds: float = 60.0,
    batch_size: int = 16,
    requests: int = 48,
    max_tokens: int = 96,
    hostile: bool = True,
    peer: str = "transformers",
    peer_clients: tuple[int, ...] = (1, 4, 16),
    peer_seconds: float = 8.0,
    json: bool = False,
) -> int:
    """Load a server with many clients at once, and compare it with transformers serve.

    First honest and hostile clients together: every answer is compared with what isthmus generate
    writes for its seed, the resident size is watched, and at the end all places must be free. Then
    the same greedy requests to isthmus serve and to transformers serve in turns.

    Exit code 1 where an answer was wrong, a place was lost, or the server did not end well.

    Args:
        model: Folder or hub id of a checkpoint, or a reference model; default the embedded one.
        drafter: Drafter of the server.
        clients: Clients at once.
        seconds: How long they ask.
        batch_size: Places of the server.
        requests: Different requests, whose answers are computed first.
        max_tokens: Largest budget of an answer.
        hostile: Mix in clients that leave, read slowly, or send what no server should take.
        peer: Command of transformers to compare with ("transformers serve" needs its own extras);
            an empty string compares with nothing.
        peer_clients: Numbers of clients to compare at; may be given several times.
        peer_seconds: Seconds of each of two turns a server at each number.
        json: Print one JSON object and nothing else on standard output.
    """
    if min(clients, requests, max_tokens, batch_size, *peer_clients) < 1 or seconds <= 0:
        raise InvalidInputError("clients, requests, max-tokens and batch-size must be at least 1")
    quiet_transformers()
    from isthmus.api import EMBEDDED, load, locate
    from isthmus.claims import Provenance
    from isthmus.workbench import load as testing

    loaded = load(model)
    if loaded.tokenizer is None:
        raise InvalidInputError("the load test writes text and needs a model with a tokenizer")
    place = locate(model)
    name = Path(place).name or EMBEDDED
    mixed = testing.known(loaded, requests, max_tokens=max_tokens, seed=1)
    greedy = testing.known(loaded, min(requests, 16), greedy=True, max_tokens=64, seed=2)
    command = [
        *(sys.executable, "-m", "isthmus.cli.main", "serve", "--model", place, "--port", "0"),
        *("--drafter", drafter, "--batch-size", str(batch_size), "--name", name),
        *("--queue", str(2 * clients)),
    ]
    usage = {"stream_options": {"include_usage": True}}
    found: dict[str, Any] = {"model": model or "embedded", "drafter": drafter}
    screen = console(stderr=True)
    rows: list[tuple[int, str, testing.Tally]] = []
    with screen.status("load"), testing.started(command, name) as ours:
        tally = asyncio.run(
            testing.load(
                ours, mixed, clients=clients, seconds=seconds, hostile=hostile, extra=usage
            )
        )
        found["load"] = tally.to_dict()
        found["places_free"] = asyncio.run(testing.all_places_free(ours))
        if peer:
            port = testing.free_port()
            other = [peer, "serve", place, "--port", str(port), "--device", "cpu"]
            try:
                with testing.started(other, place, port=port) as theirs:
                    rows = _turns(ours, theirs, greedy, peer_clients, peer_seconds, usage)
            except (OSError, testing.ServerFailedError) as error:
                found["peer_failed"] = str(error)
        found["finished_when_told"] = asyncio.run(testing.finishes_when_told(ours, greedy[0]))
    found["peers"] = [{"server": who, **tally_.to_dict()} for _, who, tally_ in rows]
    found["provenance"] = vars(Provenance.gather())
    bad = [*tally.wrong, *(w for _, who, t in rows if who == "isthmus" for w in t.wrong)]
    fine = not bad and found["places_free"] and found["finished_when_told"]
    if json:
        print_json(found)
        return 0 if fine else 1
    _show(found, tally, rows)
    for fault in bad[:5]:
        screen.print(fault[:500])
    return 0 if fine else 1


def _turns(
    ours: Any, theirs: Any, greedy: Any, numbers: tuple[int, ...], seconds: float, usage: Any
) -> list[tuple[int, str, Any]]:
    """Both servers in turns, one warm-up each; their counts by number of clients."""
    from isthmus.workbench import load as testing

    def turn(server: Any, clients: int, time_s: float) -> Any:
        mine = server is ours
        return asyncio.run(
            testing.load(
                server,
                greedy,
                clients=clients,
                seconds=time_s,
                compare=mine,
                extra=usage if mine else None,
            )
        )

    rows = []
    for clients in numbers:
        for server in (ours, theirs):
            turn(server, clients, 1.0)
        whole = {"isthmus": testing.Tally(clients), "transformers": testing.Tally(clients)}
        for _ in range(2):
            for who, server in (("isthmus", ours), ("transformers", theirs)):
                part, sum_ = turn(server, clients, seconds), whole[who]
                sum_.seconds += part.seconds
                sum_.tokens += part.tokens
                sum_.asked += part.asked
                sum_.right += part.right
                sum_.wrong += part.wrong
                sum_.first_s += part.first_s
                sum_.total_s += part.total_s
        rows += [(clients, who, tally) for who, tally in whole.items()]
    return rows


def _show(found: dict[str, Any], tally: Any, rows: list[tuple[int, str, Any]]) -> None:
    from rich.table import Table

    from isthmus.workbench.load import quantiles

    table = Table(title=f"{found['model']}: {tally.clients} clients for {tally.seconds:.0f} s")
    for heading in ("clients that", "requests", "answered as they must be"):
        table.add_column(heading, justify="left" if heading.startswith("c") else "right")
    for kind, count in sorted(tally.asked.items()):
        table.add_row(kind, str(count), str(tally.right[kind]))
    first, total = quantiles(tally.first_s), quantiles(tally.total_s)
    sizes = [size for _, size in tally.resident if size]
    table.caption = (
        f"{tally.tokens_per_s:.0f} tokens/s; first text p50 {first['p50']:.3f} s, p99 "
        f"{first['p99']:.3f} s; whole answer p50 {total['p50']:.3f} s, p99 {total['p99']:.3f} s; "
        f"429: {tally.busy}; resident {min(sizes, default=0) / 2**20:.0f} to "
        f"{max(sizes, default=0) / 2**20:.0f} MiB, growth {tally.growth:+.1%}; all places free: "
        f"{'yes' if found['places_free'] else 'NO'}; finished its stream when told to end: "
        f"{'yes' if found['finished_when_told'] else 'NO'}"
    )
    console().print(table)
    if "peer_failed" in found:
        console(stderr=True).print(f"without transformers serve: {found['peer_failed']}")
    if not rows:
        return
    table = Table(title="The same greedy requests, in turns")
    for heading in ("clients", "isthmus tokens/s", "transformers tokens/s", "speed-up"):
        table.add_column(heading, justify="right")
    table.add_column("first text p50 s, isthmus / transformers", justify="right")
    for (clients, _, mine), (_, _, other) in zip(rows[::2], rows[1::2], strict=True):
        firsts = [quantiles(t.first_s)["p50"] for t in (mine, other)]
        table.add_row(
            str(clients),
            f"{mine.tokens_per_s:.0f}",
            f"{other.tokens_per_s:.0f}",
            f"{mine.tokens_per_s / max(other.tokens_per_s, 1e-9):.1f}x",
            f"{firsts[0]:.3f} / {firsts[1]:.3f}",
        )
    console().print(table)
