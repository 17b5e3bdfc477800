"""Deep encoder, shallow decoder: where the layers of a translation model should stand.

Paper: J. Kasai, N. Pappas, H. Peng, J. Cross, N. A. Smith, "Deep Encoder, Shallow Decoder:
    Reevaluating Non-autoregressive Machine Translation", 2020, arXiv:2006.10369
Idea: The encoder runs once over the source and the decoder once for every token, so layers that
    are moved from the decoder to the encoder keep the accuracy and multiply the speed.
Differs: A moving average of the weights stands for the average of the last 5 checkpoints, and
    trained models answer greedily where nobody asks for a beam. Mask-predict reads the length of
    a target off the mean of the encoder's states instead of a token of its own, and tries 3
    lengths instead of 5. Teachers are trained here like all else: first a model without a teacher.
    The law of time has one more term than the paper's: decoder layers crowd the processor's cache.

    teacher (6-6) --beam 5--> pairs --> 12 encoder layers, 1 decoder layer
    time = E * c_enc + T * (D * c_dec + D * (D - 1) * c_crowd + c_out)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Status, judge, ratio
from isthmus.claims import Scale as ClaimScale
from isthmus.decoding.fast import best_target
from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError
from isthmus.laws.depth import DepthCost, Run, worst_error
from isthmus.models.encoder_decoder import Config, EncoderDecoder
from isthmus.models.hub import load_checkpoint
from isthmus.models.masked_translation import MaskedTranslation
from isthmus.training.data import Data, Pair
from isthmus.training.loop import Plan, Trainer
from isthmus.training.mask_predict import MaskedLearner, fill_ids, fill_in
from isthmus.training.sequence_distillation import sequence_distillation
from isthmus.training.system import Scale
from isthmus.training.text import PairLearner, padded_ids, translate
from isthmus.training.text_to_text import Translator, translation_config
from isthmus.workbench import dates
from isthmus.workbench.pycode import Split
from isthmus.workbench.trained import trained


@dataclass(frozen=True)
class Settings:
    """Settings of a deep encoder and a shallow decoder; the defaults are the paper's 12-1, base.

    Attributes:
        hidden_size: Width D.
        encoder_layers: Layers of the encoder, E.
        decoder_layers: Layers of the decoder, D.
        shallow: The idea itself; off, both halves have half of the layers, as in 6-6.
        num_attention_heads: Heads.
        intermediate_size: Width inside the feed-forwards.
        vocab_size: Tokens of both languages together.
        dropout: Of sublayers' outputs.
        label_smoothing: Share of the target law that is spread over all tokens.
        max_length: Longest source or target in tokens.
        batch_tokens: Tokens of a micro-batch at most, both sides and padding counted.
        teacher: Folder of a trained translation model whose translations are learnt instead of
            the data's; empty is none.
        beams: Hypotheses of the teacher's search.

    Raises:
        InvalidInputError: A half without a layer.

    Example:
        >>> Settings().depths, Settings(shallow=False).depths
        ((12, 1), (6, 6))
    """

    hidden_size: int = 512
    encoder_layers: int = 12
    decoder_layers: int = 1
    shallow: bool = True
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    vocab_size: int = 32_000
    dropout: float = 0.1
    label_smoothing: float = 0.1
    max_length: int = 512
    batch_tokens: int = 16_384
    teacher: str = ""
    beams: int = 5

    def __post_init__(self) -> None:
        if min(self.depths) < 1:
            raise InvalidInputError(
                f"{self.encoder_layers} encoder and {self.decoder_layers} decoder layers leave a "
                "half without any; give each at least 1"
            )

    @property
    def depths(self) -> tuple[int, int]:
        """Layers of the encoder and of the decoder."""
        if self.shallow:
            return self.encoder_layers, self.decoder_layers
        half = (self.encoder_layers + self.decoder_layers) // 2
        return half, half


_SMALL = Settings(
    hidden_size=128,
    encoder_layers=5,
    num_attention_heads=4,
    intermediate_size=256,
    vocab_size=512,
    dropout=0.0,
    label_smoothing=0.0,
    max_length=128,
    batch_tokens=2048,
)
_NARROW = replace(
    _SMALL, hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=300
)
_PLAN = Plan(1_500, learning_rate=2e-3, betas=(0.9, 0.98), warmup_steps=150, validate_every=500)


class DeepShallow(Translator):
    """A translation model of many encoder layers and few decoder layers."""

    name = "deep-shallow"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            replace(_NARROW, hidden_size=32, encoder_layers=2, batch_tokens=512),
            Plan(6, validate_every=3, learning_rate=2e-3),
            "workbench:dates",
        ),
        "small": Scale(_SMALL, _PLAN, "workbench:dates"),
        "paper": Scale(
            Settings(),
            Plan(
                300_000,
                learning_rate=5e-4,
                betas=(0.9, 0.98),
                schedule="inverse-sqrt",
                warmup_steps=10_000,
                ema=0.9999,
                precision="bf16-mixed",
                validate_every=5_000,
                save_every=1_000,
                log_every=100,
            ),
            "hub:wmt/wmt14:de-en",
        ),
    }

    @classmethod
    def network(cls, settings: Settings, vocab_size: int) -> EncoderDecoder:
        """Random weights."""
        return EncoderDecoder(network_config(settings, vocab_size))

    def learner(self, data: Data[Pair], plan: Plan) -> PairLearner:
        """Cross-entropy of targets: the data's, or what the teacher makes of its sources.

        Raises:
            IsthmusError: The teacher cannot be loaded, or is no encoder-decoder.
        """
        s: Settings = self.settings
        if s.teacher:
            found = load_checkpoint(s.teacher, dtype="float32", device="cpu")
            teacher = Model(best_target(found.model), found.tokenizer)
            longest = s.max_length - 1
            data = sequence_distillation(teacher, data, beams=s.beams, max_new_tokens=longest)
        return super().learner(data, plan)


def network_config(settings: Settings, vocab_size: int) -> Config:
    """What some settings mean, with the layers where they stand in the end."""
    encoder, decoder = settings.depths
    return translation_config(
        replace(settings, shallow=True, encoder_layers=encoder, decoder_layers=decoder), vocab_size
    )


EVEN, DEEP, FLAT = (3, 3), (5, 1), (1, 5)
"""Splits of six layers that are trained."""

PASSES = 4
"""Of mask-predict, t."""


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Accuracy and speed of splits of one depth, all of them distilled, and mask-predict."""
    small = scale != "test"
    name = "small" if small else "test"
    told = _NARROW if small else DeepShallow.scales[name].settings
    plan = DeepShallow.scales[name].plan
    data = _dates(12_000 if small else 60, 1_000 if small else 64)
    sources, wanted = [p.source for p in data.valid], [p.target for p in data.valid]

    def made(settings: Settings, given: Data[Pair], seed: int = 0) -> DeepShallow:
        seeded = replace(plan, seed=seed)
        folder = trained(DeepShallow, name, settings=settings, plan=seeded, data=given)
        return DeepShallow.from_pretrained(folder)

    def exact(said: Sequence[str]) -> float:
        return 100 * sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)

    wide = replace(told, shallow=False, hidden_size=96, num_attention_heads=3)
    teacher = made(wide, data)
    distilled = sequence_distillation(teacher.model, data, beams=told.beams)
    arms: dict[tuple[int, int], DeepShallow] = {}
    found: dict[tuple[int, int], list[float]] = {EVEN: [], DEEP: [], FLAT: []}
    for seed, split in ((0, EVEN), (0, DEEP), (0, FLAT), (1, EVEN), (1, DEEP)):
        settings = replace(told, encoder_layers=split[0], decoder_layers=split[1])
        arm = made(settings, distilled, seed)
        arms.setdefault(split, arm)
        found[split].append(exact(translate(arm.module, arm.tokenizer, sources, 16)))
    tokenizer = arms[DEEP].tokenizer
    off = DeepShallow.network(replace(arms[DEEP].settings, shallow=False), len(tokenizer)).eval()
    right = {split: sum(each) / len(each) for split, each in found.items()}
    masked = _mask_predict(replace(told, shallow=False), tokenizer, plan, distilled)
    filled = exact(fill_in(masked, tokenizer, sources, PASSES))

    contestants = {"even": arms[EVEN].module, "deep": arms[DEEP].module, "off": off}
    per_s, times = {}, {}
    for batch in (1, 64):
        runs = {
            name: _translating(Model(network.to_hf(), tokenizer, fast=False), sources, batch)
            for name, network in contestants.items()
        }
        ids = [padded_ids(tokenizer, sources[i : i + batch], 0) for i in range(0, 64, batch)]
        runs["masked"] = partial(_filling, masked, ids[:8] if batch == 1 else ids)
        times[batch] = ruler.compare(runs, repeats=5 if small else 1)
        count = 8 if batch == 1 else 64
        per_s[batch] = {name: count / t.median_s for name, t in times[batch].items()}
    gain = {b: ratio(times[b]["even"], times[b]["deep"]) for b in times}
    none = ratio(times[1]["even"], times[1]["off"])
    paper, cost, errors, narrow = _depths(ruler, small)

    learnt = min(right[EVEN], right[DEEP])
    lost = right[DEEP] - right[EVEN] if learnt > 90 else None  # else nothing was learnt to compare
    gates = (
        Gate("S1, 5-1 over 3-3", gain[1].median, ">=", 1.4),
        Gate("S1, idea off over 3-3", none.median, "<", 1.2),
        Gate("largest error of the cost model", errors[1], "<=", 0.2),
        Gate("exact answers of the worse arm, %", learnt, ">", 90.0),
        Gate("exact answers, 5-1 less 3-3, points", lost, ">=", -2.0),
    )
    direction = (Gate("S1, 5-1 over 3-3", gain[1].median, ">", 1.0), gates[4])
    status = judge(gates, direction)
    missed = ", ".join(gate.name for gate in gates if not gate.passed)
    each = "; ".join(
        f"{e}-{d}: {', '.join(f'{x:.1f}' for x in found[e, d])}" for e, d in (EVEN, DEEP, FLAT)
    )
    other = f"mask-predict with {PASSES} passes"
    rows = (
        Row(
            "exact answers", "%", right[EVEN], right[DEEP], right[EVEN],
            note=f"by seed: {each}; {other}: {filled:.1f}",
        ),
        *(
            Row(
                name, "sentences/s", per_s[b]["even"], per_s[b]["deep"], per_s[b]["off"],
                note=f"{gain[b]}; {other}: {per_s[b]['masked']:.1f}",
            )
            for b, name in ((1, "S1, module by module"), (64, "Smax, module by module"))
        ),
        Row(
            "S1 of 13 M weights, compiled forward", "tokens/s", paper[0], paper[1], paper[0],
            note=f"12-1 over 6-6: {paper[2]}",
        ),
        Row(
            "largest error of the cost model", "share", errors[0], errors[1], None,
            note="baseline: the paper's three costs, from 1-1, 6-1 and 1-6; ours: from 1-3 as "
            "well, with a cost for crowding; on 12-1, 6-6, 3-3, 6-2 and 4-4, which neither has "
            "seen",
        ),
    )  # fmt: skip
    return Claim(
        slug="deep-shallow",
        statement="With six layers in all, five in the encoder and one in the decoder translate as "
        "exactly as three and three, and one sentence at a time much faster.",
        paper_figure="12-1 has the BLEU of 6-6 (28.3 on WMT14 en-de) at 2.5 times S1 and 1.4 times "
        "Smax (WMT14 distilled; figures not checked against the paper)",
        rows=rows,
        scale=scale,
        device="cpu",
        status=status,
        reason="" if status is Status.REPRODUCED else f"missed: {missed}",
        gates=gates,
        seeds=(0, 1),
        notes=(
            "All arms learn what the beam of one 3-3 teacher, 96 wide, makes of 12 000 dates in "
            "three languages; they are 64 wide.",
            f"Compiled, layers of 64 cost less than the loop around them: 5-1 over 3-3 is "
            f"{narrow} there.",
            "Costs at 256 wide, compiled, one sentence of 24 tokens: an encoder layer "
            f"{1e3 * cost.encoder_s:.3f} ms; a token {1e3 * cost.decoder_s:.3f} ms a decoder "
            f"layer, {1e3 * cost.crowding_s:.3f} ms more for each other one, and "
            f"{1e3 * cost.output_s:.3f} ms besides (vocabulary 8000), which is "
            f"{cost.output_share(12, 1, 32):.0%} of the time of 12-1.",
            "A first look had the paper's three costs alone, which were off by 0.34 at 3-3: a "
            "layer of a deep decoder costs more than that of a shallow one, whose weights stay in "
            "the cache. The term for it, one more run, two more splits to predict and nine "
            "repeats instead of five came after it.",
        ),
    )


