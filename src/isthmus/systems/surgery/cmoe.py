"""CMoE: a dense feed-forward becomes shared and routed experts in minutes, router computed.

Paper: Z. Pei, L. Zou, H. Zhen, X. Yu, W. Liu, S. J. Pan, M. Yuan, B. Yu, "CMoE: Fast Carving of
    Mixture-of-Experts for Efficient LLM Inference", 2025, arXiv:2502.04416
Idea: Units that fire for nearly every token are shared, the rest are clustered by which tokens
    they fire for, and one unit of each cluster tells, computed as it is, whether to call it.
Differs: The unit that stands for an expert is its busiest one; the one nearest to the mean of its
    marks, as the paper has it, is nearly silent where marks are few, and routes no better than
    chance here (a setting brings it back). The short tuning moves all weights of the carved layers
    instead of low-rank additions. A native mixture of transformers has a linear router that is
    fitted to the computed one.

::

    x --normalised--> h = silu(x g) (x u) --10 largest of each token--> marks [tokens, units]
    rate of marks --> the x busiest parts are shared                        (section 4.1)
    marks of the rest --balanced clusters--> z - x experts, one unit for each     (4.2, 4.3)
    y = shared(x) + sum over the k largest of softmax(r): E_e(x),  r_e = abs(silu(x g_e) (x u_e))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.folders import EMBEDDED
from isthmus.models.hub import load_checkpoint
from isthmus.nn.moe import ACTIVATIONS, MoE, Router
from isthmus.nn.routers import AnalyticRouter, OracleRouter, RandomRouter
from isthmus.surgery.base import (
    Change,
    Cost,
    Plan,
    Report,
    Site,
    Steps,
    check_budget,
    fingerprint,
    sites,
)
from isthmus.surgery.calibration import Calibration, Reservoir, TopKMarkers, sequential
from isthmus.surgery.carve import (
    Split,
    Weights,
    balanced_clusters,
    carve,
    carved,
    kept,
    part_size,
    share_out,
    weights_of,
)
from isthmus.surgery.moe_export import Target, fitted
from isthmus.training.drafting import Recipe
from isthmus.training.expert_tuning import tune_layers
from isthmus.workbench import pycode
from isthmus.workbench._training import Recipe as Model
from isthmus.workbench._training import build
from isthmus.workbench.tokenizer import load_tokenizer

SLUG = "cmoe"
_TOKENS = 2**14  # 8 texts of 2,048, the paper's calibration
_CHOICES = {
    "split": ("activation", "random"),
    "router": ("analytic", "random"),
    "representative": ("busiest", "nearest"),
}


@dataclass(frozen=True)
class Settings:
    """Settings; the defaults are the paper's.

    Attributes:
        parts: Parts z that the hidden units are cut into.
        shared: Parts x that every token passes; half of the active ones when 0.
        markers: Largest units of a token that are marked, K_a.
        normalised: Whether marks are made on inputs and weight rows of unit length; off, on the
            hidden units as they are.
        iterations: Of the clustering.
        representative: ``busiest`` unit of each cluster, or the ``nearest`` one to its mean.
        split: ``activation``, or ``random``: units are dealt out blindly (idea off).
        router: ``analytic``, or ``random`` (idea off).
        seed: Of what is random.
    """

    parts: int = 8
    shared: int = 0
    markers: int = 10
    normalised: bool = True
    iterations: int = 1
    representative: str = "busiest"
    split: str = "activation"
    router: str = "analytic"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("split", "router", "representative"):
            if getattr(self, name) not in _CHOICES[name]:
                right = " or ".join(_CHOICES[name])
                raise InvalidInputError(f"{name} is {right}, not {getattr(self, name)!r}")
        if self.parts < 2 or not 0 <= self.shared < self.parts or self.markers < 1:
            raise InvalidInputError("parts is at least 2, shared below parts, markers at least 1")


class Cmoe:
    """Carves the gated feed-forward layers of a trained model into experts, without training.

    Args:
        settings: See :class:`Settings`.

    Example:
        Units 0 and 1 fire for the first token, 2 and 3 for the second, 4 and 5 for both.

        >>> marks = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
        >>> split = Cmoe(Settings(parts=3)).split(marks, shared=1)
        >>> split.shared.tolist(), split.routed.tolist()
        ([4, 5], [[0, 1], [2, 3]])
    """

    role: ClassVar[str] = "surgery"
    keeps: ClassVar[str] = "hidden units of the feed-forward layers that a token passes"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def numbers(self, budget: float) -> tuple[int, int]:
        """Shared parts x and routed experts of a token k for a budget (k + x = budget z).

        Raises:
            InvalidInputError: The budget is no number of parts, or too few.
        """
        z, x = self.settings.parts, self.settings.shared
        active = round(check_budget(budget, self.keeps) * z)
        least = max(2, x + 1)
        if abs(active - budget * z) > 1e-6 or active < least:
            found = ", ".join(f"{a / z:g}" for a in range(least, z + 1))
            raise InvalidInputError(
                f"a budget of {budget:g} is no number of {z} parts that leaves one to route; "
                f"give one of {found}"
            )
        x = x or active // 2
        return x, active - x

    def marks(self, weights: Weights, x: Tensor) -> Tensor:
        """Which units are among the K_a largest of each token, bool [N, F] (section 4.1).

        Args:
            weights: Of the layer.
            x: Its inputs [N, D].
        """
        assert weights.gate is not None
        gate, up = weights.gate, weights.up
        if self.settings.normalised:
            x, gate, up = (F.normalize(t, dim=-1) for t in (x, gate, up))
        markers, act = TopKMarkers(self.settings.markers), ACTIVATIONS[weights.activation]
        for part in x.split(2048):  # type: ignore[no-untyped-call]
            markers.add(act(F.linear(part, gate)) * F.linear(part, up))
        return markers.markers()

    def split(self, marks: Tensor, shared: int) -> Split:
        """Shared units, and experts whose first unit stands for them (sections 4.1 and 4.2).

        Args:
            marks: bool [N, F].
            shared: Parts that are shared, x.
        """
        s, hidden = self.settings, marks.shape[1]
        experts, size = s.parts - shared, part_size(hidden, s.parts)
        points = marks.float().t()  # [F, N]
        busiest = points.mean(1).argsort(descending=True, stable=True)
        first, rest = busiest[: shared * size].sort().values, busiest[shared * size :]
        if s.split == "random":
            made = share_out(hidden, shared, experts, torch.Generator().manual_seed(s.seed))
            first, routed = made.shared, made.routed
            far = (points[routed] - points[routed].mean(1, keepdim=True)).abs().sum(-1)
            routed = routed.gather(1, far.argsort(dim=1, stable=True))
        else:
            routed = rest[balanced_clusters(points[rest], points[rest[:experts]], s.iterations)]
        if s.representative == "busiest":
            rate = points.mean(1)[routed]
            routed = routed.gather(1, rate.argsort(dim=1, descending=True, stable=True))
        return Split(first, routed)

    def plan(
        self, model: Any, data: Calibration, budget: float, steps: Steps | None = None
    ) -> Plan:
        """Split layer by layer; inputs come from the layers that have been carved before."""
        shared, active = self.numbers(budget)
        steps, found = steps or Steps(), sites(model, "ffn")
        for site in found:
            part_size(site.axes["hidden"], self.settings.parts)
            if weights_of(model, site).gate is None:
                raise UnsupportedModelError(f"{site.path} has no gate; CMoE carves gated layers")
        who = (SLUG, budget, fingerprint(model), data.fingerprint, asdict(self.settings))
        dense = {site.path: model.get_submodule(site.path) for site in found}
        tensors, notes = dict[str, Tensor](), dict[str, Any]()
        try:
            for site in found:

                def make(site: Site = site) -> dict[str, Tensor]:
                    return self._layer(model, site, data, shared, active)

                made = steps.do(site.path, make)
                split = Split(made["shared"].long(), made["routed"].long())
                tensors |= {f"{site.path}/{k}": v for k, v in made.items() if k != "error"}
                notes[site.path] = {"error": float(made["error"])}
                carve(model, site, split, self._router(weights_of(model, site), split, active))
        finally:
            for path, layer in dense.items():
                model.set_submodule(path, layer)
        notes |= {"shared": shared, "active": active, "experts": self.settings.parts - shared}
        return Plan(*who, seed=self.settings.seed, notes=notes, tensors=tensors)

    def apply(self, model: Any, plan: Plan) -> Report:
        """Put experts in the place of every feed-forward layer."""
        plan.check(model, SLUG)
        changes, active = [], plan.notes["active"]
        for site, split in _splits(model, plan):
            before = Cost.of(model.get_submodule(site.path))
            layer = carve(model, site, split, self._router(weights_of(model, site), split, active))
            whole, count = Cost.of(layer), len(split.routed)
            idle = Cost.of(layer.experts).parameters * (count - active) // count
            rows = sum(b.numel() for b in layer.router.buffers() if b.ndim > 1)
            active_ones, products = (n + rows - idle for n in (whole.active, whole.multiply_adds))
            after = Cost(whole.parameters + rows, active_ones, products, whole.bits)
            changes.append(Change(site.path, before, after, plan.notes[site.path]["error"]))
        note = "transformers has no such router; native() fits a linear one"
        return Report(SLUG, tuple(changes), native=False, notes=(note,))

    def native(
        self, model: Any, plan: Plan, data: Calibration, target: Target = "qwen2_moe"
    ) -> Any:
        """A mixture that transformers knows, with linear routers fitted to the computed ones.

        Args:
            model: The dense model.
            plan: Made for it.
            data: Tokens that the routers are fitted on.
            target: As what; see :func:`isthmus.surgery.carve.to_native`.
        """
        plan.check(model, SLUG)
        active, pairs = plan.notes["active"], list(_splits(model, plan))
        routers = [self._router(weights_of(model, at), split, active) for at, split in pairs]
        return fitted(model, [s for _, s in pairs], routers, data, active, target)

    def _router(self, weights: Weights, split: Split, active: int) -> Router:
        if self.settings.router == "random":
            return RandomRouter(len(split.routed), active, seed=self.settings.seed)
        assert weights.gate is not None
        first = split.routed[:, 0]
        return AnalyticRouter(weights.gate[first], weights.up[first], active, weights.activation)

    def _layer(
        self, model: Any, site: Site, data: Calibration, shared: int, active: int
    ) -> dict[str, Tensor]:
        """The split of one layer, and how far its output moves."""
        ((_, made),) = sequential(model, [site], data, lambda: Reservoir(_TOKENS))
        x, weights = made[site.path].rows, weights_of(model, site)
        split = self.split(self.marks(weights, x), shared)
        layer = carved(weights, split, self._router(weights, split, active)).eval()
        with torch.no_grad():
            wanted = model.get_submodule(site.path)(x)
            error = (layer(x) - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)
        return {"shared": split.shared, "routed": split.routed, "error": error.double()}


def _splits(model: Any, plan: Plan) -> Iterator[tuple[Site, Split]]:
    """The splits of a plan, layer by layer."""
    for site in sites(model, "ffn"):
        parts = (plan.tensors[f"{site.path}/{name}"].long() for name in ("shared", "routed"))
        yield site, Split(*parts)


# the claim --------------------------------------------------------------------------------------


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Two shared and two routed of eight parts of a model of Python code, and a short tuning."""
    small = scale != "test"
    tokenizer = load_tokenizer(EMBEDDED / "pycode-t")
    if small:
        model = load_checkpoint(str(EMBEDDED / "pycode-t"), dtype="float32", device="cpu").model
    else:
        model = build(_TINY).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(0))

    def texts(split: pycode.Split, samples: int, length: int, seed: int = 0) -> Calibration:
        length = length if small else 32
        return Calibration.of_texts(
            pycode.texts(split), tokenizer, samples=samples if small else 4, length=length,
            seed=seed, source=split,
        )  # fmt: skip

    data, held_out = texts("train", 8, 1024), texts("held-out", 32, 512)
    data.check_apart(held_out)
    dense = held_out.loss(model)
    start = ruler.clock()
    plan = Cmoe().plan(model, data, 0.5)
    seconds = ruler.clock() - start

    def applied(made: Plan, settings: Settings | None = None) -> Any:
        changed = copy.deepcopy(model)
        Cmoe(settings).apply(changed, made)
        return changed

    def lost(changed: Any) -> float:
        return held_out.loss(changed) - dense

    def routed(make: Callable[[MoE], Router]) -> float:
        changed = applied(plan)
        for layer in [m for m in changed.modules() if isinstance(m, MoE)]:
            layer.router = make(layer)
        return lost(changed)

    ours = applied(plan)
    rise = {"ours": lost(ours)}
    others = {
        "a quarter active": (Settings(), 0.25),
        "marks not normalised": (Settings(normalised=False), 0.5),
        "the nearest unit stands for an expert": (Settings(representative="nearest"), 0.5),
    }
    for name, (other, budget) in {**others, "random split": (_BLIND, 0.5)}.items():
        rise[name] = lost(applied(Cmoe(other).plan(model, data, budget), other))
    rise["random routing"] = routed(lambda layer: RandomRouter(layer.experts.num_experts, 2))
    rise["oracle"] = routed(lambda layer: OracleRouter(layer.experts, 2))
    pruned = copy.deepcopy(model)
    for site, split in _splits(model, Cmoe(Settings(shared=4)).plan(model, data, 0.625)):
        pruned.set_submodule(site.path, kept(weights_of(model, site), split.shared))
    rise["pruned"] = lost(pruned)
    rise[_NATIVE] = lost(Cmoe().native(model, plan, data))

    # the dense model may learn from more of its own text too: the better of both counts
    more = torch.cat([b["input_ids"] for b in texts("train", 600, 256, seed=1).batches])
    recipe = Recipe(steps=100 if small else 2, batch_size=4, learning_rate=1e-3)
    tuned = copy.deepcopy(model)
    for each in (ours, tuned):
        tune_layers(each, more, recipe)
    after, dense_after = lost(ours), lost(tuned)
    recovered = 1 - (after - min(0.0, dense_after)) / rise["ours"]
    of_split, of_routing = (rise["ours"] / rise[f"random {n}"] for n in ("split", "routing"))
    gates = (
        Gate("loss rise, of a random split's", of_split, "<=", 0.85),
        Gate("loss rise, of random routing's", of_routing, "<=", 0.9),
        Gate("share of the rise that tuning removes", recovered, ">=", 0.6),
    )
    direction = (
        Gate("loss rise, of a random split's", of_split, "<", 1.0),
        Gate("loss rise, of random routing's", of_routing, "<", 1.0),
    )
    return Claim(
        slug=SLUG,
        statement="Half of the feed-forward units, chosen by computed routers among experts that "
        "were clustered by activation, lose less than a random split or random routing, and a "
        "short tuning makes up for most of it.",
        paper_figure="Llama-2-7B carved in under 5 minutes; a quarter active is 1.5 times as fast "
        "and keeps more than 76 % of the accuracy after a short LoRA tuning (abstract)",
        rows=(
            Row("loss rise, half active", "nats a token", rise["pruned"], rise["ours"],
                rise["random split"], ceiling=rise["oracle"], control=rise["random routing"],
                note="baseline: half of the units pruned; off: random split; ceiling: the experts "
                "with the largest outputs; control: random routing"),
            Row("loss rise after tuning", "nats a token", dense_after, after, None,
                note="baseline: the dense model, tuned alike"),
            *(
                Row(f"loss rise, {name}", "nats a token", None, rise[name], None)
                for name in (_NATIVE, *others)
            ),
            Row("planning", "s", None, seconds, None, note=f"{data.tokens} tokens, once"),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        gates=gates,
        seeds=(0,),
        notes=(
            f"pycode-t: {dense:.3f} nats a held-out token; 6 layers of 896 units in 8 parts.",
            f"Tuning: {recipe.steps} steps of {recipe.batch_size} texts of 256 tokens.",
            "A first run had the unit nearest to the mean stand for an expert, as the paper does: "
            "0.364 nats, random routing 0.333. The busiest one, and a tuning that is longer and "
            "faster, were then chosen on training text.",
            "No speed is claimed: small layers gain none on a CPU.",
        ),
    )  # fmt: skip


_BLIND, _NATIVE = Settings(split="random"), "as Qwen 2 MoE, with fitted linear routers"
_TINY = Model(
    name="cmoe-test", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, steps=1,
)  # fmt: skip
