"""Information flow routes: the edges that matter to a prediction, from one forward.

Paper: J. Ferrando, E. Voita, "Information Flow Routes: Automatically Interpreting Language Models
    at Scale", 2024, arXiv:2403.00824
Idea: Every value in the residual stream is a sum; how near a term lies to the sum tells its
    importance, so the graph behind a prediction is followed downward without patching anything.
Differs: A bias is a term of its own and no edge. Feed-forwards are one term; their neurons are not
    told apart. Layers that normalise after adding, or that compute attention and feed-forward side
    by side, are refused.

::

    y = sum_j z_j,   proximity(z_j, y) = max(|y|_1 - |y - z_j|_1, eps),   importance = its share

    I_{l-1,t} ──────────────▶ A_{l,t} ──────────────▶ I_{l,t}      residuals
    I_{l-1,s} ──heads, s<=t─▶ A_{l,t} ──▶ M_{l,t} ──▶ I_{l,t}      attention, feed-forward
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.lenses.explanation import Array, Check, Edge, Explanation, Graph, identity, visible
from isthmus.lenses.heads import Heads, cost_without, find_heads
from isthmus.lenses.sites import SiteMap, eager, probe_of
from isthmus.lenses.trace import Intervene, Trace
from isthmus.models.hub import load_checkpoint
from isthmus.workbench import reference
from isthmus.workbench.induction import (
    LONGEST,
    induction_model,
    repeated,
    with_cancelling_heads,
)

_EPS, _ROWS = 1e-5, 16


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        threshold: tau, the least importance of an edge that is followed.
        proximity: Whether importance is nearness to the sum; off, it is the size of the term
            alone, which takes large terms that cancel for important ones.
        renormalise: Whether edges below the threshold are taken out of the sum first.
    """

    threshold: float = 0.04
    proximity: bool = True
    renormalise: bool = False


@dataclass(frozen=True)
class Flow:
    """Importances of one layer, for T tokens; each position's add up to 1 with its bias.

    Attributes:
        heads: Of every head from every token [T, S, H].
        around: Of the residual that goes around attention [T].
        bias: Of attention's bias [T].
        forward: Of the feed-forward [T]; the rest goes around it.
        error: Distance of the summed terms from the value, as a share of the largest.
    """

    heads: Tensor
    around: Tensor
    bias: Tensor
    forward: Tensor
    error: float


