"""Falcon: blocks, the relaxed mask, glancing, and recurrent state that rolls back."""

from dataclasses import replace
from pathlib import Path

import feature_checks
import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.draft_cache import DraftCache
from isthmus.decoding.feature_drafter import counted
from isthmus.decoding.policy import Fixed
from isthmus.decoding.trained import Fresh
from isthmus.errors import InvalidInputError
from isthmus.nn.masks import additive
from isthmus.roles import Shape
from isthmus.systems.speculative.falcon import Falcon, Settings

QUIET = Settings(noise=0.0, dropout=0.0, glancing=False)


def absorbed(drafter: Falcon, fresh: Fresh) -> None:
    drafter.reset(len(fresh.tokens))
    drafter.absorb(fresh)


def test_learns() -> None:
    checks.learns(checks.make(Falcon), fall=0.96)


@torch.no_grad()
@pytest.mark.parametrize("settings", [QUIET, replace(QUIET, block=3, recurrent=False)])
def test_drafting_is_what_was_trained(settings: Settings) -> None:
    """From a text of whole blocks, the first k levels are the training's last block."""
    drafter = checks.make(Falcon, settings)
    batch = checks.batch_of(drafter)
    k = settings.block
    known = 9 if k == 3 else 10
    fresh = checks.prefix(batch, known)
    want = drafter.head(drafter.forward(fresh.following, fresh.final))[:, -k:]
    for pieces in (False, True):
        if pieces:
            feature_checks.take_in(drafter, fresh, (1, 2, 6))
        else:
            absorbed(drafter, fresh)
        for depth in range(k):
            tokens = batch.ids[:, known + depth : known + depth + 1]
            got = drafter.expand(feature_checks.level(tokens, [0], depth))[:, 0]
            torch.testing.assert_close(got, want[:, depth], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2])
