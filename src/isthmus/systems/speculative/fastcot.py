"""FastCoT: answer early, from the exact reasoning so far and a glance at the rest of it.

Paper: Zhang, Zhu, Tian, Xiong, Tang, Liu. Fast Chain-of-Thought: A Glance of Future from Parallel
    Decoding Leads to Answers Faster. 2023. arXiv:2311.08263
Idea: Jacobi iteration keeps a window of approximate tokens behind the exact reasoning; when they
    already contain what the answer needs, write the answer from exact and approximate tokens.
Differs: The rule that ends the reasoning is concrete here: an answer marker that stood unchanged in
    the window for ``stable`` rounds, or a budget of rounds. A window shrinks with the room left.
    ``glance=False`` is exact Jacobi decoding.
Lossless: no

    exact r_1..r_n | window a_1..a_c ──one forward──> agreeing prefix becomes exact, rest renewed
                          └ the marker stays put ──> append the trigger, write the answer
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.generation import Generation
from isthmus.decoding.own_loop import BatchStrategy
from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import RoundTrace, Target
from isthmus.workbench import sums
from isthmus.workbench.bench import reference_model


@dataclass(frozen=True)
class Settings:
    """Settings of FastCoT.

    Attributes:
        window: Approximate tokens c; 0 writes one token a round.
        stable: Rounds s that the marker has to stand unchanged in the window.
        max_rounds: Rounds K after which the answer is asked for; None waits.
        answer_tokens: Tokens of the budget that are kept back for the answer.
        marker: Text that begins an answer.
        trigger: Text that asks for one where the window holds no marker.
        glance: The mechanism; off, only exact tokens end the reasoning and the text is greedy.
    """

    window: int = 8
    stable: int = 2
    max_rounds: int | None = None
    answer_tokens: int = 8
    marker: str = sums.ANSWER
    trigger: str = f"\n{sums.ANSWER}"
    glance: bool = True

    def __post_init__(self) -> None:
        if self.window < 0 or self.stable < 1 or self.answer_tokens < 1:
            raise InvalidInputError(
                "FastCoT needs a window of 0 or more, and stable and answer_tokens of at least 1"
            )


class Fastcot(BatchStrategy):
    """Strategy: Jacobi rounds with an early way out.

    Args:
        target: A model that scores chains.
        marker: Tokens that begin an answer.
        trigger: Tokens that ask for one.
        settings: See :class:`Settings`; its texts are not read here.
        end: Token that ends an answer, or None.
        tokenizer: Writes the text of the result, or None.

    Raises:
        InvalidInputError: No marker.
    """

    role: ClassVar[str] = "strategy"
    name = "fastcot"

    def __init__(
        self,
        target: Target,
        marker: Sequence[int],
        trigger: Sequence[int],
        settings: Settings | None = None,
        *,
        end: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        if not marker or not trigger:
            raise InvalidInputError("FastCoT needs a marker and a trigger of at least one token")
        self.target, self.settings = target, settings or Settings()
        self.marker, self.trigger = list(marker), list(trigger)
        self.end, self.tokenizer = end, tokenizer

    @classmethod
    def for_model(cls, model: Any, settings: Settings | None = None) -> Self:
        """Read marker, trigger and end token off a model and its tokenizer.

        Raises:
            InvalidInputError: There is no tokenizer, or it cannot write the marker.
            UnsupportedModelError: The model has an encoder.
        """
        settings = settings or Settings()
        if getattr(model.target, "encoder_decoder", False):
            raise UnsupportedModelError("fastcot is for models without an encoder")
        if model.tokenizer is None:
            raise InvalidInputError("fastcot looks for an answer marker and needs a tokenizer")
        marker, trigger = (
            model.tokenizer.encode(text, add_special_tokens=False)
            for text in (settings.marker, settings.trigger)
        )
        end = model.tokenizer.eos_token_id
        return cls(model.target, marker, trigger, settings, end=end, tokenizer=model.tokenizer)

    @torch.no_grad()
    def generate_batch(
        self,
        prompts: Sequence[torch.Tensor],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Generation]:
        """Decode prompts of any lengths together.

        Args:
            prompts: B prompts, int64 [T_b].
            max_new_tokens: Budget of each.
            temperature: 0: agreement of argmaxes is what makes a token exact.
            seed: Not used; nothing is drawn.

        Raises:
            InvalidInputError: A temperature, an empty prompt, or a target that scores no chains.
        """
        if temperature:
            raise InvalidInputError("fastcot decodes greedily; leave the temperature at 0")
        if not prompts or min(len(p) for p in prompts) < 1 or max_new_tokens < 1:
            raise InvalidInputError("fastcot needs prompts with tokens and a budget of at least 1")
        if self.target.reach == "step":
            raise InvalidInputError("fastcot needs a target that scores several tokens at once")
        start = time.perf_counter()
        device = getattr(self.target, "device", prompts[0].device)
        rows = [_Row(self, p.tolist(), max_new_tokens) for p in prompts]
        session = self.target.session(len(rows))
        if any(len(p) > 1 for p in prompts):
            session.prefill([p[:-1] for p in prompts])
        while not all(row.done for row in rows):
            blocks = [row.block() for row in rows]
            width = max(map(len, blocks))
            tokens = torch.tensor([b + [0] * (width - len(b)) for b in blocks])
            valid = torch.tensor([[i < len(b) for i in range(width)] for b in blocks])
            tree = TokenTree(tokens, chain_topology(width), None if valid.all() else valid)
            said = session.score(tree.to(device)).logits.argmax(-1).tolist()  # [B, N]
            kept = [
                0 if row.done else row.take(block, choice)
                for row, block, choice in zip(rows, blocks, said, strict=True)
            ]
            steps = torch.arange(max(kept))
            path = torch.where(steps < torch.tensor(kept)[:, None], steps, -1)
            session.keep(path.to(device))
        for row in rows:
            row.result.stats.seconds = time.perf_counter() - start
            row.result.lossless = not self.settings.glance
            if self.tokenizer is not None:
                row.result.text = self.tokenizer.decode(row.result.tokens, skip_special_tokens=True)
        return [row.result for row in rows]


@dataclass
class _Row:
    """One prompt: exact tokens, the window behind them, and how long a marker has stood in it."""

    parent: Fastcot
    ids: list[int]
    budget: int
    window: list[int] = field(default_factory=list)
    forced: list[int] | None = None
    seen: tuple[int, int] | None = None  # place of the marker, rounds that it stood there
    answering: bool = False
    done: bool = False
    rounds: int = 0
    result: Generation = field(default_factory=lambda: Generation(drafter="fastcot"))

    def __post_init__(self) -> None:
        self.result.prompt_tokens = len(self.ids)
        self.window = self.filled([])

    @property
    def left(self) -> int:
        """Tokens of the budget that are left."""
        return self.budget - len(self.result.tokens)

    def filled(self, guesses: list[int]) -> list[int]:
        """The window for the next round: guesses, then the latest tokens as a first guess."""
        settings = self.parent.settings
        # the window shrinks as the reasoning nears its budget
        size = min(settings.window, max(0, self.left - 1 - settings.answer_tokens))
        if self.answering:
            size = 0
        text = [*self.ids, *guesses]
        latest = (text * (size // len(text) + 1))[-size:]
        return [*guesses, *latest][:size] if size else []

    def block(self) -> list[int]:
        """The root and what is scored behind it."""
        if self.done:
            return [0]
        return [self.ids[-1], *(self.window if self.forced is None else self.forced)]

    def take(self, block: list[int], said: list[int]) -> int:
        """Use the target's choices at each token of the block; returns tokens to keep cached."""
        drafted = block[1:]
        agreed = len(drafted)
        if self.forced is None:
            wrong = (i for i, token in enumerate(drafted) if token != said[i])
            agreed = next(wrong, agreed)
        new = [*drafted[:agreed], said[agreed]]
        name = "answer" if self.answering else "window"
        self.rounds += not self.answering
        self.emit(new, RoundTrace(name, len(drafted), agreed, len(new)))
        self.forced = None
        if not self.done:
            self.look(said[agreed + 1 : len(block)])
        return agreed + 1

    def emit(self, new: list[int], trace: RoundTrace) -> None:
        """Add exact tokens and end where the budget or the end token says so."""
        end = self.parent.end
        new = new[: self.left]
        if end in new:
            new = new[: new.index(end) + 1]
            self.done, self.result.finish_reason = True, "stop"
        self.ids += new
        self.result.tokens += new
        if not self.done and self.left == 0:
            self.done, self.result.finish_reason = True, "length"
        stats = self.result.stats
        stats.new_tokens, stats.target_forwards = len(self.result.tokens), stats.target_forwards + 1
        stats.drafted, stats.accepted = stats.drafted + trace.nodes, stats.accepted + trace.accepted
        self.result.rounds.append(trace)

    def look(self, guesses: list[int]) -> None:
        """Decide, after a round, whether the reasoning is over (rules i to iii)."""
        settings, marker = self.parent.settings, self.parent.marker
        exact = self.result.tokens
        # (i) the marker is exact
        if not self.answering and find(exact[-settings.window - 1 - len(marker) :], marker) >= 0:
            self.answering = True
        if settings.glance and not self.answering:
            place = find(guesses, marker)
            at = len(exact) + place
            # (iii) it stands in the window where it stood before
            stood = self.seen[1] if self.seen is not None and self.seen[0] == at else 0
            self.seen = None if place < 0 else (at, 1 + stood)
            spent = settings.max_rounds is not None and self.rounds >= settings.max_rounds
            if self.seen is not None and self.seen[1] >= settings.stable:
                self.forced = guesses[: place + len(marker)]
            elif spent or self.left <= settings.answer_tokens + len(self.parent.trigger):
                self.forced = [*guesses, *self.parent.trigger]  # (ii)
            if self.forced is not None and len(self.forced) >= self.left:
                self.forced = None  # no room to answer in
            self.answering = self.answering or self.forced is not None
        self.window = self.filled(guesses)


