"""ParallelSpec: grouped training, one pass for a whole chain, and its mask slots."""

from dataclasses import replace
from pathlib import Path

import feature_checks
import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.feature_drafter import counted
from isthmus.decoding.policy import Fixed
from isthmus.errors import InvalidInputError
from isthmus.systems.speculative.parallelspec import Parallelspec, Settings

QUIET = Settings(noise=0.0, keep=1.0)
THREE = Settings(
    fused_layers=(0, 1, 2), own_slots=False, noise=0.0, feature_weight=0.0, token_weight=1.0
)


@pytest.mark.parametrize("settings", [Settings(), THREE])
def test_learns(settings: Settings) -> None:
    checks.learns(checks.make(Parallelspec, settings), fall=0.96)


def test_groups_are_nested() -> None:
    drafter = checks.make(Parallelspec)
    generator = torch.Generator().manual_seed(0)
    anchor, depth = drafter.group(40, generator)
    rows = set(zip(anchor.tolist(), depth.tolist(), strict=True))
    assert len(rows) == len(anchor) and {i for i, k in rows if k == 0} == set(range(39))
    assert all((i, k - 1) in rows for i, k in rows if k)
    sizes = [sum(k == d for _, k in rows) for d in range(4)]
    assert sizes[1] in range(25, 29) and sizes[3] in range(9, 15), "0.7 and 0.343 of 40"
    few = Parallelspec(drafter.target, Settings(levels=8, keep=0.1, least=0.2))
    assert all(
        i + k + 1 < 40 for i, k in zip(*(x.tolist() for x in few.group(40, generator)), strict=True)
    )
    assert (few.group(400, generator)[1] == 7).sum() in range(74, 81), "never below a fifth"
    off = Parallelspec(drafter.target, Settings(taught_slots=False))
    assert not off.group(40, generator)[1].any()


@torch.no_grad()
@pytest.mark.parametrize("settings", [QUIET, replace(THREE, keep=1.0)])
def test_grouped_training_is_drafting_from_each_place(settings: Settings) -> None:
    """All places at once give what one pass after each prefix gives, in pieces or at once."""
    drafter = checks.make(Parallelspec, settings)
    batch = checks.batch_of(drafter)
    feature = drafter.body.condense(batch.features)
    anchor, depth = drafter.group(14, batch.generator)
    g = drafter.grouped(batch, feature, anchor, depth)
    for known in (5, 9):
        whole = checks.prefix(batch, known)
        for pieces in (False, True):
            if pieces:
                feature_checks.take_in(drafter, whole, (2, 4))
            else:
                drafter.reset(3)
                drafter.absorb(whole)
            for k in range(4):
                got = drafter.expand(feature_checks.level(batch.ids[:, :2], [0, 0], k))
                row = int(((anchor == known - 1) & (depth == k)).nonzero())
                want = drafter.logits(g[:, row])
                assert torch.equal(got[:, 0], got[:, 1]), "a slot knows no node"
                torch.testing.assert_close(got[:, 0], want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_real_rows_do_not_see_slots() -> None:
    drafter = checks.make(Parallelspec, QUIET)
    batch = checks.batch_of(drafter)
    anchor, depth = drafter.group(14, batch.generator)
    before = drafter.grouped(batch, batch.final, anchor, depth)
    drafter.mask_token.data.add_(1.0)
    after = drafter.grouped(batch, batch.final, anchor, depth)
    assert torch.equal(before[:, depth == 0], after[:, depth == 0])
    assert not torch.isclose(before, after)[:, depth > 0].all(-1).any()


@torch.no_grad()
def test_the_loss_by_hand() -> None:
    """Only the first token: EAGLE's loss; every slot counts as much as a real row."""
    drafter = checks.make(Parallelspec, replace(QUIET, levels=2))
    batch = checks.batch_of(drafter)
    total = count = 0.0
    for known in range(1, 14):
        drafter.reset(3)
        drafter.absorb(checks.prefix(batch, known))
        for k in range(2):
            if known + k < 14:
                logits = drafter.expand(feature_checks.level(batch.ids[:, :1], [0], k))[:, 0]
                p = torch.softmax(batch.target_logits[:, known + k], -1)
                token = -(p * logits.log_softmax(-1)).sum(-1)
                near = torch.nn.functional.smooth_l1_loss(
                    drafter._guess[:, k], batch.final[:, known + k], reduction="none"
                ).mean(-1)
                total += float((0.1 * token + near).sum())
                count += len(token)
    assert float(drafter.loss(batch)) == pytest.approx(total / count)


def test_one_pass_a_round() -> None:
    drafter = checks.make(Parallelspec)
    for shape in (checks.CHAIN, checks.TREE):
        with counted(drafter.body) as calls:
            (result,) = tiny.generate("Llama", "float64", Fixed(drafter, shape), 12, [0])
        drafted = sum(r.nodes > 0 for r in result.rounds)
        assert 5 <= drafted <= len(calls) <= len(result.rounds)
        assert max(r.nodes for r in result.rounds) == shape.nodes


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    checks.same_as_plain(checks.make(Parallelspec, name=name), name, (checks.CHAIN, checks.TREE))


def test_greedy_output_is_plain_with_three_layers() -> None:
    checks.same_as_plain(checks.make(Parallelspec, THREE), "Llama", (checks.CHAIN, checks.TREE))


def test_settings_that_cannot_be() -> None:
    target = tiny.target("Llama")
    for settings in (Settings(levels=0), Settings(keep=0.0), Settings(least=2.0)):
        with pytest.raises(InvalidInputError, match="levels"):
            Parallelspec(target, settings)
    with pytest.raises(InvalidInputError, match="feature_weight"):
        Parallelspec(target, Settings(fused_layers=(0, 1, 2)))
    assert Parallelspec(target, Settings(levels=1)).max_depth == 1
    assert Settings.peagle(6).fused_layers == (1, 3, 5)


@pytest.mark.parametrize("settings", [Settings(), THREE])
def test_files(tmp_path: Path, settings: Settings) -> None:
    checks.round_trip(checks.make(Parallelspec, settings), tmp_path / "parallel")
