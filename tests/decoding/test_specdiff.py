"""Speculative diffusion: the model's loss and masks, the draft, and an unchanged output."""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.models.masked_diffusion import MaskedDiffusion
from isthmus.nn.decoder import LayerSizes
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.specdiff import Settings, Specdiff, passes
from isthmus.testing import check_tree, goodness_of_fit
from isthmus.training.drafting import DraftTraining, Recipe, read

IDS = torch.randint(3, tiny.V, (6, 20), generator=torch.Generator().manual_seed(1))


@lru_cache(maxsize=8)
def drafter(name: str = "Llama", **settings: Any) -> Specdiff:
    torch.manual_seed(0)
    made = Specdiff(tiny.target(name, "float32"), Settings(**{"block": 4, **settings}))
    return made.eval()


def context(rows: list[list[int]], law: Law | None = None, seed: int = 0) -> Context:
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
    lengths = [len(r) for r in rows]
    generator = torch.Generator().manual_seed(seed)
    return Context(ids, lengths, list(lengths), law or Law(), generator, list(range(len(rows))))


def test_the_model_sees_both_sides_and_no_padding() -> None:
    torch.manual_seed(0)
    net = MaskedDiffusion(9, LayerSizes(16, 2, 2, 8, 24), 2).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        full = net(ids)
        other = net(torch.tensor([[1, 2, 3, 4, 6]]))
        assert full.shape == (1, 5, 9)
        assert not torch.allclose(full[0, 0], other[0, 0]), "the first place sees the last"
        assert torch.allclose(
            net(ids, causal=True)[0, :4], net(torch.tensor([[1, 2, 3, 4, 6]]), causal=True)[0, :4]
        )
        padded = torch.tensor([[7, 8, 1, 2, 3]])
        valid = torch.tensor([[False, False, True, True, True]])
        # rotary positions are relative, so padding on the left changes nothing
        assert torch.allclose(net(padded, valid)[0, 2:], net(ids[:, :3])[0], atol=1e-5)
    with pytest.raises(InvalidInputError):
        MaskedDiffusion(9, LayerSizes(16, 2, 2, 8, 24), 0)


def test_the_loss_is_unbiased_for_a_model_that_knows_nothing() -> None:
    """Uniform laws cost log V nats a token at any rate, so the weighted mean must be log V."""
    net = MaskedDiffusion(8, LayerSizes(16, 2, 2, 8, 24), 1)
    torch.nn.init.zeros_(net.embedding.weight)
    ids = torch.randint(0, 8, (16, 40), generator=torch.Generator().manual_seed(0))
    free = torch.ones_like(ids, dtype=torch.bool)
    free[:8, :-6] = False
    generator = torch.Generator().manual_seed(1)
    mean = sum(float(net.loss(ids, free, generator).detach()) for _ in range(150)) / 150
    assert abs(mean - torch.log(torch.tensor(8.0)).item()) < 0.03


def test_training_falls_and_saves(tmp_path: Path) -> None:
    made = copy.copy(drafter())
    texts = torch.arange(3, 27).repeat(8, 1)
    recipe = Recipe(steps=12, batch_size=4, sequence_length=24, learning_rate=1e-2)
    torch.manual_seed(0)
    made = Specdiff(tiny.target("Llama", "float32"), Settings(block=4))
    batch = read(made, texts[:4], torch.Generator().manual_seed(0))
    before = float(made.loss(batch).detach())
    DraftTraining(made, texts, texts, recipe).run()
    batch = read(made, texts[:4], torch.Generator().manual_seed(0))
    assert float(made.loss(batch).detach()) < before - 0.5
    made.save_pretrained(tmp_path / "d")
    again = Specdiff.from_pretrained(tmp_path / "d", made.target)
    now = context([IDS[0].tolist()])
    want = made.propose(now, made.default_shape)
    assert torch.equal(again.propose(now, again.default_shape).tokens, want.tokens)
    with pytest.raises(MismatchError):
        made.begin(now, tiny.target("GPT2", "float32"))