def find(tokens: Sequence[int], part: Sequence[int]) -> int:
    """Place of the first occurrence of ``part`` in ``tokens``, or -1."""
    size = len(part)
    hits = (i for i in range(len(tokens) - size + 1) if list(tokens[i : i + size]) == list(part))
    return next(hits, -1)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure the paper's claim on worked sums.

    How long a marker has to stand is chosen on training problems: the shortest time that loses no
    more than 2 points there.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 200 problems, ``"test"`` 6.
    """
    count = 200 if scale != "test" else 6
    model = reference_model("sums-l")
    problems = sums.problems(count, seed="fastcot")
    learned = sums.problems(count // 2, "train", seed="fastcot")
    prompts, tried = (
        [torch.tensor(model.tokenizer.encode(p.prompt)) for p in each]
        for each in (problems, learned)
    )

    def arm(settings: Settings, some: Sequence[torch.Tensor] = prompts) -> list[Generation]:
        strategy = Fastcot.for_model(model, settings)
        parts = [some[i : i + 25] for i in range(0, len(some), 25)]
        return [r for part in parts for r in strategy.generate_batch(part, max_new_tokens=120)]

    def right(results: Sequence[Generation], asked: Sequence[sums.Problem] = problems) -> float:
        pairs = zip(asked, results, strict=True)
        return 100 * sum(sums.check_answer(p, r.text) for p, r in pairs) / len(asked)

    def calls(results: Sequence[Generation]) -> float:
        return sum(r.stats.target_forwards for r in results) / count

    greedy = arm(Settings(window=0, glance=False))
    exact = arm(Settings(glance=False))
    times = (2, 3, 4)
    aim = right(arm(Settings(window=0, glance=False), tried), learned) - 2.0
    fine = (t for t in times if right(arm(Settings(stable=t), tried), learned) >= aim)
    chosen = Settings(stable=next(fine, times[-1]))
    sweep = {t: arm(Settings(stable=t)) for t in times}
    ours = sweep[chosen.stable]
    # the fair control: as many rounds of plain reasoning as ours had, then the answer
    thought = [max(1, sum(t.drafter == "window" for t in r.rounds)) for r in ours]
    cut: list[Generation] = [Generation()] * count
    for rounds in set(thought):
        members = [i for i, each in enumerate(thought) if each == rounds]
        limit = replace(chosen, window=0, max_rounds=rounds)
        done = arm(limit, [prompts[i] for i in members])
        for index, result in zip(members, done, strict=True):
            cut[index] = result
    plain = [model.generate(ids, max_new_tokens=120, drafter="none").tokens for ids in prompts[:24]]
    same = sum(a.tokens == b.tokens for a, b in zip(exact, greedy, strict=True))
    own = sum(a == b.tokens for a, b in zip(plain, greedy, strict=False))
    diverged = 100 * sum(a.tokens != b.tokens for a, b in zip(ours, greedy, strict=True)) / count
    few = prompts[: max(3, count // 10)]
    timed = ruler.compare(
        {
            "greedy": lambda: [arm(Settings(window=0, glance=False), [ids]) for ids in few],
            "ours": lambda: [arm(chosen, [ids]) for ids in few],
        },
        repeats=3 if scale != "test" else 1,
    )
    speedup = ratio(timed["greedy"], timed["ours"])
    saved, gap = 1 - calls(ours) / calls(greedy), right(ours) - right(cut)
    gates = (
        Gate("exact mode and greedy write the same", same, "==", count),
        Gate("greedy arm and the engine write the same", own, "==", len(plain)),
        Gate("points of accuracy lost", right(greedy) - right(ours), "<=", 2.0),
        Gate("target calls saved, share", saved, ">=", 0.12),
        Gate("points above greedy cut to the same rounds", gap, ">=", 5.0),
        Gate("calls, glance over exact Jacobi", calls(ours) / calls(exact), "<=", 0.97),
    )
    direction = (
        *gates[:3],
        Gate("target calls saved, direction", saved, ">", 0.0),
        Gate("points above the cut, direction", gap, ">", 0.0),
        Gate("calls over exact Jacobi, direction", calls(ours) / calls(exact), "<", 1.0),
    )
    return Claim(
        slug="fastcot",
        statement="Answering from a glance at approximate reasoning saves 12 % of the target calls "
        "of greedy decoding at 2 points of accuracy, where greedy reasoning cut to as many rounds "
        "loses 5 points more.",
        paper_figure="nearly 20 % less time with a negligible loss (abstract)",
        rows=(
            Row(
                "target calls a problem",
                "calls",
                calls(greedy),
                calls(ours),
                calls(exact),
                note=f"marker unchanged for {chosen.stable} rounds, chosen on training problems",
            ),
            Row(
                "problems solved",
                "%",
                right(greedy),
                right(ours),
                right(exact),
                control=right(cut),
                note="control: greedy cut to the same rounds",
            ),
            *(
                Row(
                    f"problems solved, marker unchanged for {rounds} rounds",
                    "%",
                    right(greedy),
                    right(results),
                    right(exact),
                    note=f"{calls(results):.2f} calls a problem",
                )
                for rounds, results in sweep.items()
            ),
            Row("answers unlike greedy", "%", 0.0, diverged, 100 * (1 - same / count)),
            Row("speed-up over greedy", "x", 1.0, speedup.median, None, note=f"{speedup}"),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            "Off is exact Jacobi decoding: the same window without an early exit; it saves most.",
            "The reference model has read right text only, so what it writes behind a wrong guess "
            "keeps the format of a solution and little of its content.",
        ),
        gates=(*gates, direction[5]),
        seeds=(0,),
    )
