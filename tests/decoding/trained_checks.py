"""What every trained drafter is checked for on tiny random targets."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from isthmus.decoding.policy import Fixed
from isthmus.decoding.trained import Batch, Fresh, TrainedDrafter
from isthmus.errors import BrokenFileError, MismatchError
from isthmus.roles import Features, Shape
from isthmus.training.drafting import read

CHAIN, TREE = Shape(4, 4, 1), Shape(12, 4, 4)


def make(system: Any, settings: Any = None, name: str = "Llama", dtype: str = "float64") -> Any:
    """A drafter of a tiny target whose weights are all away from their starting points."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drafter = system(tiny.target(name, dtype), settings).to(tiny.DTYPES[dtype])
        for p in drafter.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return drafter.eval()


def batch_of(drafter: TrainedDrafter, rows: int = 3, length: int = 14) -> Batch:
    """Random texts as training sees them."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, tiny.V, (rows, length), generator=generator)
    return read(drafter, ids, torch.Generator().manual_seed(0))


def prefix(batch: Batch, count: int) -> Fresh:
    """The first tokens of a batch as the loop would hand them over after a prefill."""
    f = batch.features
    cut = Features(
        None if f.final is None else f.final[:, :count],
        {i: x[:, :count] for i, x in f.layers.items()},
    )
    valid = torch.ones_like(batch.ids[:, :count], dtype=torch.bool)
    return Fresh(batch.ids[:, :count], batch.ids[:, 1 : count + 1], cut, valid)


def learns(drafter: TrainedDrafter, steps: int = 25, fall: float = 0.9) -> None:
    """The loss of one batch is finite and falls when it is repeated."""
    drafter.train()
    parameters = [p for p in drafter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    batch, losses = batch_of(drafter), []
    for _ in range(steps):
        loss = drafter.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    drafter.eval()
    assert all(x == x and abs(x) < 1e6 for x in losses)
    assert losses[-1] < fall * losses[0], losses
    assert all(p.grad is None for p in drafter.target.model.parameters())


def same_as_plain(drafter: TrainedDrafter, name: str, shapes: tuple[Shape, ...]) -> None:
    """Greedy output of a ragged batch equals plain decoding, and something was drafted."""
    plain = [r.tokens for r in tiny.generate(name, "float64", "none", 12, [0, 1, 2])]
    for shape in shapes:
        results = tiny.generate(name, "float64", Fixed(drafter, shape), 12, [0, 1, 2])
        assert [r.tokens for r in results] == plain, f"{name} at {shape}"
        assert all(r.stats.drafted > 0 for r in results)


def round_trip(drafter: TrainedDrafter, folder: Path) -> None:
    """Saved and read again it is the same; an altered file and another target are refused."""
    drafter.save_pretrained(folder)
    again = type(drafter).from_pretrained(folder, drafter.target)
    assert again.settings == drafter.settings
    for key, value in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    with pytest.raises(MismatchError, match="another target"):
        type(drafter).from_pretrained(folder, tiny.target("GPT2", "float32"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BrokenFileError, match="altered"):
        type(drafter).from_pretrained(folder, drafter.target)
