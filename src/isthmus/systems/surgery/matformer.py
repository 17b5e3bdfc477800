"""MatFormer: one transformer whose feed-forward prefixes are models of their own.

Paper: Devvrit, S. Kudugunta, A. Kusupati, T. Dettmers, K. Chen, I. Dhillon, Y. Tsvetkov,
    H. Hajishirzi, S. Kakade, A. Farhadi, P. Jain, "MatFormer: Nested Transformer for Elastic
    Inference", 2023, arXiv:2310.07707
Idea: Each training step lets only a prefix of the hidden units of every feed-forward work, drawn
    anew. Afterwards every prefix is a good layer, and hundreds of models can be cut out by choosing
    one for each layer (Mix'n'Match), none of them trained by itself.
Differs: The decoder is a Llama with a gated feed-forward, so that models of one width load in
    transformers. No vision model and no nested heads. In speculative decoding the small model
    keeps its own attention cache.

::

    d_ff units   [ S | M - S |   L - M   |        XL - L         ]      W_in[:m, :], W_out[:, :m]
    step         draw m from (S, M, L, XL), ordinary loss                          (section 3.2)
    afterwards   layers of S S M M L L ...                                         (section 3.3)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import LlamaConfig, LlamaForCausalLM

from isthmus.claims import Claim, Gate, Row, Ruler, judge
from isthmus.claims import Scale as ClaimScale
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.laws.trends import rank_correlation
from isthmus.models.elastic_decoder import ElasticDecoder
from isthmus.models.hub import load_checkpoint, no_progress_bars
from isthmus.roles import Shape
from isthmus.signals.tokenizer import learn_tokenizer
from isthmus.training.data import Data
from isthmus.training.elastic import NestedLearner, nats
from isthmus.training.loop import Plan
from isthmus.training.system import Answer, Scale, TrainedSystem
from isthmus.workbench.data import data as named_data
from isthmus.workbench.trained import trained
from isthmus.workbench.tuned import answer_together


@dataclass(frozen=True)
class Settings:
    """Settings of a nested decoder.

    Attributes:
        hidden_size: Width D.
        num_layers: Layers.
        num_attention_heads: Heads, each of D / heads channels.
        intermediate_size: Units of the largest feed-forward, d_ff.
        fractions: Granularities, as shares of d_ff; the last one is 1.
        probabilities: How often each is drawn; empty is equally often. All on the last one
            switches the idea off: ordinary training of the largest model.
        joint: Take the mean loss of all granularities in every step instead of drawing one.
        vocab_size: Tokens.
        length: Tokens of a row.
        batch_size: Rows of a micro-batch.

    Raises:
        InvalidInputError: Granularities do not rise to 1 in whole units, or the probabilities are
            not one for each.
    """

    hidden_size: int = 1536
    num_layers: int = 16
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    probabilities: tuple[float, ...] = ()
    joint: bool = False
    vocab_size: int = 256_000
    length: int = 1024
    batch_size: int = 256

    def __post_init__(self) -> None:
        widths = [f * self.intermediate_size for f in self.fractions]
        rising = sorted(set(widths)) == widths and bool(widths) and widths[0] > 0
        if not rising or self.fractions[-1] != 1 or any(w != int(w) for w in widths):
            raise InvalidInputError(
                f"fractions must rise to 1 in whole units of {self.intermediate_size}, "
                f"got {self.fractions}"
            )
        p = self.probabilities
        if p and (len(p) != len(widths) or min(p) < 0 or sum(p) <= 0):
            raise InvalidInputError(
                f"give one probability of 0 or more for each of {len(widths)} fractions, got {p}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Units m_1 < ... < m_g of each granularity."""
        return tuple(int(f * self.intermediate_size) for f in self.fractions)


def staircases(widths: Sequence[int], layers: int) -> list[tuple[int, ...]]:
    """Mix'n'Match by the paper's rule: widths that never fall with depth, by one granularity.

    Args:
        widths: Granularities, rising.
        layers: Layers of the model.

    Returns:
        A width for each layer, smallest model first.

    Example:
        >>> staircases((1, 2, 8), 2)
        [(1, 1), (1, 2), (2, 2), (2, 8), (8, 8)]
    """
    found = [(widths[0],) * layers]
    for small, large in itertools.pairwise(widths):
        found += [(small,) * (layers - n) + (large,) * n for n in range(1, layers + 1)]
    return found


