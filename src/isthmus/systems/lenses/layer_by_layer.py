"""Layer by layer: how good every layer's vectors are, and which one to take, without labels.

Paper: O. Skean, M. R. Arefin, D. Zhao, N. Patel, J. Naghiyev, Y. LeCun, R. Shwartz-Ziv, "Layer by
    Layer: Uncovering Hidden Representations in Language Models", 2025, arXiv:2502.02013
Idea: Entropy, curvature and invariance of each layer's vectors tell how well they will serve, so a
    middle layer that embeds better than the last one is found without any label.
Differs: Text models of one stack; no vision models. DiME centres the vectors before it compares
    them, because a language model's share one large direction.

::

    text ──▶ layer 0 ... L, final norm ──mean over tokens──▶ Z_l [N, D]
    prompt entropy, effective rank, curvature: of a text's path     data entropy: of Z_l
    InfoNCE, DiME, LiDAR: of views of the same texts with typing errors ──▶ the layer to take
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from isthmus.lenses import geometry
from isthmus.lenses.explanation import Array, Check, Explanation, identity
from isthmus.lenses.faithfulness import interval
from isthmus.lenses.probe import probe
from isthmus.lenses.sites import TOLERANCE, SiteMap, probe_of
from isthmus.lenses.trace import Site, Trace
from isthmus.models.hub import Checkpoint, load_checkpoint
from isthmus.workbench import labelled, reference

CHOICES = ("dime", "infonce", "last")
_ROWS, _VIEWS = 64, 4


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        choose: What picks the layer: the largest ``"dime"``, the largest ``"infonce"`` (its loss
            is the smallest), or off: ``"last"``, the layer that is taken without looking.
        tokens: Length to which texts are cut for the measures of a path, which depend on it.
        most_tokens: Longest text that is read.
    """

    choose: str = "dime"
    tokens: int = 16
    most_tokens: int = 64


@dataclass(frozen=True)
class Layers:
    """Measures of every layer.

    Attributes:
        names: Of the layers, the embeddings first and the final norm last.
        values: By measure, one number a layer.
        chosen: Number of the layer that the setting picks.
    """

    names: tuple[str, ...]
    values: dict[str, list[float]]
    chosen: int


