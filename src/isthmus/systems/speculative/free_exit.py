"""FREE: tokens that leave early wait on a stack, and their deep states are computed together.

Paper: Bae, Ko, Song, Yun. Fast and Robust Early-Exiting Framework for Autoregressive Language
    Models with Synchronized Parallel Decoding. 2023. arXiv:2310.05424
Idea: One shallow exit; a confident token is written there and its shallow state is stacked. The
    first token that is not confident runs the deep layers on the whole stack at once, so no deep
    state is copied or missing, and the comparison tunes the threshold.
Differs: For decoders built like BART or mBART. The exit's
    distillation and both losses are the paper's. ``mode="exact"`` is added: the stack is a draft,
    and its first disagreement is taken back, so the text is the full model's. ``mode="copy"`` is
    the state copying of CALM, for comparison.
Lossless: no

    token ──L_S layers──> confident? ──yes──> write it, push its state
                              └──no──> L - L_S layers on [stack, state] ──> write, compare, clear
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.confidence import Calibrator
from isthmus.decoding.generation import Generation
from isthmus.decoding.split import SplitDecoder, SplitSession
from isthmus.errors import InvalidInputError
from isthmus.roles import RoundTrace
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import IGNORED, tune
from isthmus.workbench import dates
from isthmus.workbench.bench import reference_model

Mode = Literal["free", "exact", "copy"]


@dataclass(frozen=True)
class Settings:
    """Settings of FREE, with the paper's defaults.

    Attributes:
        exit_layer: Layers L_S of the shallow part; None takes a third of them.
        threshold: Smallest confidence lambda that leaves early: top-1 minus top-2 probability.
        adaptive: Refit the threshold after each of the first ``sequences`` answers.
        sequences: See ``adaptive``.
        certainty: Share of agreement that the fitted threshold asks for.
        max_stack: Tokens after which the deep layers catch up in any case.
        mode: ``"free"``; ``"exact"`` takes disagreements back; ``"copy"`` copies states.
        exits: The mechanism; off, every token runs through all layers.
    """

    exit_layer: int | None = None
    threshold: float = 0.9
    adaptive: bool = False
    sequences: int = 300
    certainty: float = 0.4
    max_stack: int = 16
    mode: Mode = "free"
    exits: bool = True

    def __post_init__(self) -> None:
        if self.max_stack < 1 or self.mode not in ("free", "exact", "copy"):
            raise InvalidInputError(
                "FREE needs max_stack >= 1 and a mode of 'free', 'exact' or 'copy', got "
                f"{self.max_stack} and {self.mode!r}"
            )


class FreeExit:
    """Strategy: early exits whose deep states are computed in parallel, later.

    Args:
        model: An encoder-decoder of transformers, trained with :func:`loss` to answer early.
        settings: See :class:`Settings`.
        tokenizer: Writes the text of the result, or None.

    Raises:
        UnsupportedModelError: The model cannot be split.
    """

    role: ClassVar[str] = "strategy"
    name = "free-exit"

    def __init__(
        self, model: Any, settings: Settings | None = None, *, tokenizer: Any = None
    ) -> None:
        self.settings = settings or Settings()
        layers = len(getattr(model.get_decoder(), "layers", ())) or 2
        self.split = SplitDecoder(model, self.settings.exit_layer or max(1, layers // 3))
        self.model, self.tokenizer = model, tokenizer
        self.calibrator, self.answers = Calibrator(), 0
        self.threshold = self.settings.threshold if self.settings.exits else math.inf

    @classmethod
    def for_model(cls, model: Any, settings: Settings | None = None) -> Self:
        """The strategy for a loaded model."""
        return cls(model.target.model, settings, tokenizer=model.tokenizer)

    @torch.no_grad()
    def generate(
        self,
        ids: torch.Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Generation:
        """Decode one source, int64 [T].

        ``stats.target_forwards`` counts runs of the deep layers, and the notes the layer calls.

        Raises:
            InvalidInputError: A temperature; confidence is about the likeliest token.
        """
        if temperature or max_new_tokens < 1:
            raise InvalidInputError("free-exit decodes greedily, at least one token")
        begin = time.perf_counter()
        run = _Run(self, self.split.session(ids.to(next(self.model.parameters()).device)))
        result = run.to_the_end(max_new_tokens)
        self.answers += 1
        if (
            self.settings.adaptive
            and self.settings.exits
            and self.answers <= self.settings.sequences
        ):
            self.threshold = self.calibrator.threshold(self.settings.certainty, self.threshold)
        result.stats.seconds = time.perf_counter() - begin
        result.lossless = self.settings.mode == "exact" or not self.settings.exits
        if self.tokenizer is not None:
            result.text = self.tokenizer.decode(result.tokens, skip_special_tokens=True)
        return result


class _Run:
    """One answer: written tokens, and the stack of those that left early."""

    def __init__(self, parent: FreeExit, session: SplitSession) -> None:
        self.parent, self.session = parent, session
        config = parent.model.generation_config
        self.start, self.end = int(config.decoder_start_token_id), config.eos_token_id
        self.tokens: list[int] = []
        self.stack: list[torch.Tensor] = []  # shallow states [1, 1, D]
        self.confidences: list[float] = []
        self.result = Generation(drafter="free-exit", prompt_tokens=session.states.shape[1])

    def to_the_end(self, budget: int) -> Generation:
        """Write until the end token or the budget."""
        settings, session = self.parent.settings, self.session
        exact = settings.mode == "exact"
        while True:
            full = len(self.tokens) >= budget
            if full or self.tokens[-1:] == [self.end]:
                if not (exact and self.stack):
                    break
                self.catch_up()  # the last tokens are drafts too
                continue
            last = self.tokens[-1] if self.tokens else self.start
            hidden = session.shallow(torch.tensor([[last]], device=session.states.device))
            top = torch.softmax(self.parent.split.head(hidden)[0, -1].float(), -1).topk(2)
            confidence = float(top.values[0] - top.values[1])
            if confidence >= self.parent.threshold and len(self.stack) < settings.max_stack:
                self.tokens.append(int(top.indices[0]))
                if settings.mode == "copy":
                    session.copy_up(hidden)
                else:
                    self.stack.append(hidden)
                    self.confidences.append(confidence)
                self.result.rounds.append(RoundTrace("shallow", 1, 1, 1))
            else:
                self.stack.append(hidden)
                self.catch_up(current=True)
        self.result.tokens = self.tokens
        stats = self.result.stats
        stats.new_tokens = len(self.tokens)
        self.result.finish_reason = "stop" if self.tokens[-1:] == [self.end] else "length"
        self.result.notes.append(
            f"{session.layer_calls} layer calls, {session.layer_tokens} layers of tokens"
        )
        return self.result

    def catch_up(self, *, current: bool = False) -> None:
        """Run the deep layers on the whole stack; with ``current``, its last state is unwritten."""
        states = self.session.deep(torch.cat(self.stack, 1))
        said = self.parent.split.head(states)[0].argmax(-1).tolist()
        waiting = len(self.stack) - current
        written = self.tokens[len(self.tokens) - waiting :] if waiting else []
        calibrator = self.parent.calibrator
        for confidence, mine, deep in zip(self.confidences, written, said, strict=False):
            (calibrator.agreed if mine == deep else calibrator.differed).append(confidence)
        wrong = next((i for i in range(waiting) if said[i] != written[i]), None)
        stats = self.result.stats
        stats.target_forwards += 1
        stats.drafted += waiting
        stats.accepted += waiting if wrong is None else wrong
        if self.parent.settings.mode == "exact" and wrong is not None:
            # the deep layers' token stands instead, and everything after it is forgotten
            keep = len(self.tokens) - waiting + wrong
            self.tokens = [*self.tokens[:keep], said[wrong]]
            self.session.truncate(keep + 1)
        elif current:
            self.tokens.append(said[-1])
        self.result.rounds.append(RoundTrace("deep", waiting, waiting, int(current)))
        self.stack, self.confidences = [], []


def distillation(states: Sequence[torch.Tensor], exit_layer: int, mask: torch.Tensor) -> Any:
    """Mean squared distance of shallow states to deep ones, matched as they lie closest (eq. 2).

    As many deep layers as there are shallow ones are chosen, evenly, and each in turn, from the
    top, takes the closest shallow layer that is not above the last one taken.

    Args:
        states: Hidden states after each decoder layer, L of [B, U, D].
        exit_layer: Shallow layers L_S.
        mask: Places that count, bool [B, U].
    """
    total, count = len(states), exit_layer
    deep = [round(total * (i + 1) / count) - 1 for i in range(count)]
    below, parts = count, []
    for index in reversed(deep):
        teacher = states[index].detach()[mask]
        gaps = [F.mse_loss(states[j][mask], teacher) for j in range(below)]
        nearest = min(range(len(gaps)), key=lambda j: float(gaps[j].detach()))
        parts.append(gaps[nearest])
        below = nearest + 1
    return torch.stack(parts).mean()


def loss(
    split: SplitDecoder, source: torch.Tensor, answers: torch.Tensor, pad: int, start: int
) -> torch.Tensor:
    """Both exits' cross-entropy, weighted by depth, and the distillation (eq. 1 and 2).

    Args:
        split: The model in training.
        source: int64 [B, T], padded with ``pad``.
        answers: int64 [B, U], padded with ``IGNORED``.
        pad: Padding of the source.
        start: Token before an answer.
    """
    before = F.pad(answers.clamp(min=0)[:, :-1], (1, 0), value=start)
    out = split.model(
        input_ids=source,
        attention_mask=(source != pad).long(),
        decoder_input_ids=before,
        output_hidden_states=True,
        use_cache=False,
    )
    states = out.decoder_hidden_states[1:]  # the first is what enters the first layer
    early = split.head(states[split.exit_layer - 1])
    shallow, depth = split.exit_layer, split.num_layers
    both = [F.cross_entropy(x.flatten(0, 1), answers.flatten()) for x in (early, out.logits)]
    weighted = (shallow * both[0] + depth * both[1]) / (shallow + depth)
    kept: torch.Tensor = distillation(states, shallow, answers != IGNORED)
    return weighted + 0.5 * kept


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure the paper's claim on written dates.

    Args:
        ruler: Not used: layer calls decide.
        scale: ``"small"`` tunes on 7,680 dates and decodes 200, ``"test"`` 24 and 4.
    """
    count, steps = (200, 160) if scale != "test" else (4, 2)
    reference: Any = reference_model("dates")
    tokenizer = reference.tokenizer
    pad, start = int(tokenizer.pad_token_id), int(reference.target.start_token)
    network = copy.deepcopy(reference.target.model)
    exit_layer = len(network.get_decoder().layers) // 3
    drawn = dates.examples(48 * steps, "train", seed="free-exit")
    sources = [torch.tensor(tokenizer.encode(e.source)) for e in drawn]
    answers = torch.tensor([tokenizer.encode(e.target) for e in drawn])
    padded = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=pad)
    split = SplitDecoder(network, exit_layer)
    width = padded.shape[1]
    tune(
        network,
        torch.cat([padded, answers], 1),
        lambda rows, _: loss(split, rows[:, :width], rows[:, width:], pad, start),
        Recipe(steps=steps, batch_size=48, learning_rate=5e-4),
    )

    asked = dates.examples(count)
    prompts = [torch.tensor(tokenizer.encode(e.source)) for e in asked]

    def arm(**settings: Any) -> tuple[list[Generation], FreeExit]:
        strategy = FreeExit(network, Settings(**settings), tokenizer=tokenizer)
        return [strategy.generate(ids, max_new_tokens=16) for ids in prompts], strategy

    def right(results: Sequence[Generation]) -> float:
        return (
            100 * sum(dates.check(e, r.text) for e, r in zip(asked, results, strict=True)) / count
        )

    def share(results: Sequence[Generation]) -> float:
        """Layer calls against those of the full model."""
        return calls(results) / calls(full)

    def calls(results: Sequence[Generation]) -> int:
        return sum(int(r.notes[0].split()[0]) for r in results)

    full, _ = arm(exits=False)
    shallow, _ = arm(threshold=-1.0, max_stack=99)
    fixed = {x: arm(threshold=x)[0] for x in (0.3, 0.5, 0.7, 0.9)}
    copied = {x: arm(threshold=x, mode="copy")[0] for x in fixed}
    exact, _ = arm(threshold=0.5, mode="exact")
    adaptive, tuned = arm(adaptive=True)
    good = [x for x in fixed if right(fixed[x]) >= 0.97 * right(full)]
    best = min(good or [0.9], key=lambda x: share(fixed[x]))
    ours = fixed[best]
    same = sum(a.tokens == b.tokens for a, b in zip(exact, full, strict=True))
    later = itertools.islice(zip(adaptive, ours, strict=True), count // 4, None)
    pairs = list(later)  # the threshold needs a few answers to settle
    ratio = calls([a for a, _ in pairs]) / calls([b for _, b in pairs])
    gates = (
        Gate("exact mode and the full model write the same", same, "==", count),
        Gate(
            "accuracy kept, best fixed threshold", right(ours) / max(right(full), 1e-9), ">=", 0.97
        ),
        Gate("layer calls, share of the full model's", share(ours), "<=", 0.75),
        Gate("points above state copying", right(ours) - right(copied[best]), ">=", 0.0),
        Gate("points above leaving always", right(ours) - right(shallow), ">", 0.0),
        Gate("points that the fitted threshold loses", right(ours) - right(adaptive), "<=", 1.0),
        Gate("layer calls, fitted over best fixed threshold", ratio, "<=", 1.03),
    )
    direction = (
        *gates[:2],
        Gate("layer calls, direction", share(ours), "<", 1.0),
        Gate("points above leaving always, direction", right(ours) - right(shallow), ">=", 0.0),
    )
    return Claim(
        slug="free-exit",
        statement="Leaving early with a synchronised stack keeps 97 % of the full model's accuracy "
        "at 75 % of its layer calls or fewer, and a threshold that fits itself does as well.",
        paper_figure="up to about 2x with T5-large and T5-3B at nearly full quality (Fig. 5)",
        rows=(
            Row(
                f"dates right, threshold {best:g}",
                "%",
                right(full),
                right(ours),
                right(full),
                control=right(copied[best]),
                note="control: states copied; off: no exits",
            ),
            *(
                Row(
                    f"layer calls, threshold {x:g}",
                    "share of full",
                    1.0,
                    share(results),
                    1.0,
                    note=f"{right(results):.1f} % right, {right(copied[x]):.1f} % with copies",
                )
                for x, results in fixed.items()
            ),
            Row("layer calls, exact mode", "share of full", 1.0, share(exact), 1.0),
            Row(
                "layer calls, fitted threshold",
                "share of full",
                1.0,
                share(adaptive),
                1.0,
                note=f"{right(adaptive):.1f} % right, threshold {tuned.threshold:.2f}",
            ),
            Row("dates right, leaving always", "%", right(full), right(shallow), None),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=("A layer call runs one decoder layer on one token or on the whole stack.",),
        gates=gates,
        seeds=(0,),
    )