def _dates(train: int, valid: int) -> Data[Pair]:
    """Dates in three languages and their ISO form."""

    def pairs(count: int, split: Split) -> list[Pair]:
        drawn = dates.examples(count, split, seed="deep-shallow", languages=("en", "de", "fr"))
        return [Pair(e.source, e.target) for e in drawn]

    return Data(pairs(train, "train"), pairs(valid, "held-out"), "dates in three languages")


def _mask_predict(
    settings: Settings, tokenizer: Any, plan: Plan, data: Data[Pair]
) -> MaskedTranslation:
    """A mask-predict model, trained as the others are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        network = MaskedTranslation(network_config(settings, len(tokenizer)))
    learner = MaskedLearner(
        network,
        tokenizer,
        data,
        {"system": "mask-predict", "settings": asdict(settings)},
        steps=PASSES,
        tokens=settings.batch_tokens,
        label_smoothing=settings.label_smoothing,
    )
    Trainer(learner, plan).run()
    return network.eval()


def _translating(
    model: Model, sources: Sequence[str] | Sequence[torch.Tensor], batch: int, new: int = 11
) -> Callable[[], object]:
    """Translate 8 sentences one by one, or 64 at once; all get as many tokens as a date has."""
    some = list(sources[: 8 if batch == 1 else 64])

    def run() -> None:
        for start in range(0, len(some), batch):
            model.generate(
                some[start : start + batch], max_new_tokens=new, drafter="none", ignore_end=True
            )

    return run


@torch.no_grad()
def _filling(network: MaskedTranslation, batches: Sequence[torch.Tensor]) -> None:
    for source in batches:
        fill_ids(network, source, PASSES)


def _depths(
    ruler: Ruler, small: bool
) -> tuple[tuple[float, float, Any], DepthCost, tuple[float, float], Any]:
    """Random networks through the compiled forward, one sentence at a time.

    Returns:
        Tokens a second of 6-6 and of 12-1 and their ratio; the costs that 1-1, 6-1, 1-6 and 1-3
        say; the largest error of what the first three and all four of these predict for other
        splits; and 5-1 over 3-3 at 64 wide.
    """
    fitted = (1, 1), (6, 1), (1, 6), (1, 3)
    others = (12, 1), (6, 6), (3, 3), (6, 2), (4, 4)
    new, length, count = (32, 24, 8) if small else (4, 8, 8)
    generator = torch.Generator().manual_seed(0)
    sources = list(torch.randint(2, 300, (count, length), generator=generator))

    def runs(splits: Sequence[tuple[int, int]], width: int, vocab: int) -> dict[str, Any]:
        models = {}
        for e, d in splits:
            settings = replace(
                _SMALL, encoder_layers=e, decoder_layers=d, hidden_size=width,
                num_attention_heads=width // 32, intermediate_size=4 * width,
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = DeepShallow.network(settings, vocab).eval()
            models[f"{e}-{d}"] = Model(best_target(network.to_hf()))
        return {name: _translating(m, sources, 1, new) for name, m in models.items()}

    repeats = 9 if small else 1
    times = ruler.compare(runs((*fitted, *others), 256, 8_000 if small else 512), repeats=repeats)

    def measured(splits: Sequence[tuple[int, int]]) -> list[Run]:
        return [Run(e, d, new, times[f"{e}-{d}"].median_s / count) for e, d in splits]

    cost, plain = DepthCost.fit(measured(fitted)), DepthCost.fit(measured(fitted[:3]))
    errors = worst_error(plain, measured(others)), worst_error(cost, measured(others))
    paper = ratio(times["6-6"], times["12-1"])
    speeds = [new * count / times[name].median_s for name in ("6-6", "12-1")]
    narrow = ruler.compare(runs((EVEN, DEEP), 64, 300), repeats=repeats)
    wins = ratio(narrow["3-3"], narrow["5-1"])
    return (speeds[0], speeds[1], paper), cost, errors, wins