class LayerByLayer:
    """Measures the layers of a text model.

    Args:
        settings: See :class:`Settings`.

    Raises:
        UnknownNameError: No such choice.
        InvalidInputError: Fewer than three tokens.
    """

    role: ClassVar[str] = "lens"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if self.settings.choose not in CHOICES:
            raise UnknownNameError("way to choose", self.settings.choose, list(CHOICES))
        if min(self.settings.tokens, self.settings.most_tokens) < 3:
            raise InvalidInputError("a path bends only with three tokens or more")

    def open(self, source: str) -> Checkpoint:
        """A decoder-only model: a folder, a hub id, or a reference model; the embedded one."""
        place = reference.locate(source or "pycode-t")
        return load_checkpoint(place, dtype="float32", device="cpu")

    def know(self, model: Any) -> dict[str, Site]:
        """Sites of what every layer hands on, and of the final norm, by the names of the layers.

        Raises:
            UnsupportedModelError: Its layers cannot be told apart, or there are two stacks.
        """
        sites = SiteMap.of(model, probe_of(model))
        if "" not in sites.stacks:
            raise UnsupportedModelError(
                f"{type(model).__name__} has an encoder and a decoder; give a model of one stack"
            )
        found = list(sites.residuals().values())
        names = ["embeddings", *(f"layer {i}" for i in range(1, len(found)))]
        named = dict(zip(names, found, strict=True))
        norm = sites.stacks[""].sites.get("final_norm")
        return named if norm is None else named | {"final norm": norm}

    def vectors(
        self, subject: Checkpoint, texts: Sequence[str], sites: dict[str, Site] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Means over tokens [L, N, D], and measures of paths [L, n] of the n texts long enough.

        Args:
            subject: A model with its tokenizer.
            texts: The texts.
            sites: What :meth:`know` said.
        """
        sites = sites or self.know(subject.model)
        tokenizer, s = subject.tokenizer, self.settings
        ids = [tokenizer(t).input_ids[: s.most_tokens] for t in texts]
        if not ids or min(len(i) for i in ids) == 0:
            raise InvalidInputError("a text has no tokens; leave empty lines out")
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
        width = max(map(len, ids))
        given = torch.zeros(len(ids), width, dtype=torch.int64)
        there = torch.arange(width) < torch.tensor([len(i) for i in ids])[:, None]
        given[there] = torch.tensor([t for row in ids for t in row])
        means: list[Tensor] = []
        paths: dict[str, list[Tensor]] = {name: [] for name in geometry.METRICS}
        for start in range(0, len(order), _ROWS):
            rows = order[start : start + _ROWS]
            wide = len(ids[rows[-1]])
            x, mask = given[rows, :wide], there[rows, :wide]
            with torch.no_grad(), Trace(subject.model, sites) as seen:
                subject.model(input_ids=x, attention_mask=mask.long())
            states = torch.stack([seen[name].view(*x.shape, -1) for name in sites])  # [L, B, T, D]
            total = (states * mask[..., None]).sum(2)
            means.append(total / mask.sum(1)[:, None])
            long = mask.sum(1) >= s.tokens
            if bool(long.any()):
                for name, measure in geometry.METRICS.items():
                    paths[name].append(measure(states[:, long, : s.tokens]))
        back = torch.tensor(order).argsort()
        return torch.cat(means, 1)[:, back], {
            name: torch.cat(each, 1) for name, each in paths.items() if each
        }

    def measure(
        self, subject: Checkpoint, texts: Sequence[str], sites: dict[str, Site] | None = None
    ) -> Layers:
        """Measure every layer on some texts, without labels.

        Raises:
            InvalidInputError: Fewer than two different texts.
        """
        if len(set(texts)) < 2:
            raise InvalidInputError(
                "invariance is measured among texts; give a file or several lines, one text a line"
            )
        sites = sites or self.know(subject.model)
        plain, paths = self.vectors(subject, texts, sites)
        views = torch.stack(
            [
                self.vectors(subject, [labelled.noisy(t, str(v)) for t in texts], sites)[0]
                for v in range(_VIEWS)
            ]
        )  # [V, L, N, D]
        values = {f"{name} of a text": each.mean(1).tolist() for name, each in paths.items()}
        values["entropy of the texts"] = geometry.entropy(plain, share=True).tolist()
        layers = range(len(sites))
        values["infonce"] = [geometry.infonce(views[0, i], views[1, i]) for i in layers]
        values["dime"] = [geometry.dime(views[0, i], views[1, i]) for i in layers]
        values["lidar"] = [geometry.lidar(views[:, i].transpose(0, 1)) for i in layers]
        last = len(sites) - 1
        best = last
        if self.settings.choose != "last":
            best = int(np.argmax(values[self.settings.choose]))
        return Layers(tuple(sites), values, best)

    def explain(self, subject: Checkpoint, given: str) -> Explanation:
        """Measures of every layer on texts: the lines of a file, or of what is given.

        Raises:
            InvalidInputError: Fewer than two texts.
            MismatchError: Padding changes vectors, or the last state is not what the head reads.
        """
        started = time.perf_counter()
        if subject.tokenizer is None:
            raise InvalidInputError(f"{subject.source} has no tokenizer, so it reads no text")
        lines = _lines(given)
        sites = self.know(subject.model)
        found = self.measure(subject, lines, sites)
        together = self.vectors(subject, lines, sites)[0][:, 0]
        alone = self.vectors(subject, lines[:1], sites)[0][:, 0]
        apart = float((together - alone).abs().max() / alone.abs().max())
        head = SiteMap.of(subject.model, probe_of(subject.model)).logits_error or 0.0
        table = [
            {"layer": name, "taken": "yes" if i == found.chosen else ""}
            | {measure: each[i] for measure, each in found.values.items()}
            for i, name in enumerate(found.names)
        ]
        picture = np.array([_spread(each) for each in found.values.values()])
        return Explanation(
            method="layer-by-layer",
            model=identity(subject.model),
            inputs=[f"{len(lines)} texts, the first: {lines[0][:200]}"],
            target=f"take the {found.names[found.chosen]}, by {self.settings.choose} of "
            f"{len(lines)} texts",
            arrays={
                "measures, each from its least to its most": Array(
                    picture, ("measure", "layer"), (tuple(found.values), found.names)
                )
            },
            tables={"layers": table},
            checks=[
                Check("a text alone less beside longer ones, of the largest", apart, 1e-4),
                Check(
                    "logits from the final norm less the model's", head, TOLERANCE[torch.float32]
                ),
            ],
            params=asdict(self.settings),
            seconds=time.perf_counter() - started,
        ).require()


def _lines(given: str) -> list[str]:
    """The texts of a file, or of a text, one a line."""
    text = given
    if "\n" not in given and len(given) < 1000 and Path(given).is_file():
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"{given} cannot be read as UTF-8 text ({error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _spread(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Probe every layer of a small language model of code, and choose one without labels."""
    del ruler  # nothing is timed
    small = scale != "test"
    lens = LayerByLayer()
    subject = lens.open("")
    sites = lens.know(subject.model)
    names, last = tuple(sites), len(sites) - 1
    counts = (600, 200, 300) if small else (60, 30, 30)
    rows, gains, losses, notes = [], [], [], []
    above: list[Tensor] = []
    loss_infonce, correlations = [], []
    for name in labelled.TASKS:
        data = labelled.task(name, counts)
        vectors, _ = lens.vectors(subject, data.texts, sites)
        probed = [probe(vectors[i], data.labels, data.split) for i in range(len(sites))]
        scores = [each.score for each in probed]
        middle = range(1, last - 1)  # neither embeddings, nor the last layer before or after norm
        best_middle = max(middle, key=lambda i: probed[i].validation)
        best = max(range(last + 1), key=lambda i: probed[i].validation)
        unseen = [t for t, part in zip(data.texts, data.split, strict=True) if part != "test"]
        found = lens.measure(subject, unseen[:200], sites)
        other = int(np.argmax(found.values["infonce"]))
        gains.append(scores[best_middle] - scores[last])
        losses.append(scores[best] - scores[found.chosen])
        loss_infonce.append(scores[best] - scores[other])
        above.append(torch.tensor(probed[found.chosen].right).double())
        above[-1] -= torch.tensor(probed[last].right).double()
        correlations.append({m: _correlation(v, scores) for m, v in found.values.items()})
        rows.append(
            Row(
                f"accuracy, {name}",
                "of texts",
                scores[last],
                scores[found.chosen],
                scores[last],
                ceiling=scores[best],
                control=probed[last].majority,
                note=f"baseline and off: the last layer; ours: {names[found.chosen]}, by DiME; "
                f"ceiling: {names[best]}, by validation; control: the commonest label",
            )
        )
        notes.append(f"{name} by layer: " + ", ".join(f"{v:.3f}" for v in scores))
        notes.append(
            f"{name}, DiME by layer: " + ", ".join(f"{v:.2f}" for v in found.values["dime"])
        )
    planted = _planted()
    mean_loss = sum(losses) / len(losses)
    more, low, high = interval(100 * torch.cat(above))
    gates = (
        Gate("measures of planted clouds less what is known", planted, "<=", 1e-6),
        Gate("tasks where the best middle layer gains 2 points", _count(gains), ">=", 3.0),
        Gate("points that the chosen layer loses to the best", 100 * mean_loss, "<=", 2.0),
        Gate("points of the chosen layer above the last", more, ">", 0.0),
        Gate("the same, lower end of 95 % over texts", low, ">", 0.0),
    )
    shared = {}
    for measure in sorted({m for each in correlations for m in each}):
        told = [each[measure] for each in correlations if measure in each]
        shared[measure] = sum(told) / len(told)
    extreme = _extreme(lens, subject, sites)
    return Claim(
        slug="layer-by-layer",
        statement="A middle layer of a language model embeds texts better than its last, and DiME "
        "finds one without labels.",
        paper_figure="a middle layer beats the last by 2 to 16 % on 32 tasks of MTEB (figure 1, "
        "read)",
        rows=tuple(rows),
        scale=scale,
        device="cpu",
        status=judge(gates),
        reason=""
        if gates[1].passed
        else "in a model of six layers no middle layer serves better than the last but for one "
        "task, and there the embeddings, which DiME takes, serve best",
        gates=gates,
        seeds=(0,),
        notes=(
            f"chosen layer above the last: {more:+.2f} points [{low:+.2f}, {high:+.2f}]; the lower "
            "end became a gate after the first run, whose mean alone told little",
            "best middle layer above the last, points: "
            + ", ".join(f"{100 * gain:+.1f}" for gain in gains),
            *notes,
            f"layer of the largest InfoNCE instead: loses {100 * sum(loss_infonce) / 4:.1f} points",
            "correlation with accuracy over layers, mean of the tasks: "
            + ", ".join(f"{m} {v:+.2f}" for m, v in shared.items()),
            extreme,
            "no Mamba of equal size was trained: its scan without a kernel takes hours on a CPU",
        ),
    )


def _count(gains: Sequence[float]) -> float:
    return float(sum(gain >= 0.02 for gain in gains))


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _planted() -> float:
    """Farthest that measures are from what they are known to be of clouds made for it."""
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=draw, dtype=torch.float64))[0]
    line = torch.arange(9.0, dtype=torch.float64)[:, None] * turn[0]
    pairs = [
        (float(geometry.entropy(turn[:12])), float(np.log(12))),
        (float(geometry.entropy(turn[:1].expand(5, -1))), 0.0),
        (float(geometry.effective_rank(turn[:7])), 7.0),
        (float(geometry.entropy(turn[:12], share=True)), 1.0),
        (float(geometry.curvature(line + 3)), 0.0),
    ]
    return max(abs(a - b) for a, b in pairs)


def _extreme(lens: LayerByLayer, subject: Checkpoint, sites: dict[str, Site]) -> str:
    """Entropy of a repeated token and of random tokens, by layer."""
    draw = torch.Generator().manual_seed(0)
    size = lens.settings.tokens
    words = {
        "one token again and again": torch.full((1, size), 100),
        "random tokens": torch.randint(
            300, subject.model.config.vocab_size, (20, size), generator=draw
        ),
    }
    told = []
    for name, ids in words.items():
        with torch.no_grad(), Trace(subject.model, sites) as seen:
            subject.model(input_ids=ids)
        each = [float(geometry.entropy(seen[s], share=True).mean()) for s in sites]
        told.append(f"entropy of {name}: " + ", ".join(f"{v:.2f}" for v in each))
    return "; ".join(told)
