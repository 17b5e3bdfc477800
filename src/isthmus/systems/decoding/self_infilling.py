"""Self-infilling: when the next token is unsure, write the ending first, then fill the gap.

Paper: L. Zheng, J. Yuan, Z. Zhang, H. Yang, L. Kong, "Self-Infilling Code Generation", 2023,
    arXiv:2311.17972
Idea: A model that can fill in need not write from left to right. Where it becomes unsure it is made
    to write a definite ending, from a suffix prompt such as ``return``, and then the middle with
    both sides in view.
Differs: Stop strings act inside the law, by forcing the end token, so that rows of a batch may be
    in different phases. The random interruption draws from a hash of the text so far.

    PRE prompt prefix ──unsure──> SUF return suffix ──stop──> MID middle ──> END
                                                       result: prefix middle suffix
"""

from __future__ import annotations

import random
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any, ClassVar, Literal

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.model import Model
from isthmus.decoding.reshape import Walk
from isthmus.errors import InvalidInputError
from isthmus.roles import Stage
from isthmus.signals.infilling import Sentinels, split
from isthmus.workbench import infilling

STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif")
"""What ends the body of a function at the left margin."""


@dataclass(frozen=True)
class Settings:
    """Settings of self-infilling.

    Attributes:
        tau: Interrupt where the likeliest token has less probability; 0 switches the idea off.
        suffix_prompt: How every suffix begins.
        random: Interrupt with probability ``1 - p / (2 tau)`` only.
        rounds: How often a new suffix is written from left to right behind what was filled in, and
            the gap filled again; 0 is a single pass.
        split: What of a suffix the next round keeps: up to its last suffix prompt (``vanilla``),
            the same of the last half of the lines (``extended``), or that half whole (``half``).
        stop: Strings that end a body.
        seed: Of the random interruption.
    """

    tau: float = 0.25
    suffix_prompt: str = "return"
    random: bool = False
    rounds: int = 1
    split: Literal["vanilla", "extended", "half"] = "vanilla"
    stop: tuple[str, ...] = STOPS
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """Where a text is.

    Attributes:
        phase: The part that is being written; ``plain`` where there is no gap to fill.
        tokens: Tokens of that part so far, without those of a prompt.
        due: Tokens that come next whatever the model says.
    """

    phase: Literal["plain", "prefix", "suffix", "middle"]
    tokens: tuple[int, ...] = ()
    due: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a pass has written behind a prompt.

    Attributes:
        text: Prefix, middle and suffix, up to a stop string.
        before: What of it stands before the suffix.
        suffix: The suffix; empty where there was no interruption, or the middle does not meet it.
        interrupted: Whether the ending was written first.
    """

    text: str
    before: str
    suffix: str
    interrupted: bool


class SelfInfilling(Walk[Place]):
    """The phases as a reshape: what may come next follows from the text so far and one threshold.

    Args:
        tokenizer: One with sentinels.
        settings: See :class:`Settings`.

    Raises:
        UnsupportedModelError: The tokenizer has no sentinels.
        InvalidInputError: A setting out of range.
    """

    role: ClassVar[str] = "reshape"
    stage: Stage = "mask"

    def __init__(self, tokenizer: Any, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = given = settings or Settings()
        if not 0 <= given.tau <= 1 or given.rounds < 0 or not given.suffix_prompt:
            raise InvalidInputError(
                f"self-infilling needs 0 <= tau <= 1, rounds >= 0 and a suffix prompt: {given}"
            )
        self.tokenizer, self.marks = tokenizer, Sentinels.of(tokenizer)
        self.suffix_prompt = tuple(self.encode(given.suffix_prompt))

    @classmethod
    def for_model(cls, model: Any, settings: Settings | None = None) -> SelfInfilling:
        """For a loaded model."""
        return cls(model.tokenizer, settings)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text inside a document."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without sentinels and ends."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def start(self, prompt: torch.Tensor) -> Place:
        """The phase that a prompt leads into."""
        ids, marks = prompt.tolist(), self.marks
        if marks.middle in ids:
            return Place("middle")
        if marks.suffix in ids:
            return Place("suffix")
        return Place("prefix" if marks.prefix in ids else "plain")

    def advance(self, state: Place, token: int) -> Place:
        """See :class:`isthmus.decoding.reshape.Walk`."""
        if token == self.marks.suffix:
            return Place("suffix", (), self.suffix_prompt)
        if token == self.marks.middle:
            return Place("middle")
        return Place(state.phase, (*state.tokens, token), state.due[1:])

    def apply(self, states: list[Place], logits: torch.Tensor) -> torch.Tensor:
        """Ban sentinels out of place, and force those that are due, [R, V]."""
        marks, out = self.marks, logits.clone()
        out[:, [marks.prefix, marks.suffix]] = -torch.inf
        for row, state in enumerate(states):
            if state.phase == "suffix":  # its end is that of the text: the middle comes next
                ends = logits[row, [marks.middle, marks.end]].logsumexp(0)
                out[row, marks.middle], out[row, marks.end] = ends, -torch.inf
            else:
                out[row, marks.middle] = -torch.inf
        sure = torch.softmax(out, -1).amax(-1).tolist()
        for row, state in enumerate(states):
            forced = self._forced(state, sure[row])
            if forced is not None:
                out[row] = -torch.inf
                out[row, forced] = 0.0
        return out

    def _forced(self, state: Place, sure: float) -> int | None:
        """The token that is due, if one is."""
        if state.due:
            return state.due[0]
        text = self.decode(state.tokens)
        if any(stop in text for stop in self.settings.stop):
            return self.marks.middle if state.phase == "suffix" else self.marks.end
        if state.phase == "prefix" and self._unsure(state, sure):
            here = self.settings.suffix_prompt in text.rpartition("\n")[2]
            return None if here else self.marks.suffix
        return None

    def _unsure(self, state: Place, sure: float) -> bool:
        given = self.settings
        if sure >= given.tau or not given.random:
            return sure < given.tau
        draw = random.Random(f"{given.seed}/{state.tokens}").random()
        return draw < 1 - sure / (2 * given.tau)

    def ask(self, prompt: str, suffix: str | None = None) -> list[int]:
        """Token ids that begin a pass; with a suffix, the gap is before it from the start."""
        ids = self.encode(prompt)
        if not self.settings.tau:
            return ids  # nothing can interrupt, so it is plain decoding
        after = [] if suffix is None else [self.marks.suffix, *self.encode(suffix)]
        return [self.marks.prefix, *ids, *after]

    def read(self, asked: Sequence[int], written: Sequence[int], prompt: str) -> Answer:
        """What a pass has written, with its parts in their places.

        A middle that runs on into a stop string or out of budget does not meet the suffix, which
        is then left out, as in the authors' code.
        """
        parts = split([*asked, *written], self.marks)
        prefix = self.decode(parts.prefix[len(self.encode(prompt)) :])
        middle, suffix = self.decode(parts.middle), self.decode(parts.suffix)
        met = parts.joined and not any(stop in middle for stop in self.settings.stop)
        if parts.middle and not met:
            suffix = ""
        before = prefix + middle
        text = self._until_stop(before + suffix)
        return Answer(text, before, suffix, bool(parts.suffix))

    def _until_stop(self, text: str) -> str:
        found = [place for stop in self.settings.stop if (place := text.find(stop)) >= 0]
        return text[: min(found)] + "\n" if found else text

    def passes(
        self, model: Model, asked: Sequence[list[int]], prompts: Sequence[str], **options: Any
    ) -> list[Answer]:
        """One pass for every prompt, in one batch.

        Args:
            model: A model that fills in.
            asked: Token ids; see :meth:`ask`.
            prompts: What of them is the prompt.
            options: As for :meth:`isthmus.decoding.model.Model.generate`.
        """
        made = model.generate([torch.tensor(ids) for ids in asked], reshapes=[self], **options)
        return [
            self.read(ids, one.tokens, prompt)
            for ids, one, prompt in zip(asked, made, prompts, strict=True)
        ]

    def complete(self, model: Model, prompts: Sequence[str], **options: Any) -> list[str]:
        """Completions of prompts: a single pass, or as many rounds of the loop as are set.

        Args:
            model: A model that fills in.
            prompts: Texts that end where a function's body begins.
            options: As for :meth:`passes`; the budget is that of each pass.
        """
        asked = [self.ask(prompt) for prompt in prompts]
        found = self.passes(model, asked, prompts, **options)
        for number in range(self.settings.rounds):
            if number:
                found = self.passes(model, asked, prompts, **options)
            kept = [self._kept(answer) for answer in found]
            longer = [p + k for p, k in zip(prompts, kept, strict=True)]
            plain = self.passes(model, [self.encode(t) for t in longer], longer, **options)
            asked = []
            for i, (prompt, answer, new) in enumerate(zip(prompts, found, plain, strict=True)):
                text = self._until_stop(kept[i] + new.text)
                if not degenerate(text, self.settings.suffix_prompt):
                    found[i] = replace(answer, text=text, suffix=new.text)
                suffix = self._next_suffix(found[i])
                asked.append(self.ask(prompt, suffix or self.settings.suffix_prompt))
                if suffix and self.settings.split == "half":
                    asked[-1].append(self.marks.middle)  # the suffix is whole
        return [answer.text for answer in found]

    def _kept(self, answer: Answer) -> str:
        """What a new suffix is written behind; bare line ends would tear tokens apart."""
        if answer.interrupted and answer.suffix:
            return answer.before.rstrip()
        return answer.text.rpartition(self.settings.suffix_prompt)[0].rstrip()

    def _next_suffix(self, answer: Answer) -> str:
        """What the next suffix begins with; nothing where the suffix prompt is not in it."""
        word, suffix = self.settings.suffix_prompt, answer.suffix
        if self.settings.split != "vanilla":
            lines = [line for line in answer.text.split("\n") if line.strip()]
            suffix = "\n".join(lines[len(lines) // 2 :])
        if word not in suffix:
            return ""
        return suffix if self.settings.split == "half" else suffix.rpartition(word)[0] + word


def degenerate(text: str, word: str = "") -> bool:
    """Whether a completion is not worth having: empty, endlessly repeating, or without a word.

    Example:
        >>> degenerate("    pass"), degenerate("    return x + 1", "return"), degenerate("x" * 999)
        (True, False, True)
    """
    if " ".join(text.split()) in ("", "pass", "return") or word not in text:
        return True
    return len(zlib.compress(text.encode())) / len(text.encode()) < 0.1


@dataclass(frozen=True)
class Marks:
    """How completions did: shares, 0 to 1.

    Attributes:
        texts: The completions.
        complete: Parse with their head and end in a return.
        degenerate: Are empty or endless repetition.
        similarity: Ratio of matching characters with the real body.
        interrupted: Were written ending first.
    """

    texts: tuple[str, ...]
    complete: float
    degenerate: float
    similarity: float
    interrupted: float = 0.0

    @classmethod
    def of(cls, asked: Sequence[infilling.Function], texts: Sequence[str]) -> Marks:
        """Mark the completions of some functions."""
        pairs = list(zip(asked, texts, strict=True))
        alike = (SequenceMatcher(None, one.body, text, autojunk=False) for one, text in pairs)
        return cls(
            tuple(texts),
            statistics.fmean(infilling.ends_in_return(one.head + text) for one, text in pairs),
            statistics.fmean(degenerate(text) for text in texts),
            statistics.fmean(each.ratio() for each in alike),
        )


TAUS = (0.15, 0.25, 0.35, 0.5)
"""Thresholds that the claim chooses from, on other functions."""


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Functions that parse and end in a return, from left to right and with the ending first."""
    small = scale != "test"
    if small:
        model = infilling.infilling_model()
    else:
        model = infilling.infilling_model("pycode-t", steps=1, batch_size=1)
    budget = 96 if small else 12
    count = 300 if small else 4
    others, asked = (infilling.returning(part, count) for part in ("train", "held-out"))

    def run(
        settings: Settings, asked: Sequence[infilling.Function] = asked, *, bare: bool = False
    ) -> Marks:
        method = SelfInfilling(model.tokenizer, settings)
        options: dict[str, Any] = {"max_new_tokens": budget, "drafter": "none"}
        prompts = [one.head for one in asked]
        ids = [method.encode(p) if bare else method.ask(p) for p in prompts]
        if settings.rounds:
            return Marks.of(asked, method.complete(model, prompts, **options))
        found = method.passes(model, ids, prompts, **options)
        share = statistics.fmean(answer.interrupted for answer in found)
        return replace(Marks.of(asked, [answer.text for answer in found]), interrupted=share)

    tried = {tau: run(Settings(tau, rounds=0), others).complete for tau in TAUS}
    tau = max(tried, key=lambda tau: tried[tau])
    once, paper = Settings(tau, rounds=0), run(Settings(rounds=0))
    plain = run(once, bare=True)
    ours, off = run(once), run(replace(once, tau=0.0))
    loop = {
        kind: run(Settings(tau, split=kind, rounds=2)) for kind in ("vanilla", "extended", "half")
    }
    loop["one round"] = run(Settings(tau))
    drawn = run(replace(once, random=True))
    differing = sum(a != b for a, b in zip(off.texts, plain.texts, strict=True))
    gain = 100 * (ours.complete - plain.complete)
    gates = (
        Gate("parses and ends in return, points over left to right", gain, ">=", 5),
        Gate("degenerate, points", 100 * (ours.degenerate - plain.degenerate), "<=", 0),
        Gate("edit similarity, points", 100 * (ours.similarity - plain.similarity), ">=", -1),
        Gate("idea off: texts that differ from left to right", differing, "==", 0),
    )
    direction = (Gate("parses and ends in return, points over left to right", gain, ">", 0),)
    documented = sum(one.documented for one in asked)
    told = ", ".join(f"{kind} {100 * marks.complete:.1f}" for kind, marks in loop.items())

    def row(metric: str, read: Callable[[Marks], float]) -> Row:
        base, mine, without, default = (100 * read(m) for m in (plain, ours, off, paper))
        note = "baseline: left to right; control: the paper's tau"
        return Row(metric, "%", base, mine, without, control=default, note=note)

    return Claim(
        slug="self-infilling",
        statement="At an equal budget of new tokens, functions parse and end in a return more "
        "often when an unsure model writes the ending first.",
        paper_figure="better HumanEval, MBPP, DS-1000 and GSM8K with StarCoder and Code Llama",
        rows=(
            row("parses and ends in return", lambda marks: marks.complete),
            row("degenerate", lambda marks: marks.degenerate),
            row("edit similarity to the real body", lambda marks: marks.similarity),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=gates,
        seeds=(0,),
        notes=(
            f"{len(asked)} held-out functions that return a value, {documented} with a docstring; "
            f"greedy, {budget} tokens; {100 * ours.interrupted:.0f} % are interrupted.",
            f"tau is {tau:g}, the best of {', '.join(map(str, TAUS))} on {len(others)} functions "
            f"of the training part; at the paper's 0.25 {100 * paper.interrupted:.0f} % are.",
            f"With the loop, whose passes have that budget each: {told}.",
            f"Random interruption: {100 * drawn.complete:.1f} %.",
        ),
    )
