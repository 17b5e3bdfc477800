"""The memory wall: why generating a text takes longer than reading one.

Paper: Gholami, Yao, Kim, Hooper, Mahoney, Keutzer. AI and Memory Wall. 2024. arXiv:2403.14123
Idea: Arithmetic has grown faster than memory, so work with few FLOPs per byte, such as generating
    one token after the other, takes as long as its bytes take and not as long as its FLOPs.
Differs: The paper profiles BERT and GPT-2 on one server CPU; here models of both kinds and of equal
    size are made untrained, counted, predicted from the machine's own measured roof, and timed. The
    trend is fitted to data sheets of one vendor (a table that users may replace), not to the
    paper's. Traffic of fused attention is not told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import transformers as tf

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.model import Model
from isthmus.laws.opcount import Footprint, Work, count
from isthmus.laws.roofline import Roof, measure, roofline
from isthmus.laws.trends import rank_correlation, read_table
from isthmus.models.hub import cache_argument
from isthmus.workbench import untrained
from isthmus.workbench.untrained import encoding, generating

READS = 16
"""The weights are read for one token in so many that are generated, to save time."""


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        memory: Whether bytes take time; off, FLOPs alone do, as if there were no wall.
        dtype: How numbers are stored.
    """

    memory: bool = True
    dtype: str = "float32"


@dataclass(frozen=True)
class Phase:
    """One phase of using a model.

    Attributes:
        work: FLOPs and bytes.
        predicted_s: The least seconds on the machine.
        memory_share: Share of that time in which memory decides.
    """

    work: Work
    predicted_s: float
    memory_share: float