class FlowRoutes:
    """Follows what matters from a prediction down to the tokens.

    Args:
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A threshold outside 0 to 1.
    """

    role: ClassVar[str] = "lens"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if not 0 < self.settings.threshold < 1:
            raise InvalidInputError(
                f"the threshold is an importance between 0 and 1, not {self.settings.threshold}"
            )

    def open(self, source: str) -> Model:
        """A decoder-only model: a folder, a hub id, or a reference model; the embedded one."""
        place = reference.locate(source or "pycode-t")
        checkpoint = load_checkpoint(place, dtype="float32", device="cpu")
        return Model(checkpoint.model, checkpoint.tokenizer, fast=False)

    def flows(
        self, model: Any, ids: Tensor, known: tuple[SiteMap, list[Heads]] | None = None
    ) -> list[Flow]:
        """Importances of every layer, from one forward.

        Args:
            model: A model of transformers.
            ids: Tokens [T].
            known: What :meth:`know` said of the model, for several texts.

        Raises:
            UnsupportedModelError: Its layers are of another kind.
        """
        sites, heads = known or self.know(model)
        wanted = {
            name: site
            for name, site in sites.sites().items()
            if name.split(".")[0] in ("resid_pre", "resid_mid", "resid_post", "mlp_out")
        }
        for i, each in enumerate(heads):
            wanted |= {f"pattern.{i}": each.pattern, f"source.{i}": each.source}
        with eager(model), torch.no_grad(), Trace(model, wanted) as seen:
            model(input_ids=ids[None])
        return [self._flow(i, each, seen) for i, each in enumerate(heads)]

    def know(self, model: Any) -> tuple[SiteMap, list[Heads]]:
        """Sites and heads of a model.

        Raises:
            UnsupportedModelError: Its layers are of another kind.
        """
        probe = probe_of(model)
        sites = SiteMap.of(model, probe)
        stack = sites.stacks.get("")
        if stack is None or stack.norm_after or "resid_mid.0" not in stack.sites:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not add attention and then a feed-forward to its "
                "residual stream; give a model built like GPT-2 or Llama"
            )
        return sites, find_heads(model, sites, probe)

    def _flow(self, i: int, heads: Heads, seen: Trace) -> Flow:
        pre, mid, post = (
            seen[f"{name}.{i}"].flatten(0, -2)  # [T, D]; some models fold the batch themselves
            for name in ("resid_pre", "resid_mid", "resid_post")
        )
        found, around, bias, error = [], [], [], 0.0
        for start in range(0, len(mid), _ROWS):
            rows = slice(start, start + _ROWS)
            parts = heads.parts(seen[f"pattern.{i}"], seen[f"source.{i}"], rows)[0]  # [t, S, H, D]
            y, x = mid[rows], pre[rows]
            total = parts.sum((1, 2)) + x + heads.bias
            error = max(error, float((total - y).abs().max() / y.abs().max()))
            flat = torch.cat([parts.flatten(1, 2), x[:, None], heads.bias.expand_as(x)[:, None]], 1)
            share = self._share(flat, y)
            found.append(share[:, :-2].reshape(parts.shape[:3]))
            around.append(share[:, -2])
            bias.append(share[:, -1])
        mlp = seen[f"mlp_out.{i}"].reshape(mid.shape)
        error = max(error, float((mid + mlp - post).abs().max() / post.abs().max()))
        forward = self._share(torch.stack([mlp, mid], 1), post)[:, 0]
        return Flow(torch.cat(found), torch.cat(around), torch.cat(bias), forward, error)

    def _share(self, terms: Tensor, total: Tensor) -> Tensor:
        """Importances [t, J] of terms [t, J, D] of sums [t, D] (equations 3 and 4)."""
        if self.settings.proximity:
            near = total.abs().sum(-1)[:, None] - (total[:, None] - terms).abs().sum(-1)
            weight = near.clamp(min=_EPS) * (terms.abs().sum(-1) > 0)  # no term, no edge
        else:
            weight = terms.abs().sum(-1)
        share = weight / weight.sum(-1, keepdim=True)
        if self.settings.renormalise:
            share = share * (share >= self.settings.threshold)
            share = share / share.sum(-1, keepdim=True).clamp(min=_EPS)
        return share

    def route(self, flows: Sequence[Flow], position: int) -> list[Edge]:
        """Edges above the threshold that lead to a position of the last layer.

        Nodes are ``I0.t`` (embeddings), ``A1.t``, ``M1.t`` and ``I1.t`` and so on; an edge of
        attention carries the numbers of its heads.
        """
        tau, found = self.settings.threshold, []
        frontier = {position}
        for layer in range(len(flows), 0, -1):
            flow, below = flows[layer - 1], set()
            for t in sorted(frontier):
                here = f"{layer}.{t}"
                forward = float(flow.forward[t])
                if 1 - forward > tau:
                    found.append(Edge(f"A{here}", f"I{here}", 1 - forward, "residual"))
                if forward > tau:
                    found.append(Edge(f"M{here}", f"I{here}", forward, "feed-forward"))
                    found.append(Edge(f"A{here}", f"M{here}", forward, "feed-forward"))
                if max(forward, 1 - forward) <= tau:
                    continue
                if float(flow.around[t]) > tau:
                    down = Edge(f"I{layer - 1}.{t}", f"A{here}", float(flow.around[t]), "residual")
                    found.append(down)
                    below.add(t)
                total = flow.heads[t].sum(-1)  # over heads [S]
                for s in torch.nonzero(total > tau).flatten().tolist():
                    by = [(float(v), h) for h, v in enumerate(flow.heads[t, s]) if v > tau / 4]
                    name = "heads " + ", ".join(str(h) for _, h in sorted(by, reverse=True))
                    found.append(Edge(f"I{layer - 1}.{s}", f"A{here}", float(total[s]), name))
                    below.add(s)
            frontier = below
        return found

    def importance(self, flows: Sequence[Flow], position: int) -> Tensor:
        """How much of a prediction goes through each head [L, H].

        All of it arrives at the position; at every node it divides by importance, so what a head
        carries is what arrives where it writes, times its importance there.
        """
        tokens = flows[0].around.shape[0]
        arriving, rows = torch.zeros(tokens).index_fill(0, torch.tensor(position), 1.0), []
        for flow in reversed(flows):
            # Through the feed-forward or around it, all of it comes from after attention.
            carried = arriving[:, None, None] * flow.heads  # [T, S, H]
            rows.append(carried.sum((0, 1)))
            arriving = carried.sum((0, 2)) + arriving * flow.around
        return torch.stack(rows[::-1])

    def explain(self, subject: Model, given: str | Tensor) -> Explanation:
        """The route to the next token that the model would write.

        Raises:
            UnsupportedModelError: Another kind of model.
            MismatchError: Terms do not add up to what the model computed.
        """
        started = time.perf_counter()
        ids, model = subject.encode(given), subject.target.model
        flows = self.flows(model, ids)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, -1]
        words, best = [str(i) for i in ids.tolist()], str(int(logits.argmax()))
        if subject.tokenizer is not None:
            words = subject.tokenizer.convert_ids_to_tokens(ids.tolist())
            best = subject.tokenizer.decode([int(logits.argmax())])
        places = tuple(f"{i} {visible(w)}" for i, w in enumerate(words))
        edges = self.route(flows, len(ids) - 1)
        layers = len(flows)
        numbers = tuple(str(i + 1) for i in range(layers))
        names = ["embeddings"]
        for i in range(1, layers + 1):
            names += [f"attention {i}", f"feed-forward {i}", f"layer {i}"]
        kinds = {"A": 1, "M": 2, "I": 3}
        nodes = {}
        for node in {n for e in edges for n in (e.source, e.target)}:
            layer, t = (int(v) for v in node[1:].split("."))
            nodes[node] = (t, 3 * (layer - 1) + kinds[node[0]] if layer else 0)
        heads = self.importance(flows, len(ids) - 1)
        attended = torch.stack([f.heads[-1].sum(-1) for f in flows])
        rows = [
            {
                "layer": i + 1,
                "head": int(h),
                "importance": float(heads[i, h]),
                "looks at": places[int(flows[i].heads[-1, :, h].argmax())],
            }
            for i, h in _largest(heads, 8)
        ]
        worst = max(flow.error for flow in flows)
        return Explanation(
            method="flow-routes",
            model=identity(model),
            inputs=[f"input: {given}" if isinstance(given, str) else f"tokens: {ids.tolist()}"],
            target=f"the route to {best!r}, edges above {self.settings.threshold:g}",
            arrays={
                "importance of heads on the route": Array(
                    heads.numpy(),
                    ("layer", "head"),
                    (numbers, tuple(str(h) for h in range(heads.shape[1]))),
                ),
                "what the last position takes from each token": Array(
                    attended.numpy(),
                    ("layer", "token"),
                    (numbers, places),
                ),
            },
            tables={"heads": rows},
            checks=[
                Check("terms less the value, of the largest", worst, 1e-4),
                Check("importances less 1", _sums(flows), 1e-4),
            ],
            graph=Graph(dict(sorted(nodes.items())), edges, places, tuple(names)),
            params=asdict(self.settings),
            seconds=time.perf_counter() - started,
        ).require()


