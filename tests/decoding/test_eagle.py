"""EAGLE: features from features, the token one step ahead, and the EAGLE-3 layer."""

from pathlib import Path

import feature_checks
import pytest
import tiny
import torch
import torch.nn.functional as F
import trained_checks as checks

from isthmus.decoding.feature_drafter import tap_layers
from isthmus.decoding.trained import Batch
from isthmus.errors import InvalidInputError
from isthmus.roles import Taps
from isthmus.systems.speculative.eagle import Eagle, Settings

THREE = Settings(fused_layers=(0, 1, 2), feature_weight=0.0, token_weight=1.0, noise=0.0, rollout=3)


def first_logits(drafter: Eagle, batch: Batch, root: int) -> torch.Tensor:
    """Logits of level 1 after five tokens and a root."""
    fresh = checks.prefix(batch, 5)
    fresh.following[:, -1] = root
    drafter.reset(len(fresh.tokens))
    drafter.absorb(fresh)
    roots = torch.full((len(fresh.tokens), 1), root)
    return drafter.expand(feature_checks.level(roots, [0], 0))[:, 0]


@pytest.mark.parametrize("settings", [Settings(), THREE])
def test_learns(settings: Settings) -> None:
    checks.learns(checks.make(Eagle, settings), fall=0.96)


@torch.no_grad()
def test_the_loss_by_hand() -> None:
    """Eq. 3 to 5 at every place but the last, whose feature is not known."""
    drafter = checks.make(Eagle, Settings(noise=0.0))
    batch = checks.batch_of(drafter)
    x = drafter.body.fc(torch.cat([drafter.embed(batch.ids[:, 1:]), batch.final[:, :-1]], -1))
    g = drafter.body.layer(x, torch.arange(13)[None])
    regression = F.smooth_l1_loss(g, batch.final[:, 1:])
    p = torch.softmax(batch.target_logits[:, 1:], -1)
    token = -(p * torch.log_softmax(drafter.head(g), -1)).sum(-1).mean()
    assert float(drafter.loss(batch)) == pytest.approx(float(regression + 0.1 * token))


@torch.no_grad()
def test_a_perfect_layer_has_the_least_loss() -> None:
    """Whoever gives back the target's own next feature has no feature loss and the least other."""
    drafter = checks.make(Eagle, Settings(noise=0.0))
    batch = checks.batch_of(drafter)
    perfect = torch.cat([batch.final[:, 1:], batch.final[:, :1]], 1)
    drafter.step = lambda *args: perfect
    p = torch.softmax(batch.target_logits[:, 1:], -1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert float(drafter.loss(batch)) == pytest.approx(0.1 * float(entropy))


@pytest.mark.parametrize(
    "settings", [Settings(), Settings(shifted_token=False), Settings(rollout=3), THREE]
)
def test_drafting_is_what_was_trained(settings: Settings) -> None:
    drafter = checks.make(Eagle, settings)
    feature_checks.drafts_as_trained(drafter)
    feature_checks.tree_as_recomputed(drafter)


@torch.no_grad()
def test_the_token_ahead_is_seen_only_when_shifted() -> None:
    for settings, matters in (
        (Settings(), True),
        (THREE, True),
        (Settings(shifted_token=False), False),
        (Settings(use_token=False), False),
    ):
        drafter = checks.make(Eagle, settings)
        batch = checks.batch_of(drafter)
        same = torch.equal(first_logits(drafter, batch, 7), first_logits(drafter, batch, 8))
        assert same != matters, settings


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    checks.same_as_plain(checks.make(Eagle, name=name), name, (checks.CHAIN, checks.TREE))


def test_greedy_output_is_plain_with_three_layers() -> None:
    checks.same_as_plain(checks.make(Eagle, THREE), "Llama", (checks.CHAIN, checks.TREE))


def test_noise_and_rollout_change_the_loss() -> None:
    losses = []
    for settings in (Settings(), Settings(noise=0.0), Settings(noise=0.0, rollout=2)):
        drafter = checks.make(Eagle, settings)
        losses.append(float(drafter.loss(checks.batch_of(drafter)).detach()))
    assert len(set(losses)) == 3 and losses[2] > losses[1]


def test_settings_that_cannot_be() -> None:
    target = tiny.target("Llama")
    with pytest.raises(InvalidInputError, match="rollout"):
        Eagle(target, Settings(rollout=0))
    with pytest.raises(InvalidInputError, match="feature_weight"):
        Eagle(target, Settings(fused_layers=(0, 1, 2)))
    with pytest.raises(InvalidInputError, match="three different"):
        Eagle(target, Settings(fused_layers=(0, 1, 1), feature_weight=0.0))
    assert Settings.eagle3(6).fused_layers == (1, 3, 5) == tap_layers(6)
    assert checks.make(Eagle, THREE).taps == Taps(layers=(0, 1, 2))


@pytest.mark.parametrize("settings", [Settings(), THREE])
def test_files(tmp_path: Path, settings: Settings) -> None:
    checks.round_trip(checks.make(Eagle, settings), tmp_path / "eagle")
