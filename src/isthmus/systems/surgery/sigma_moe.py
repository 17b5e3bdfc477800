"""sigma-MoE: a mixture of experts that is as good as the dense layer of equal size.

Paper: R. Csordas, K. Irie, J. Schmidhuber, "Approximating Two-Layer Feedforward Networks for
    Efficient Transformers", 2023, arXiv:2310.10837
Idea: A feed-forward layer is a sum over parts of its hidden units. Taking the k parts with the
    largest sigmoid scores, which do not compete, comes near the whole at a share of its compute.
Differs: A pre-norm decoder of bytes with rotary positions instead of Transformer-XL. Product-key
    memories, the paper's third relative, can be trained and are no row of the claim. Top-K keeps
    as many hidden units as the experts would. Expert dropout and the weight of the balance loss at
    paper scale are those of the paper's text as remembered, not checked to the last digit.

    y = sum over e in the k largest of s: s_e W2_e relu(W1_e x),  s = sigmoid(W3 x)  (section 5)
    loss = cross-entropy + gamma sum over e of p_e log p_e,   p = mean of softmax(W3 x)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, judge
from isthmus.claims import Scale as ClaimScale
from isthmus.decoding.model import Model
from isthmus.decoding.patch_target import PatchTarget
from isthmus.errors import InvalidInputError
from isthmus.laws.opcount import count
from isthmus.models.byte_patches import BytePatches, PatchSizes
from isthmus.nn.feed_forward import TopKFeedForward
from isthmus.nn.moe import Experts, MoE, Routed, Router, Routing, routings
from isthmus.nn.product_keys import ProductKeys
from isthmus.nn.routers import SigmoidRouter, SinkhornRouter, SoftmaxRouter, equal_norms
from isthmus.objectives import balance
from isthmus.roles import Loss
from isthmus.signals.tokenizer import END_ID, byte_tokenizer, stream
from isthmus.training.byte_text import ByteLearner
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.system import Answer, Scale, TrainedSystem
from isthmus.workbench.data import data as named_data
from isthmus.workbench.trained import trained

Kind = Literal["sigma", "renormalised", "switch", "s-base", "top-k", "pkm", "dense"]


@dataclass(frozen=True)
class Settings:
    """Settings of sigma-MoE; the defaults are the paper's small model of enwik8.

    ``feed_forward="renormalised"`` switches the idea off: the same layer, whose scores compete in
    a softmax and are renormalised over the chosen.

    Attributes:
        hidden_size: Width D.
        num_layers: Layers.
        num_attention_heads: Heads.
        num_experts: Experts E.
        expert_size: Hidden units of an expert, G; the dense layer has E G.
        top_k: Experts of a token, K.
        feed_forward: ``sigma``; ``renormalised``; ``switch`` (softmax weights as they are, its own
            balance loss and a router without equal norms); ``s-base`` (balanced by transport in
            training, for comparison only: it looks at later bytes there); ``top-k`` (the K G
            largest hidden units of the dense layer); ``pkm`` (product keys with relu scores,
            whose values are as many numbers as the dense layer and of which all heads together
            take K G) or ``dense``.
        balance: Weight of the balance loss, gamma.
        expert_dropout: Share of scores left out in training, delta.
        max_length: Bytes of a piece.
        batch_size: Pieces of a micro-batch.

    Raises:
        InvalidInputError: A value is out of range.
    """

    hidden_size: int = 512
    num_layers: int = 12
    num_attention_heads: int = 8
    num_experts: int = 16
    expert_size: int = 128
    top_k: int = 4
    feed_forward: Kind = "sigma"
    balance: float = 1e-3
    expert_dropout: float = 0.05
    max_length: int = 512
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.feed_forward not in get_args(Kind):
            raise InvalidInputError(
                f"feed_forward must be one of {', '.join(get_args(Kind))}, "
                f"got {self.feed_forward!r}"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise InvalidInputError(
                f"top_k must lie between 1 and num_experts ({self.num_experts}), got {self.top_k}"
            )

    @property
    def units(self) -> int:
        """Hidden units of the dense layer, E G."""
        return self.num_experts * self.expert_size

    @property
    def sizes(self) -> PatchSizes:
        """Those of the decoder: patches of one byte and no local layers."""
        return PatchSizes(
            1, self.hidden_size, self.num_layers, self.num_attention_heads, self.hidden_size, 0, 1,
            max_length=self.max_length, rotary=True,
        )  # fmt: skip


def router(s: Settings) -> Router:
    """The router of a layer (sections 4 and 5)."""
    sizes = (s.hidden_size, s.num_experts, s.top_k)
    if s.feed_forward == "sigma":
        return SigmoidRouter(*sizes, dropout=s.expert_dropout)
    if s.feed_forward == "s-base":
        return SinkhornRouter(*sizes)
    return SoftmaxRouter(*sizes, weights="raw" if s.feed_forward == "switch" else "renormalised")


def feed_forward(s: Settings) -> nn.Module:
    """The feed-forward layer that the settings ask for, with weights as in the dense layer.

    Example:
        >>> layer = feed_forward(Settings(1, 1, 1, num_experts=2, expert_size=1, top_k=1)).eval()
        >>> layer.router.weight.data = torch.tensor([[0.0], [-1.0]])  # s = 1/2 and sigmoid(-3)
        >>> layer.experts.up_proj.data.fill_(1.0)[1] = 9.0
        >>> layer.experts.down_proj.data.fill_(2.0)[1] = 9.0
        >>> layer(torch.tensor([[3.0]])).item()  # 1/2 * 2 relu(1 * 3)
        3.0
    """
    into, out = (math.sqrt(2 / (width * s.num_layers)) for width in (s.hidden_size, s.units))
    if s.feed_forward in ("dense", "top-k"):
        kept = s.units if s.feed_forward == "dense" else s.top_k * s.expert_size
        whole = TopKFeedForward(s.hidden_size, s.units, kept)
        nn.init.normal_(whole.in_proj.weight, std=into)
        nn.init.normal_(whole.out_proj.weight, std=out)
        return whole
    if s.feed_forward == "pkm":
        side, heads = math.isqrt(2 * s.units), s.num_attention_heads
        kept = min(max(s.top_k * s.expert_size // heads, 1), side)
        width = max(s.hidden_size // (2 * heads), 1)
        keys = ProductKeys(s.hidden_size, side, kept, heads=heads, key_size=width, scores="relu")
        nn.init.normal_(keys.values, std=out)
        return keys
    experts = Experts(s.num_experts, s.hidden_size, s.expert_size, "relu", gated=False)
    nn.init.normal_(experts.into, std=into)
    nn.init.normal_(experts.down_proj, std=out)  # by E G, not by G: section 5, "Initialization"
    made = router(s)
    weight = made.get_parameter("weight").data
    nn.init.normal_(weight, std=into)
    if s.feed_forward != "switch":
        equal_norms(weight)
    return MoE(experts, made, allow_noncausal=s.feed_forward == "s-base")


class SigmaMoe(TrainedSystem):
    """Writes text byte by byte.

    Args:
        settings: See :class:`Settings`.
    """

    name = "sigma-moe"
    reads = "texts"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            Settings(16, 1, 2, 4, 8, 2, max_length=32, batch_size=4),
            Plan(6, learning_rate=3e-3, validate_every=3),
            "workbench:pycode-tenth",
        ),
        "small": Scale(
            Settings(128, 3, 4, 8, 64, 2, max_length=128, batch_size=16),
            Plan(1_200, learning_rate=3e-3, warmup_steps=60, betas=(0.9, 0.98), validate_every=300),
            "workbench:pycode",
        ),
        "paper": Scale(
            Settings(),
            Plan(100_000, learning_rate=2.5e-4, clip_norm=0.25, precision="bf16-mixed",
                 validate_every=2_000, save_every=1_000, log_every=100),
            "hub:Salesforce/wikitext:wikitext-103-raw-v1",
        ),
    }  # fmt: skip
    module: BytePatches

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.module = BytePatches(settings.sizes)
        for layer in self.module.global_layers:
            layer.mlp = feed_forward(settings)

    def learner(self, data: Data[str], plan: Plan) -> BalancedLearner:
        """Pieces from anywhere in the texts."""
        return BalancedLearner(self, data, plan.seed)

    @functools.cached_property
    def model(self) -> Model:
        """The network behind the engine."""
        return Model(PatchTarget(self.module.eval(), (END_ID,)), byte_tokenizer())

    def run(self, given: str) -> Answer:
        """Go on with a text, greedily, for half the length that the model knows at most.

        Raises:
            InvalidInputError: The text is empty.
        """
        if not given:
            raise InvalidInputError("the text is empty; give some text to go on with")
        known = self.settings.max_length
        room = max(1, known // 2)
        kept = stream([given])[:-1][-max(1, known - room) :].long()
        found = self.model.generate(kept, max_new_tokens=min(room, known - len(kept)))
        record = {"continuation": found.text, "bytes": len(found.tokens), "read": len(kept)}
        return Answer(given + found.text, record)


class BalancedLearner(ByteLearner):
    """Cross-entropy of bytes and the balance loss of every layer."""

    def loss(self, batch: torch.Tensor) -> Loss:
        """Sum over bytes, in nats, and gamma times the balance losses (section 5)."""
        s: Settings = self.settings
        rule: Callable[[Routed], torch.Tensor] = balance.entropy
        weight = s.balance
        if s.feed_forward == "switch":
            rule, weight = balance.switch, 1e-2  # as Switch has it
        with routings(self.network) as found:
            loss = super().loss(batch)
        if weight and s.feed_forward != "s-base":
            for routed in found.values():
                loss.total = loss.total + weight * loss.weight * rule(routed)
        return loss

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Bits a byte of held-out text, and how evenly experts are used: 1 is even.

        The mean over layers, and the least even layer, which a mean would hide.
        """
        found = super().validate()
        length, device = self.settings.max_length, self.network.head.weight.device
        rows = self.held_out[: len(self.held_out) // length * length].view(-1, length)[:64]
        with routings(self.network) as routed:
            self.network(rows.long().to(device))
        used = [
            balance.usage_entropy(balance.usage([r.routing]))
            for r in routed.values()
            if isinstance(r.routing, Routing)
        ]
        if used:
            found |= {"usage_entropy": sum(used) / len(used), "least_even": min(used)}
        return found


def arms(small: bool) -> dict[str, Settings]:
    """The dense layer, ours, the idea off, Switch, and ours without the balance loss."""
    ours = SigmaMoe.scales["small" if small else "test"].settings
    kinds: tuple[Kind, ...] = ("dense", "sigma", "renormalised", "switch")
    made = {kind: replace(ours, feed_forward=kind) for kind in kinds}
    return made | {"no balance": replace(ours, balance=0.0)}


RATES = (3e-3, 6e-3)
"""Learning rates that each arm may choose from."""


def ffn_flops(settings: Settings, tokens: int = 64) -> float:
    """FLOPs of one feed-forward layer for each token, counted on a forward."""
    layer = feed_forward(settings).eval()
    return count(layer, torch.randn(tokens, settings.hidden_size)).flops / tokens


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Held-out loss at equal parameters and steps, three seeds."""
    del ruler
    small = scale != "test"
    told = SigmaMoe.scales["small"].plan
    texts = named_data("workbench:pycode" if small else "workbench:pycode-tenth", "texts")
    # rates are chosen on texts of their own
    choosing = Data(texts.train[20:], texts.train[:20])
    judging = Data(texts.train[20:], texts.valid)
    seeds, pilot, steps = ((0, 1, 2), 80, 320) if small else ((0,), 2, 4)
    settings = arms(small)

    def learnt(name: str, data: Data[str], rate: float, steps: int, seed: int) -> dict[str, Any]:
        plan = replace(told, steps=steps, learning_rate=rate, warmup_steps=steps // 10, seed=seed)
        plan = replace(plan, validate_every=steps)
        folder = trained(SigmaMoe, settings=settings[name], plan=plan, data=data)
        last: dict[str, Any] = SigmaMoe.from_pretrained(folder).record["validation"][-1]
        return last | {"nats": last["bits_per_byte"] * math.log(2)}

    rates: dict[str, float] = {}
    used: dict[str, list[dict[str, Any]]] = {}
    for name in settings:
        if name == "no balance":
            rates[name] = rates["sigma"]
        else:
            tried = {r: learnt(name, choosing, r, pilot, 7)["nats"] for r in RATES}
            rates[name] = min(tried, key=lambda rate: tried[rate])
        used[name] = [learnt(name, judging, rates[name], steps, seed) for seed in seeds]
    losses = {name: [f["nats"] for f in found] for name, found in used.items()}
    mean = {name: sum(found) / len(found) for name, found in losses.items()}
    even = {
        name: sum(f["usage_entropy"] for f in found) / len(found)
        for name, found in used.items()
        if "usage_entropy" in found[0]
    }
    least = {name: min(f.get("least_even", 1.0) for f in found) for name, found in used.items()}
    sized = {name: settings[name] for name in ("dense", "sigma")}
    flops = {name: ffn_flops(s) for name, s in sized.items()}
    weights = {
        name: sum(p.numel() for p in SigmaMoe(s).module.parameters()) for name, s in sized.items()
    }
    share, size = flops["sigma"] / flops["dense"], weights["sigma"] / weights["dense"]
    against = {name: mean[name] - mean["sigma"] for name in ("renormalised", "switch")}
    better = tuple(
        Gate(f"{name} - ours, nats a byte", gap, ">", 0.0) for name, gap in against.items()
    )
    gates = (
        Gate("ours - dense, nats a byte", mean["sigma"] - mean["dense"], "<=", 0.02),
        *better,
        Gate("FLOPs of the feed-forward, times the dense one's", share, "<=", 0.26),
        Gate("parameters, times the dense model's", size, "<=", 1.01),
        Gate("usage entropy, ours - no balance loss", even["sigma"] - even["no balance"], ">", 0),
    )  # fmt: skip
    spread = {n: ", ".join(f"{v:.4f}" for v in found) for n, found in losses.items()}
    return Claim(
        slug="sigma-moe",
        statement="At equal parameters and steps, a mixture of experts with sigmoid scores that "
        "uses a quarter of its feed-forward comes as low as the dense model, and lower than "
        "softmax routers with as many experts.",
        paper_figure="WikiText-103 and enwik8, 41 to 262 M parameters: as good as the dense model "
        "with 25 % of its feed-forward's FLOPs or less, and better than Switch and S-BASE",
        rows=(
            Row(
                "held-out loss",
                "nats a byte",
                mean["dense"],
                mean["sigma"],
                mean["renormalised"],
                control=mean["switch"],
                note="off: a renormalised softmax; control: Switch; seeds: "
                + "; ".join(f"{n} {s}" for n, s in spread.items()),
            ),
            Row("FLOPs of a feed-forward", "a byte", flops["dense"], flops["sigma"], None),
            Row("parameters", "", weights["dense"], weights["sigma"], None),
            Row(
                "usage entropy over its maximum",
                "",
                None,
                even["sigma"],
                even["no balance"],
                note="off: no balance loss; least even layer of any seed: "
                + "; ".join(f"{n} {least[n]:.3f}" for n in even),
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, better),
        gates=gates,
        seeds=seeds,
        notes=(
            f"{steps} steps of {settings['sigma'].batch_size} pieces of "
            f"{settings['sigma'].max_length} bytes each; rates "
            + ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
            + f", the best of {RATES} after {pilot} steps on texts of their own.",
        ),
    )  # fmt: skip