class MemoryWall:
    """Counts what a model does, and predicts how long a machine takes for it.

    Args:
        roof: The machine; see :func:`isthmus.laws.roofline.roof_of`.
        settings: See :class:`Settings`.
    """

    role: ClassVar[str] = "study"

    def __init__(self, roof: Roof, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.roof = roof if self.settings.memory else roof.without_wall()

    def encode(self, model: Any, length: int) -> Phase:
        """Read ``length`` tokens at once, with an encoder or into a decoder's cache.

        Args:
            model: A model of transformers; its weights are not touched.
            length: Tokens T.
        """
        return self._phase(model, length, 0, 1)

    def generate(self, model: Any, new: int, *, cached: int = 1) -> Phase:
        """Write ``new`` tokens one by one after ``cached`` ones.

        A step's work is linear in the tokens before it, so that of all is that of the middle one.
        """
        middle = cached + (new - 1) // 2
        return self._phase(model, 1, middle, new)

    def _phase(self, model: Any, nodes: int, cached: int, times: int) -> Phase:
        with torch.device("meta"):
            twin = type(model)(model.config).to(model.dtype).eval()
        past = {}
        if cached:
            past = {cache_argument(twin): tf.DynamicCache()}
            twin(**_tokens(cached, 0), **past)
        table = count(twin, **_tokens(nodes, cached), **past)
        found = roofline(table, self.roof, self.settings.dtype)
        return Phase(table.total * times, found.total_s * times, found.share("memory"))

    def what_if(self, footprint: Footprint, cached: int = 512) -> dict[str, float]:
        """Predicted speed-up per generated token of changes to a model or its use.

        Args:
            footprint: The model; see :meth:`~isthmus.laws.opcount.Footprint.of`.
            cached: Tokens before the one that is generated.
        """

        def seconds(f: Footprint, **forward: int) -> float:
            work = f.forward(forward.pop("nodes", 1), cached, **forward)
            return self.roof.floor_s(work, self.settings.dtype)

        whole = seconds(footprint)
        bits = 8 * footprint.weight_bytes / footprint.weights
        gains = {
            f"{narrow}-bit weights": seconds(
                replace(footprint, weight_bytes=footprint.weights * narrow / 8)
            )
            for narrow in (16, 8, 4)
            if narrow < bits
        }
        gains["a quarter of the key and value heads"] = seconds(
            replace(footprint, cache_bytes=footprint.cache_bytes / 4)
        )
        gains["batch of 8"] = seconds(footprint, batch=8) / 8
        gains["8 draft tokens that all stand"] = seconds(footprint, nodes=9) / 9
        return {name: whole / changed for name, changed in gains.items()}


def _tokens(nodes: int, cached: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.zeros(1, nodes, dtype=torch.int64, device="meta"),
        "attention_mask": torch.zeros(1, 1, nodes, cached + nodes, device="meta"),
    }


def reading(model: Any, times: int) -> Callable[[], object]:
    """Read every weight ``times`` times and do no more than add it up."""
    weights = [
        p.detach() for p in model.parameters() if p is not model.get_input_embeddings().weight
    ]

    def run() -> None:
        for _ in range(times):
            for weight in weights:
                weight.sum()

    return run


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Read and write with models of equal size, and predict both from the machine's roof.

    Args:
        ruler: The clock.
        scale: ``"small"`` is models of 10M and 85M parameters and 512 tokens; ``"test"`` is far
            smaller.
    """
    small = scale != "test"
    sizes = {"10M": (384, 6), "85M": (768, 12)} if small else {"tiny": (192, 1), "large": (384, 2)}
    length = 512 if small else 32
    large = list(sizes)[-1]
    roof = measure(dtypes=["float32"], budget_s=6.0 if small else 0.2)
    wall, no_wall = MemoryWall(roof), MemoryWall(roof, Settings(memory=False))
    context = 2 * length + 2
    pairs = {
        name: (untrained.encoder(*size, context=context), untrained.decoder(*size, context=context))
        for name, size in sizes.items()
    }
    runs: dict[str, Callable[[], object]] = {}
    predicted: dict[str, tuple[Phase, Phase]] = {}
    targets = {name: Model(model).target for name, (_, model) in pairs.items()}
    for name, (reader, writer) in pairs.items():
        for t in (length // 4, length):
            runs[f"{name} encode {t}"] = encoding(reader, t)
            predicted[f"{name} encode {t}"] = (wall.encode(reader, t), no_wall.encode(reader, t))
        for new, cached in ((length // 32, 1), (length // 8, length)):
            label = f"{name} generate {new} after {cached}"
            runs[label] = generating(targets[name], new, cached)
            predicted[label] = (
                wall.generate(writer, new, cached=cached),
                no_wall.generate(writer, new, cached=cached),
            )
    times = ruler.compare(runs, repeats=3 if small else 1)
    whole = {
        "encode": runs[f"{large} encode {length}"],
        "generate": generating(targets[large], length, 1),
        "read": reading(pairs[large][1], length // READS),
    }
    timed = ruler.compare(whole, repeats=3 if small else 1, warmup=0)

    read, write = predicted[f"{large} encode {length}"][0], wall.generate(pairs[large][1], length)
    blind = no_wall.generate(pairs[large][1], length)
    slower = ratio(timed["generate"], timed["encode"])
    above = ratio(timed["generate"], timed["read"])
    measured_s = timed["generate"].median_s
    seen = [times[name].median_s for name in runs]
    ranks = [rank_correlation([p[i].predicted_s for p in predicted.values()], seen) for i in (0, 1)]
    hardware = read_table()
    intensity = read.work.intensity / write.work.intensity
    right = write.predicted_s / measured_s
    gates = (
        Gate("intensity, encoding over generating", intensity, ">=", 20),
        Gate("time, generating over encoding", slower.median, ">=", 5),
        Gate("predicted over measured time of generating, lower", right, ">=", 0.4),
        Gate("predicted over measured time of generating, upper", right, "<=", 1.2),
        Gate("rank correlation of predicted and measured times", ranks[0], ">=", 0.9),
    )
    status = judge(gates, gates[:2])
    rows = [
        Row(
            "arithmetic intensity",
            "FLOP/byte",
            read.work.intensity,
            write.work.intensity,
            None,
            note=f"baseline: encode {length} tokens at once, {read.work.flops / 1e9:.3g} GFLOP; "
            f"ours: write them one by one, {write.work.flops / 1e9:.3g} GFLOP",
        ),
        Row(
            "time",
            "s",
            timed["encode"].median_s,
            measured_s,
            None,
            note=f"{slower}, model of {large}; predicted {read.predicted_s:.3g} and "
            f"{write.predicted_s:.3g}",
        ),
        Row(
            "predicted over measured time of generating",
            "",
            None,
            right,
            blind.predicted_s / measured_s,
        ),
        Row(
            "time of generating over reading the weights as often",
            "x",
            None,
            above.median / READS,
            None,
            note=f"[{above.low / READS:.2f}, {above.high / READS:.2f}], interleaved",
        ),
        Row("rank correlation over 8 settings", "", None, ranks[0], ranks[1]),
        *(
            Row(
                f"growth in two years, {name}",
                "x",
                paper,
                found.factor,
                None,
                note=f"baseline: the paper's; 95 % interval {found.low:.2f} to {found.high:.2f}",
            )
            for name, paper, found in (
                ("arithmetic", 3.0, hardware["tflop_s"]),
                ("memory bandwidth", 1.6, hardware["memory_gb_s"]),
                ("interconnect", 1.4, hardware["link_gb_s"]),
            )
        ),
    ]
    gains = wall.what_if(Footprint.of(targets[large]), length)
    return Claim(
        slug="memory-wall",
        statement="Writing tokens one by one has far fewer FLOPs per byte than reading them at "
        "once, takes far longer, and takes as long as the machine's memory says.",
        paper_figure="GPT-2 has orders of magnitude lower arithmetic intensity than BERT and runs "
        "longer at similar FLOPs; compute 3.0x, memory 1.6x, interconnect 1.4x in 2 years",
        rows=tuple(rows),
        scale=scale,
        device="cpu",
        status=status,
        reason=""
        if status == "reproduced"
        else "the steps of this target take longer than reading their bytes: "
        f"{1e3 * (measured_s - write.predicted_s) / length:.2g} ms a token on top",
        notes=(
            f"Memory {roof.memory.best / 1e9:.3g} GB/s, spread {roof.memory.spread:.2f}; float32 "
            f"products {roof.peak('float32').best / 1e9:.3g} GFLOP/s; ridge "
            f"{roof.ridge('float32'):.3g} FLOP/byte; {roof.threads} threads.",
            _named("Measured and predicted ms", runs, predicted, times),
            "Off predicts from FLOPs alone.",
            "The weights of the smaller model are read from a cache in part; its predictions take "
            "them from memory all the same.",
            "Predicted gains per token: "
            + ", ".join(f"{n} {g:.2f}x" for n, g in gains.items())
            + ".",
        ),
        gates=gates,
        seeds=(0,),
    )


def _named(
    head: str, runs: Mapping[str, Any], predicted: Mapping[str, Any], times: Mapping[str, Any]
) -> str:
    parts = (
        f"{name} {1e3 * times[name].median_s:.3g} and {1e3 * predicted[name][0].predicted_s:.3g}"
        for name in runs
    )
    return f"{head}: {'; '.join(parts)}."