def test_drafts_by_hand() -> None:
    """T = 1 reads all places off one pass; T = 2 clamps the first half for the second pass."""
    made, text = drafter(), IDS[:2, :12]
    mask = made.net.mask_token
    with torch.no_grad():
        one = made.net(torch.cat([text, torch.full((2, 4), mask)], 1))[:, -4:].argmax(-1)
        half = torch.cat([text, one[:, :2], torch.full((2, 2), mask)], 1)
        two = torch.cat([one[:, :2], made.net(half)[:, -2:].argmax(-1)], 1)
        step = text
        for _ in range(4):
            step = torch.cat(
                [step, drafter(diffuse=False).net(step, causal=True)[:, -1:].argmax(-1)], 1
            )
    now = context(text.tolist())
    for settings, want, count in (
        ({}, one, 1),
        ({"steps": 2}, two, 2),
        ({"diffuse": False}, step[:, 12:], 4),
    ):
        tree = drafter(**settings).propose(now, Shape(4, 4, 1))
        assert torch.equal(tree.tokens[:, 1:], want) and tree.q is None
        assert passes(drafter(**settings), text) == count
    sure = drafter(steps=2, order="confidence").propose(now, Shape(4, 4, 1))
    assert mask not in sure.tokens[0].tolist()
    with torch.no_grad():
        law = torch.softmax(made.net(torch.cat([text, torch.full((2, 4), mask)], 1))[:, -4:], -1)
    best = law.max(-1).values.topk(2, -1).indices
    assert torch.equal(sure.tokens[:, 1:].gather(1, best), one.gather(1, best))


def test_sampled_drafts_hand_over_their_law() -> None:
    law = Law(temperature=1.0)
    row = IDS[0, :10].tolist()
    now = context([row] * 1000, law)
    for settings, drawn in (
        ({}, True),
        ({"steps": 2}, True),
        ({"steps": 2, "order": "confidence"}, False),
    ):
        tree = drafter(**settings).propose(now, Shape(2, 2, 1))
        assert (tree.q is not None) == drawn
        check_tree(tree, now, Shape(2, 2, 1), tiny.V)
        if tree.q is not None:
            counts = torch.bincount(tree.tokens[:, 1], minlength=tiny.V)
            q = tree.q[0, 0].double()
            assert goodness_of_fit(counts.tolist(), (1000 * q / q.sum()).tolist()) > 1e-5
        if not settings:  # factorised: the second law does not know the first draw
            assert tree.q is not None and torch.allclose(tree.q[0, 1], tree.q[1, 1], atol=1e-6)


def test_rejection_keeps_the_targets_law() -> None:
    """First two tokens of 4000 sampled answers against the target's enumerated law."""
    made = drafter("Llama", block=2)
    prompt, rows = IDS[0, :6], 4000
    law = Law(temperature=0.3, top_k=3)
    requests = [Request(prompt, Stopper(max_new_tokens=2)) for _ in range(rows)]
    for _ in decode(
        made.target,
        requests,
        policy=Fixed(made, Shape(2, 2, 1)),
        acceptance=Lossless(),
        law=law,
        generator=torch.Generator().manual_seed(0),
    ):
        pass
    counts: dict[tuple[int, ...], int] = {}
    for r in requests:
        key = tuple(r.result.tokens)
        counts[key] = counts.get(key, 0) + 1

    def after(ids: torch.Tensor) -> torch.Tensor:
        logits = made.target.forward(ids[None]).logits[:, -1:]
        now = context([ids.tolist()], law)
        return law.probs(logits, TokenTree.root(now.roots()), now)[0, 0].double()

    first = after(prompt)
    truth = {}
    for a in first.nonzero()[:, 0].tolist():
        second = after(torch.cat([prompt, torch.tensor([a])]))
        for b in second.nonzero()[:, 0].tolist():
            truth[(a, b)] = float(first[a] * second[b])
    assert set(counts) <= set(truth)
    keys = list(truth)
    p = goodness_of_fit([counts.get(k, 0) for k in keys], [rows * truth[k] for k in keys])
    assert p > 1e-4


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    for settings in ({}, {"steps": 2, "order": "confidence"}, {"window": 3}):
        made = drafter(name, **settings)
        model = copy.copy(tiny.facade(name, "float32"))
        model.target = made.target
        got = model.generate(
            tiny.prompts(), max_new_tokens=8, drafter=Fixed(made, Shape(4, 4, 1)), ignore_end=True
        )
        for row, result in enumerate(got):
            tiny.assert_same(
                name, "float32", row, result.tokens, tiny.reference(name, "float32", 8)[row]
            )


def test_bad_settings_are_refused() -> None:
    for bad in ({"block": 0}, {"steps": 0}, {"order": "random"}):
        with pytest.raises(InvalidInputError):
            Settings(**bad)