def test_a_tree_is_what_every_path_gives_anew(k: int) -> None:
    """Blocks of a tree, cached, against running each path from the start; any text length."""
    drafter = checks.make(Falcon, replace(QUIET, block=k))
    batch = checks.batch_of(drafter)
    known = 9
    fresh = checks.prefix(batch, known)
    feature_checks.take_in(drafter, fresh, (1, 4))
    draw = torch.Generator().manual_seed(5)
    tokens = [batch.ids[:, known : known + 1]]
    tokens += [torch.randint(3, 60, (3, n), generator=draw) for n in (3, 4, 4, 3)]
    parents = [[0], [0, 0, 0], [0, 2, 0, 1], [3, 1, 1, 0], [2, 0, 0]]
    for depth, (level, parent) in enumerate(zip(tokens, parents, strict=True)):
        got = drafter.expand(feature_checks.level(level, parent, depth))
        for node in range(level.shape[1]):
            path = [node]
            for above in range(depth, 1, -1):
                path.insert(0, parents[above][path[0]])
            names = [tokens[d + 1][:, n : n + 1] for d, n in enumerate(path)] if depth else []
            line, features = fresh.following, fresh.final
            for done in range(0, depth + 1, k):
                rows, _ = drafter.recur(line, features)
                length = rows.shape[1]
                # the blocks end with the text: everything behind sees its own block whole
                place = (torch.arange(length) - length) // k
                mask = additive(place <= place[:, None], torch.float64)
                g = drafter.layer(rows, torch.arange(length)[None], mask)[:, -k:]
                if done + k <= depth:
                    line = torch.cat([line, *names[done : done + k]], 1)
                    features = torch.cat([features, g], 1)
            want = drafter.head(g[:, depth % k])
            torch.testing.assert_close(got[:, node], want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_glancing() -> None:
    drafter = checks.make(Falcon)
    batch = checks.batch_of(drafter, rows=4, length=40)
    wrong = torch.zeros(4, 40, dtype=torch.bool)
    wrong[0, :20], wrong[1, :10], wrong[2] = True, True, True
    for progress, counts in ((0.0, [8, 4, 16, 0]), (0.5, [4, 2, 8, 0]), (1.0, [0, 0, 0, 0])):
        shown = drafter.glanced(replace(batch, progress=progress), wrong)
        assert shown.sum(1).tolist() == counts, "0.4 of the wrong places, falling to none"
        assert not shown[:, 1::2].any() and not shown[:, -2:].any(), "block starts only"
    release = Falcon(drafter.target, Settings(glance=0.45, glance_floor=0.1))
    last = release.glanced(replace(batch, progress=1.0), wrong)
    assert last.sum(1).tolist() == [2, 1, 4, 0], "the release never stops showing"
    full = Falcon(drafter.target, Settings(glance=1.0)).glanced(batch, torch.ones_like(wrong))
    assert full[:, 0:38:2].all(), "no more than there are block starts"


@torch.no_grad()
def test_a_glance_copies_both_halves() -> None:
    """A shown row reads the feature and the token k places on, and is not graded."""
    drafter = checks.make(Falcon, replace(QUIET, glancing=True, glance=0.3))
    batch = checks.batch_of(drafter)
    seen = []
    plain = drafter.forward

    def spy(tokens: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        seen.append((tokens, feature))
        return plain(tokens, feature)

    drafter.forward = spy
    drafter.loss(batch)
    (tokens, feature), (second, shown_feature) = seen
    shown = (feature != shown_feature).any(-1)
    assert 0 < int(shown.sum()) < shown.numel() // 2
    for b, i in shown.nonzero().tolist():
        assert torch.equal(shown_feature[b, i], batch.final[b, i + 2])
        assert second[b, i] == batch.ids[b, i + 3]
    assert torch.equal(second[~shown], tokens[~shown])


@torch.no_grad()
def test_the_loss_by_hand() -> None:
    drafter = checks.make(Falcon, QUIET)
    batch = checks.batch_of(drafter)
    tokens = torch.cat([batch.ids[:, 1:], batch.ids[:, :1] * 0], 1)
    g = drafter.forward(tokens, batch.final)[:, :-2]
    near = torch.nn.functional.smooth_l1_loss(g, batch.final[:, 2:])
    logp = drafter.head(g).log_softmax(-1)
    soft = -(batch.target_logits[:, 2:].softmax(-1) * logp).sum(-1).mean()
    hard = -logp[:, :-1].gather(-1, batch.ids[:, 3:, None]).mean()
    want = near + 0.1 * (0.9 * soft + 0.1 * hard)
    assert float(drafter.loss(batch)) == pytest.approx(float(want))


def test_blocks_in_the_cache() -> None:
    """A block sees itself and the blocks above it, at following positions."""
    drafter = checks.make(Falcon)
    cache = DraftCache(drafter.sizes, 1, 1, torch.float32, torch.device("cpu"))
    positions, mask = cache.branch(torch.tensor([[0]]), 2)
    assert positions.tolist() == [[0, 1]] and bool((mask == 0).all())
    positions, mask = cache.branch(torch.tensor([[0, 0]]), 2)
    assert positions.tolist() == [[2, 3, 2, 3]]
    positions, mask = cache.branch(torch.tensor([[1]]), 2)
    assert positions.tolist() == [[4, 5]]
    assert (mask[0, 0] == 0).int().tolist() == [[1, 1, 0, 0, 1, 1, 1, 1]] * 2


def test_half_the_passes() -> None:
    drafter = checks.make(Falcon)
    with counted(drafter.layer) as calls:
        policy = Fixed(drafter, Shape(4, 4, 1))
        (result,) = tiny.generate("Llama", "float64", policy, 12, [0])
    assert len(calls) == sum((r.nodes + 1) // 2 for r in result.rounds)
    assert max(r.nodes for r in result.rounds) == 4


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    checks.same_as_plain(checks.make(Falcon, name=name), name, (checks.CHAIN, checks.TREE))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(InvalidInputError, match="block"):
        Falcon(tiny.target("Llama"), Settings(block=0))


def test_files(tmp_path: Path) -> None:
    checks.round_trip(checks.make(Falcon), tmp_path / "falcon")
