"""A sparse autoencoder: each vector of a model as a sum of few atoms out of many.

After L. Gao et al., "Scaling and evaluating sparse autoencoders", 2024, arXiv:2406.04093: the k
largest of m codes are kept, so that no penalty has to be weighed, and codes that no longer fire
learn to explain what is left over::

    x [N, D] ──scale──▶ W_e (x - b_d) + b_e ──k largest──▶ z [N, m] ──▶ W_d z + b_d
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isthmus import folders
from isthmus.errors import BrokenFileError, DivergedError, InvalidInputError

_RECORD, _WEIGHTS = "sae.json", "sae.safetensors"
_SAMPLE = 4096
"""Rows that the geometric median is taken of."""


@dataclass(frozen=True)
class SaeRecipe:
    """How a sparse autoencoder is built and trained.

    Attributes:
        atoms: Codes m; 0 for eight times the width.
        active: Codes k that are kept of a vector; all m switch the idea off.
        steps: Steps of Adam; the rate falls to 0 over the last fifth.
        batch_size: Vectors a step.
        learning_rate: Rate.
        dead_after: Vectors without firing after which a code is dead.
        auxiliary: Weight of the loss by which dead codes explain what is left; 0 for none.
        seed: Of the weights and the order of the vectors.

    Raises:
        InvalidInputError: A size is below 1, more codes are kept than there are, or a rate is not
            positive.
    """

    atoms: int = 0
    active: int = 16
    steps: int = 600
    batch_size: int = 512
    learning_rate: float = 1e-3
    dead_after: int = 20_000
    auxiliary: float = 1 / 32
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.active, self.steps, self.batch_size, self.dead_after) < 1 or self.atoms < 0:
            raise InvalidInputError("active, steps, batch_size and dead_after are at least 1")
        if self.atoms and self.active > self.atoms:
            raise InvalidInputError(f"of {self.atoms} codes, {self.active} cannot be kept")
        if not self.learning_rate > 0 or self.auxiliary < 0:
            raise InvalidInputError("a learning rate is above 0, and a weight of a loss not below")


@dataclass(frozen=True)
class Fit:
    """How well an autoencoder stands for vectors.

    Attributes:
        unexplained: Share of their variance that is lost (FVU).
        active: Mean number of codes that are not 0 (L0).
        dead: Share of the codes that never fired.
        firing: Share of the vectors on which each code fired [m].
    """

    unexplained: float
    active: float
    dead: float
    firing: Tensor


class SparseAutoencoder(nn.Module):
    """TopK autoencoder of vectors [..., D].

    Args:
        width: D.
        atoms: m.
        active: k.
        generator: Draws the atoms.

    Raises:
        InvalidInputError: More codes are kept than there are.

    Example:
        >>> sae = SparseAutoencoder(2, 3, 1)
        >>> with torch.no_grad():
        ...     _ = sae.atoms.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        ...     _ = sae.encoder.copy_(sae.atoms)
        >>> sae.encode(torch.tensor([3.0, 2.0])).tolist(), sae(torch.tensor([3.0, 2.0])).tolist()
        ([3.0, 0.0, 0.0], [3.0, 0.0])
    """

    scale: Tensor

    def __init__(
        self, width: int, atoms: int, active: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not 1 <= active <= atoms:
            raise InvalidInputError(f"of {atoms} codes, {active} cannot be kept")
        drawn = torch.randn(atoms, width, generator=generator)
        self.active = active
        self.atoms = nn.Parameter(drawn / drawn.norm(dim=1, keepdim=True))  # rows of W_d'
        self.encoder = nn.Parameter(self.atoms.detach().clone())  # W_e = W_d' to begin with
        self.bias = nn.Parameter(torch.zeros(atoms))  # b_e
        self.shift = nn.Parameter(torch.zeros(width))  # b_d
        self.register_buffer("scale", torch.ones(()))

    def before(self, x: Tensor) -> Tensor:
        """Codes of scaled vectors before the largest are chosen [..., m]."""
        return (x - self.shift) @ self.encoder.T + self.bias

    def choose(self, codes: Tensor, active: int | None = None) -> Tensor:
        """Codes of which all but the k largest are 0 [..., m]."""
        kept = codes.topk(active or self.active, dim=-1)
        return torch.zeros_like(codes).scatter(-1, kept.indices, kept.values)

    def encode(self, x: Tensor) -> Tensor:
        """Sparse codes [..., m] of a model's own vectors [..., D]."""
        return self.choose(self.before(x * self.scale))

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors [..., D] of codes [..., m], as long as the model's own."""
        return (codes @ self.atoms + self.shift) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """What is left of vectors [..., D] after the narrow place."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def measure(self, x: Tensor, rows: int = 4096) -> Fit:
        """Measure the loss of variance and the firing of the codes on vectors [N, D]."""
        mean = x.mean(0)
        lost = total = 0.0
        fired = torch.zeros(len(self.atoms), dtype=torch.int64, device=x.device)
        for part in torch.split(x, rows):
            codes = self.encode(part)
            lost += float((part - self.decode(codes)).double().square().sum())
            total += float((part - mean).double().square().sum())
            fired += (codes != 0).sum(0)
        return Fit(
            lost / max(total, 1e-30),
            float(fired.sum()) / len(x),
            float((fired == 0).double().mean()),
            fired / len(x),
        )

    def save(self, folder: str | Path, notes: dict[str, Any] | None = None) -> None:
        """Write weights and record, replacing an older autoencoder in that folder as a whole.

        Args:
            folder: Where.
            notes: JSON values to keep with it, such as the site and the digest of the model.

        Raises:
            InvalidInputError: The folder holds something else.
            BrokenFileError: It cannot be written.
        """
        folder = Path(folder)
        folders.check_replaceable(folder, (_RECORD,), "sparse autoencoder")
        with folders.published(folder) as part:
            save_file(
                {k: v.contiguous().cpu() for k, v in self.state_dict().items()}, part / _WEIGHTS
            )
            record = {"active": self.active, "notes": notes or {}}
            record["sha256"] = folders.digest(part / _WEIGHTS)
            (part / _RECORD).write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> tuple[SparseAutoencoder, dict[str, Any]]:
        """Read an autoencoder that was saved, and its notes.

        Raises:
            BrokenFileError: A file is missing or damaged.
        """
        folder = Path(folder)
        record = folders.read_record(
            folder / _RECORD, ("active", "notes", "sha256"), "sparse autoencoder"
        )
        try:
            if folders.digest(folder / _WEIGHTS) != record["sha256"]:
                raise BrokenFileError(f"{folder / _WEIGHTS} was altered or cut short")
            weights = load_file(folder / _WEIGHTS)
            atoms, width = weights["atoms"].shape
            made = cls(width, atoms, int(record["active"]))
            made.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BrokenFileError(f"{folder} holds no whole autoencoder ({error})") from error
        return made.eval().requires_grad_(False), dict(record["notes"])


def geometric_median(x: Tensor, rounds: int = 50) -> Tensor:
    """The point [D] whose distances to the rows of x [N, D] sum to the least (Weiszfeld).

    Example:
        >>> far = torch.tensor([[0.0], [0.0], [0.0], [90.0]])
        >>> round(float(geometric_median(far)), 3)
        0.0
    """
    point = x.mean(0)
    for _ in range(rounds):
        weight = 1 / (x - point).norm(dim=1, keepdim=True).clamp(min=1e-6)
        point = (x * weight).sum(0) / weight.sum()
    return point


def train_sae(
    x: Tensor, recipe: SaeRecipe, report: Callable[[int, float], None] | None = None
) -> SparseAutoencoder:
    """Train an autoencoder on vectors of one site.

    Args:
        x: Vectors [N, D] of many texts; the order in which they are read follows from the seed.
        recipe: Sizes and training.
        report: Called with the steps taken and the last share of unexplained variance.

    Raises:
        InvalidInputError: Fewer than two vectors, one that is not finite, all equal, or more codes
            kept than there are.
        DivergedError: The loss is not finite.
    """
    if x.ndim != 2 or len(x) < 2 or not bool(x.isfinite().all()):
        raise InvalidInputError(f"vectors must be [2 or more, D] and finite, got {list(x.shape)}")
    x = x.float()
    if not bool((x != x[0]).any()):
        raise InvalidInputError("all vectors are equal; give vectors of more texts")
    width = x.shape[1]
    draw = torch.Generator().manual_seed(recipe.seed)
    sae = SparseAutoencoder(width, recipe.atoms or 8 * width, recipe.active, draw).to(x.device)
    sae.scale.fill_(math.sqrt(width) / float(x.norm(dim=1).mean()))
    x = x * sae.scale
    some = torch.randperm(len(x), generator=draw)[:_SAMPLE].to(x.device)
    with torch.no_grad():
        sae.shift.copy_(geometric_median(x[some]))
    spread = (x - x.mean(0)).square().sum(1).mean()
    optimizer = torch.optim.Adam(sae.parameters(), lr=recipe.learning_rate)
    quiet = torch.zeros(len(sae.atoms), dtype=torch.int64, device=x.device)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(recipe.steps):
        while len(order) < recipe.batch_size:
            order = torch.cat([order, torch.randperm(len(x), generator=draw)])
        rows, order = order[: recipe.batch_size], order[recipe.batch_size :]
        batch = x[rows.to(x.device)]
        left = (recipe.steps - step) / max(recipe.steps / 5, 1)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min(1.0, left)
        before = sae.before(batch)
        codes = sae.choose(before)
        rest = batch - (codes @ sae.atoms + sae.shift)
        loss = rest.square().sum(1).mean() / spread
        quiet = torch.where((codes != 0).any(0), 0, quiet + len(batch))
        total = loss + recipe.auxiliary * _left_over(sae, before, rest.detach(), quiet, recipe)
        if not math.isfinite(float(total.detach())):
            raise DivergedError(
                f"the loss is {float(total.detach())} at step {step}; use a lower rate"
            )
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        _along_the_sphere(sae)
        optimizer.step()
        with torch.no_grad():
            sae.atoms.div_(sae.atoms.norm(dim=1, keepdim=True).clamp(min=1e-12))
        if report is not None:
            report(step + 1, float(loss.detach()))
    return sae.eval().requires_grad_(False)


def _left_over(
    sae: SparseAutoencoder, before: Tensor, rest: Tensor, quiet: Tensor, recipe: SaeRecipe
) -> Tensor:
    """Share of what is left over [N, D] that the largest dead codes do not explain."""
    dead = (quiet >= recipe.dead_after).nonzero()[:, 0]
    if not len(dead) or not recipe.auxiliary:
        return before.new_zeros(())
    chosen = sae.choose(before[:, dead], min(max(rest.shape[1] // 2, 1), len(dead)))
    told = chosen @ sae.atoms[dead]
    spread = (rest - rest.mean(0)).square().sum().clamp(min=1e-12)
    return (rest - told).square().sum() / spread


@torch.no_grad()
def _along_the_sphere(sae: SparseAutoencoder) -> None:
    """Take out of the gradient of each atom what would only change its length."""
    gradient = sae.atoms.grad
    assert gradient is not None
    gradient -= (gradient * sae.atoms).sum(1, keepdim=True) * sae.atoms
