"""Multi-level training: the cycle's parts by hand, and a claim of seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from isthmus.claims import Ruler
from isthmus.errors import InvalidInputError
from isthmus.systems.laws.multilevel_training import (
    RECIPES,
    MultilevelTraining,
    Plan,
    Settings,
    claim,
    step_flops,
)
from isthmus.workbench._training import build, nats


def young() -> Any:
    """A small decoder whose blocks all do something."""
    model = build(RECIPES["test"])
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_operations_are_those_that_torch_counts() -> None:
    model = build(RECIPES["test"])
    model.set_attn_implementation("eager")  # fused kernels are counted by a formula, or not at all
    ids = torch.arange(2 * 33).view(2, 33)
    with FlopCounterMode(display=False) as counter:
        nats(model, ids).backward()  # type: ignore[no-untyped-call]
    assert step_flops(model.config, 64, 32) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_levels_and_the_blend() -> None:
    model = young()
    small = MultilevelTraining().shrink(model)
    assert (small.config.hidden_size, small.config.num_hidden_layers) == (16, 1)
    blended = MultilevelTraining().blend(model, small)
    assert blended.config.to_dict() == model.config.to_dict()
    assert same(model, MultilevelTraining(Settings(share=0.0)).blend(model, small))
    whole = MultilevelTraining(Settings(share=1.0))
    assert same(small, whole.shrink(whole.blend(model, small)))
    # by hand: o_proj [out, in] of the grown model is the small one's, read at half by each copy
    old, new, tiny = (m.model.layers[0].mlp.down_proj.weight for m in (model, blended, small))
    assert torch.allclose(new[16, 24], 0.5 * old[16, 24] + 0.5 * tiny[0, 0] / 2)


def test_a_cycle_trains_three_models_in_turn() -> None:
    seen = []

    def train(model: Any, steps: int, name: str) -> Any:
        seen.append((name, steps, model.config.hidden_size))
        return model

    model = young()
    MultilevelTraining().cycle(model, Plan(1, 5, 4), train)
    assert seen == [("young", 1, 32), ("small", 5, 16), ("large-0.5", 4, 32)]


def test_what_makes_no_cycle_is_refused() -> None:
    for settings in (Settings(factor=1), Settings(share=1.5), Settings(young=0.0)):
        with pytest.raises(InvalidInputError, match="multilevel-training needs"):
            MultilevelTraining(settings)
    with pytest.raises(InvalidInputError, match="leave nothing"):
        MultilevelTraining(replace(Settings(), young=0.9)).plan(100, 1.0, 0.2, 0.5)


def test_the_claim_runs_at_test_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    found = claim(Ruler(), "test")
    loss, whole, operations = found.rows
    # every phase learned: far from the uniform guess over 384 tokens
    assert all(v is not None and v < 5.9 for v in (loss.baseline, loss.ours, loss.off, whole.ours))
    assert operations.ours is not None and operations.ours <= 0.9
    assert len({loss.baseline, loss.ours, loss.off, whole.ours}) == 4
    trained = {path.name.rpartition("-")[0] for path in (tmp_path / "courses").glob("*-*/")}
    phases = ("scratch", "young", "small", "large-0", "large-0.5", "large-1")
    assert trained == {f"multilevel-{name}" for name in phases}