def _sums(flows: Sequence[Flow]) -> float:
    """Farthest that a position's importances are from 1."""
    return max(float((f.heads.sum((1, 2)) + f.around + f.bias - 1).abs().max()) for f in flows)


def _largest(heads: Tensor, count: int) -> list[tuple[int, int]]:
    order = heads.flatten().argsort(descending=True)[:count].tolist()
    return [divmod(each, heads.shape[1]) for each in order]


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Routes through a model that repeats sequences, against leaving heads out and patching."""
    small = scale != "test"
    model = induction_model(600 if small else 20)
    lens, off = FlowRoutes(), FlowRoutes(Settings(proximity=False))
    texts, _ = repeated(32 if small else 2, seed=7)
    known = lens.know(model)
    heads = known[1]
    cost = cost_without(model, heads, texts, slice(LONGEST, None))
    costliest = set(_largest(cost, 2))
    last = texts.shape[1] - 2

    def carried(which: FlowRoutes, inside: Any) -> Tensor:
        sites = which.know(inside)
        flows = [which.flows(inside, ids[:-1], sites) for ids in texts]
        return torch.stack([which.importance(each, last) for each in flows]).mean(0)

    planted = with_cancelling_heads(model)
    ours, theirs, ours_planted, theirs_planted = (
        carried(which, inside) for inside in (model, planted) for which in (lens, off)
    )
    agree, agree_off, agree_planted, off_planted = (
        len(costliest & set(_largest(each, 2))) / 2
        for each in (ours, theirs, ours_planted, theirs_planted)
    )
    flows = lens.flows(model, texts[0, :-1])
    sums, worst = _sums(flows), max(f.error for f in flows)
    routes = [
        {
            (e.source, e.target, e.label == "residual")
            for e in FlowRoutes(Settings(threshold=tau)).route(flows, last)
        }
        for tau in (0.1, 0.04, 0.01)
    ]
    nested = [narrow <= wide for narrow, wide in pairwise(routes)]

    def patch() -> None:
        for each in heads:
            for head in range(len(each.out)):
                with torch.no_grad(), Intervene(model, {each.mixed: each.without(head)}):
                    for _ in range(texts.shape[1] - 1):  # a forward for every token
                        model(input_ids=texts[:1, :-1])

    def look() -> None:
        lens.route(lens.flows(model, texts[0, :-1], known), last)

    times = ruler.compare({"look": look, "patch": patch}, repeats=3 if small else 1, warmup=0)
    cheaper = times["look"].median_s / times["patch"].median_s
    gates = (
        Gate("terms less their sum, of the largest", worst, "<=", 1e-4),
        Gate("importances less 1", sums, "<=", 1e-4),
        Gate("two costliest heads that are the route's two largest", agree, "==", 1.0),
        Gate("the same, beside two large heads that cancel", agree_planted, "==", 1.0),
        Gate("the same by size alone", off_planted, "<", 1.0),
        Gate("time, of patching every head and token", cheaper, "<=", 0.05),
        Gate("routes inside those of a lower threshold", sum(nested) / len(nested), "==", 1.0),
    )
    size = "off: size of the term instead of nearness to the sum"
    every = "baseline: a forward for every head and token"
    return Claim(
        slug="flow-routes",
        statement="One forward finds the heads that repeat a sequence, which leaving heads out "
        "one by one finds too, in a small part of the time of patching.",
        paper_figure="about 100 times faster than activation patching, and finds the heads of "
        "known circuits (section 4, read)",
        rows=(
            Row("two costliest heads found", "of 2", None, agree, agree_off, note=size),
            Row("beside two that cancel", "of 2", None, agree_planted, off_planted, note=size),
            Row("time", "s", times["patch"].median_s, times["look"].median_s, None, note=every),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, gates[:2]),
        gates=gates,
        seeds=(0, 7),
        notes=(
            "a head's importance is what of the prediction goes through it; the sum over a route's "
            "edges, tried first, counts a layer once for every position and found 1 of the 2",
            f"cost of leaving out, nats a token: {_grid(cost)}",
            f"carried: {_grid(ours)}; beside two that cancel: {_grid(ours_planted)}; there by size "
            f"alone: {_grid(theirs_planted)}",
        ),
    )


def _grid(values: Tensor) -> str:
    return "; ".join(
        f"layer {i + 1}: " + ", ".join(f"{v:.2f}" for v in row)
        for i, row in enumerate(values.tolist())
    )