class Matformer(TrainedSystem):
    """A decoder whose feed-forwards are nested.

    Args:
        settings: See :class:`Settings`.
        module: A Llama of transformers with the largest width; made elastic.
        tokenizer: Its tokenizer.
    """

    name = "matformer"
    reads = "texts"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            Settings(32, 2, 2, 32, vocab_size=300, length=32, batch_size=4),
            Plan(8, learning_rate=1e-2, warmup_steps=2, validate_every=4),
            "workbench:pycode-tenth",
        ),
        "small": Scale(
            Settings(96, 4, 3, 384, vocab_size=1024, length=128, batch_size=8),
            Plan(
                1_600,
                optimizer="adamw-scale",
                learning_rate=5e-2,
                warmup_steps=80,
                betas=(0.9, 0.95),
            ),
            "workbench:pycode",
        ),
        "paper": Scale(
            Settings(),
            Plan(40_000, warmup_steps=1_000, precision="bf16-mixed", validate_every=2_000),
            "hub:allenai/c4:en",
        ),
    }
    module: LlamaForCausalLM

    def __init__(self, settings: Settings, module: LlamaForCausalLM, tokenizer: Any) -> None:
        super().__init__(settings)
        self.module, self.tokenizer = module, tokenizer
        self.decoder = ElasticDecoder(module)

    @classmethod
    def untrained(cls, settings: Settings, data: Data[str]) -> Self:
        """A tokenizer learnt from the data, and random weights."""
        tokenizer = learn_tokenizer(data.train, settings.vocab_size)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            max_position_embeddings=8 * settings.length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        return cls(settings, LlamaForCausalLM(config), tokenizer)

    def learner(self, data: Data[str], plan: Plan) -> NestedLearner:
        """Rows of the data, each batch with the granularity that it teaches."""
        s = self.settings
        return NestedLearner(
            self.decoder,
            self.tokenizer,
            data,
            s.widths,
            s.probabilities or [1.0] * len(s.widths),
            joint=s.joint,
            length=s.length,
            batch_size=s.batch_size,
            seed=plan.seed,
            identity={"system": self.name, "settings": asdict(s)},
        )

    def export(self, widths: int | Sequence[int], folder: str | Path) -> None:
        """Write a smaller model and the tokenizer; see :meth:`ElasticDecoder.export`."""
        self.decoder.export(widths, folder)
        self.tokenizer.save_pretrained(folder)

    def drafter(self, widths: int | Sequence[int]) -> ModelDrafter:
        """A smaller model that drafts for the whole one."""
        return ModelDrafter(HubTarget(self.decoder.cut(widths)))

    @functools.cached_property
    def model(self) -> Model:
        """The largest model behind the engine."""
        return Model(self.decoder.cut(self.settings.widths[-1]), self.tokenizer)

    def run(self, given: str) -> Answer:
        """Go on with a text; the smallest granularity drafts, the largest decides."""
        policy = Fixed(self.drafter(self.settings.widths[0]), Shape(4, 4, 1))
        found = self.model.generate(given, max_new_tokens=64, drafter=policy)
        length = found.stats.acceptance_length
        return Answer(found.text, {"tokens": len(found.tokens), "acceptance_length": length})

    def write_files(self, folder: Path) -> None:
        """Write the largest model as a checkpoint of transformers, and the tokenizer."""
        with no_progress_bars():
            self.module.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def read_files(cls, settings: Settings, folder: Path) -> Self:
        """Read them."""
        checkpoint = load_checkpoint(str(folder), dtype="float32", device="cpu")
        return cls(settings, checkpoint.model, checkpoint.tokenizer)


