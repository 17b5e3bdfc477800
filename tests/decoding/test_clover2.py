"""Clover-2: its gate, its starting points, and drafting step by step as in training."""

from pathlib import Path

import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.builders import Level
from isthmus.decoding.trained import Fresh
from isthmus.roles import Features
from isthmus.systems.speculative.clover2 import Clover2, CosineGate, Settings


def drafted(drafter: Clover2, path: torch.Tensor) -> list[torch.Tensor]:
    """Logits after each token of one path a row [B, L], root first."""
    out = []
    for depth in range(path.shape[1]):
        token, none = path[:, depth : depth + 1], torch.zeros_like(path[:, :1])
        out.append(drafter.expand(Level(token, none, torch.zeros(none.shape), depth))[:, 0])
    return out


def part(fresh: Fresh, start: int) -> Fresh:
    """The tokens from ``start`` on."""
    f = fresh.features
    assert f.final is not None
    return Fresh(
        fresh.tokens[:, start:],
        fresh.following[:, start:],
        Features(f.final[:, start:], {i: x[:, start:] for i, x in f.layers.items()}),
        fresh.valid[:, start:],
    )


@torch.no_grad()
@pytest.mark.parametrize("use_tokens", [True, False])
def test_training_logits_are_those_of_drafting(use_tokens: bool) -> None:
    """Absorbed at once or in two rounds, drafting sees what the parallel loss sees."""
    drafter = checks.make(Clover2, Settings(noise=0.0, use_tokens=use_tokens))
    batch = checks.batch_of(drafter)
    seen: list[torch.Tensor] = []
    head = drafter.head
    drafter.head = lambda x: seen.append(head(x)) or seen[-1]  # type: ignore[func-returns-value]
    drafter.loss(batch)
    del drafter.head
    for count, first in ((1, 0), (6, 0), (9, 4)):
        drafter.reset(3)
        if first:
            drafter.absorb(checks.prefix(batch, first))
        drafter.absorb(part(checks.prefix(batch, count), first))
        got = drafted(drafter, batch.ids[:, count : count + 5])
        for k in range(5):
            torch.testing.assert_close(got[k], seen[k][:, count - 1])


@torch.no_grad()
def test_the_loss_by_hand() -> None:
    """Step k imitates the feature k places on; two steps, one text."""
    settings = Settings(heads=2, noise=0.0, decay=0.5, feature_weight=2.0, token_weight=0.3)
    drafter = checks.make(Clover2, settings)
    batch = checks.batch_of(drafter, rows=1, length=6)
    total = 0.0
    for k, weight in ((1, 1.0), (2, 0.5)):
        features, tokens = [], []
        for i in range(6 - k):
            drafter.reset(1)
            drafter.absorb(checks.prefix(batch, i + 1)) if i < 5 else None
            logits = drafted(drafter, batch.ids[:, i + 1 : i + 1 + k])[-1][0]
            h = drafter._h[0, 0]
            token = drafter.vectors(batch.ids[0, i + 2]) if k == 2 else h[:0]
            linear = drafter.step_map if k == 2 else drafter.first_map
            out = drafter.out_norm(linear(torch.cat([h, token])))
            gap = (out - batch.final[0, i + k]).abs()
            features.append(torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean())
            p = batch.target_logits[0, i + k].softmax(-1)
            tokens.append(-(p * logits.log_softmax(-1)).sum())
        total += weight * float(
            2.0 * torch.stack(features).mean() + 0.3 * torch.stack(tokens).mean()
        )
    assert float(drafter.loss(batch)) == pytest.approx(total, rel=1e-5)


def test_the_gate_is_bounded_by_its_value() -> None:
    gate = CosineGate(8, 2, 1e-6)
    state, token = torch.randn(50, 8), torch.randn(50, 8)
    with torch.no_grad():
        moved = (gate(state, token) - state).unflatten(-1, (2, 4)).norm(dim=-1)
        size = state.pow(2).mean(-1, keepdim=True).sqrt()
        value = (size * gate.value(token)).unflatten(-1, (2, 4)).norm(dim=-1)
        assert bool((moved <= value + 1e-5).all()) and bool((moved > 0).all())
        # a token that asks for what the state holds is taken in whole
        gate.key.weight.copy_(gate.query.weight)
        gate.key.bias.copy_(gate.query.bias)
        same = gate.norm(state)
        torch.testing.assert_close(gate(state, same) - state, size * gate.value(same))


def test_it_starts_as_the_target() -> None:
    target = tiny.target("Llama", "float32")
    drafter = Clover2(target)
    last = target.layers[-1].state_dict()
    for layer in drafter.layers:
        assert all(torch.equal(v, last[k]) for k, v in layer.state_dict().items())
    assert torch.equal(drafter.out_norm.weight, target.model.model.norm.weight)
    assert drafter.layers[0].mlp.up_proj.weight is not target.layers[-1].mlp.up_proj.weight
    h = torch.randn(4, 32)
    with torch.no_grad():
        assert float((drafter.first_map(h) - h).abs().max()) < 0.01 * float(h.abs().sum(1).max())
        _, out = drafter.step(h, torch.tensor([3, 4, 5, 6]))
        mixed = drafter.step_gate(h, drafter.vectors(torch.tensor([3, 4, 5, 6])))
        assert float((out - drafter.out_norm(mixed)).abs().max()) < 0.5


def test_it_reads_the_state_before_the_norm() -> None:
    drafter = checks.make(Clover2)
    batch = checks.batch_of(drafter)
    u, norm = drafter.before_norm(batch.features), drafter.target.model.model.norm
    torch.testing.assert_close(norm(u), batch.final)
    assert not torch.allclose(u, batch.final)


def test_learns_without_touching_the_target() -> None:
    checks.learns(checks.make(Clover2), 20)


@torch.no_grad()
def test_a_drafted_token_changes_what_follows() -> None:
    path = torch.tensor([[3, 4], [3, 7]])
    for use_tokens in (True, False):
        drafter = checks.make(Clover2, Settings(use_tokens=use_tokens))
        drafter.feature = torch.ones(2, 32, dtype=torch.float64)
        second = drafted(drafter, path)[1]
        assert torch.equal(second[0], second[1]) is not use_tokens


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    checks.same_as_plain(checks.make(Clover2, name=name), name, (checks.CHAIN, checks.TREE))


def test_files(tmp_path: Path) -> None:
    checks.round_trip(checks.make(Clover2, dtype="float32"), tmp_path / "clover2")