STEPS = {"small": 400, "test": 6}
"""Steps of each model that is trained by itself; the nested one takes them for all of them."""


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """One nested decoder against one decoder of each width, as many steps in all."""
    del ruler
    size = "small" if scale != "test" else "test"
    told = Matformer.scales[size]
    base, steps = told.settings, STEPS[size]
    data = named_data(told.data, "texts")
    # more than these short trainings get through
    data = replace(data, train=data.train[:: 4 if size == "small" else 100])

    def made(settings: Settings, count: int) -> Matformer:
        plan = replace(told.plan, steps=count, warmup_steps=count // 20, validate_every=count)
        return Matformer.from_pretrained(
            trained(Matformer, size, settings=settings, plan=plan, data=data)
        )

    nested = made(base, steps * len(base.widths))
    twins = {
        w: made(replace(base, intermediate_size=w, fractions=(1.0,)), steps) for w in base.widths
    }
    small, large = base.widths[0], base.widths[-1]
    # the sternest control: the smallest model, alone, with all of the steps
    lonely = made(
        replace(base, intermediate_size=small, fractions=(1.0,)), steps * len(base.widths)
    )
    ids = nested.learner(data, told.plan).held_out
    loss = {w: nats(nested.decoder, w, ids) for w in base.widths}
    twin = {w: nats(twins[w].decoder, w, ids) for w in base.widths}
    # with the idea off: prefixes of an ordinary model
    off = {w: nats(twins[large].decoder, w, ids) for w in base.widths}

    stairs = staircases(base.widths, base.num_layers)
    curve = {each: nats(nested.decoder, each, ids) for each in stairs}
    unseen = [each for each in stairs if len(set(each)) > 1]
    order = rank_correlation(map(sum, unseen), (-curve[each] for each in unseen))
    # about as many units in one leap from S to XL, and with the widths falling
    half = base.num_layers // 2
    jump = (small,) * half + (large,) * half
    gentle = min(unseen, key=lambda each: abs(sum(each) - sum(jump)))
    leaps, falls = (nats(nested.decoder, m, ids) for m in (jump, gentle[::-1]))

    count, tokens = (48, 32) if size == "small" else (2, 4)
    prompts = [row[:32] for row in ids[:: max(1, len(ids) // count)][:count]]
    pairs = {
        "nested S, nested XL": (nested, nested),
        "twin S, nested XL": (twins[small], nested),
        "twin S, twin XL": (twins[small], twins[large]),
        "S with all steps, nested XL": (lonely, nested),
    }
    rate: dict[str, float] = {}
    length: dict[str, float] = {}
    same: list[bool] = []
    for name, (drafts, decides) in pairs.items():
        plain = answer_together(decides.model, prompts, "none", max_new_tokens=tokens)
        for n in (1, 4):
            policy = Fixed(drafts.drafter(small), Shape(n, n, 1))
            got = answer_together(decides.model, prompts, policy, max_new_tokens=tokens)
            same += [a == b for a, b in zip(got.tokens, plain.tokens, strict=True)]
            (rate if n == 1 else length)[name] = got.acceptance_length() - (n == 1)
    ours = rate["nested S, nested XL"]
    gain = 100 * (ours - max(v for k, v in rate.items() if k[0] == "t"))

    names = dict(zip(base.widths, ("S", "M", "L", "XL"), strict=True))
    gates = (
        *(
            Gate(f"loss of nested {names[w]} minus its twin's, nats", loss[w] - twin[w], "<=", 0.03)
            for w in base.widths[:-1]
        ),
        Gate("the same of S with the idea off", off[small] - twin[small], ">", 0.03),
        Gate("rank correlation of loss and size, untrained mixes", order, ">=", 0.9),
        Gate("first drafts accepted, over the better of both twins, points", gain, ">=", 3.0),
        Gate("drafted answers that are the plain ones, share", sum(same) / len(same), ">=", 0.98),
    )
    direction = (gates[3], gates[6], *(replace(gates[i], bound=b) for i, b in ((4, 0.5), (5, 0.0))))
    return Claim(
        slug="matformer",
        statement="Sub-models of one nested decoder reach the loss of decoders trained for their "
        "width alone, mixes of widths that were never trained lie in order between them, and the "
        "smallest drafts better for the largest.",
        paper_figure="sub-models of a 2.6B MatLM between 1.5B and 2.6B match independently trained "
        "ones, and drafting with them lowers latency further (abstract)",
        rows=(
            *(
                Row(
                    f"held-out loss, {names[w]}",
                    "nats/token",
                    twin[w],
                    loss[w],
                    off[w],
                    control=nats(lonely.decoder, w, ids) if w == small else None,
                    note="control: alone, with all of the nested model's steps" * (w == small),
                )
                for w in base.widths
            ),
            Row(
                "first drafts of S accepted by XL",
                "share",
                rate["twin S, twin XL"],
                ours,
                None,
                control=rate["S with all steps, nested XL"],
                note="baseline: both twins; control: S alone with all steps, XL nested; the twin "
                f"S for the nested XL: {rate['twin S, nested XL']:.3f}",
            ),
            Row(
                "acceptance length, 4 draft tokens",
                "tokens/forward",
                length["twin S, twin XL"],
                length["nested S, nested XL"],
                None,
                control=length["S with all steps, nested XL"],
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=gates,
        seeds=(told.plan.seed,),
        notes=(
            f"Each twin takes {steps} steps, the nested model {steps * len(base.widths)} with a "
            f"width drawn for each: as much computing in all, {steps} steps of it on each width.",
            "By units in all: " + ", ".join(f"{sum(e)}: {curve[e]:.3f}" for e in stairs) + ".",
            f"{sum(gentle)} units in one small step up: {curve[gentle]:.3f}, down: {falls:.3f}; "
            f"{sum(jump)} units, half the layers S and half XL: {leaps:.3f}.",
            "one seed; speed is not claimed here",
        ),
    )
