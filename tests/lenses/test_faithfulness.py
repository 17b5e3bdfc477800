"""Faithfulness: hand values on a model that is a sum of its tokens, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.lenses import faithfulness as f
from isthmus.lenses.trace import Site

WEIGHT = torch.tensor([[0.0, 0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
REMOVABLE = torch.tensor([[False, True, True, True, True]])


def answer(kept):
    """p is the weight that is left."""
    return (kept * WEIGHT[:, None]).sum(-1)


def test_areas_by_hand():
    # right order: p = 1, .6, .3 -> (0 + .4 + .7) / 3
    assert float(f.aopc(answer, WEIGHT, REMOVABLE, most=2)) == pytest.approx(1.1 / 3)
    assert float(f.aopc(answer, -WEIGHT, REMOVABLE, most=2)) == pytest.approx((0.1 + 0.3) / 3)
    assert float(f.comprehensiveness(answer, WEIGHT, REMOVABLE, 0.25)) == pytest.approx(0.4)
    assert float(f.sufficiency(answer, WEIGHT, REMOVABLE, 0.5)) == pytest.approx(0.3)
    # p at 0, 1/2 and 1 of the places: 1, .3, 0 and, least first, 1, .7, 0
    low = f.perturbation_auc(answer, WEIGHT, REMOVABLE, steps=2)
    high = f.perturbation_auc(answer, WEIGHT, REMOVABLE, "negative", steps=2)
    assert [float(low), float(high)] == pytest.approx([0.4, 0.6])
    oracle = f.greedy(answer, REMOVABLE, most=3)
    assert oracle.tolist() == [[0.0, 3.0, 2.0, 1.0, 0.0]]


def test_ties_are_shuffled_the_same_way_twice_and_class_tokens_stay():
    flat, free = torch.zeros(2, 6), torch.ones(2, 6, dtype=torch.bool)
    free[:, 0] = False
    ranks = [f.places(flat, free, seed=s) for s in (0, 0, 1)]
    assert torch.equal(ranks[0], ranks[1]) and not torch.equal(ranks[0], ranks[2])
    assert ranks[0][:, 0].tolist() == [5, 5]
    kept = f._without(ranks[0], free, torch.tensor([[5], [5]]))
    assert kept[:, 0].tolist() == [[True] + [False] * 5] * 2


def test_tokens_are_taken_out_in_three_ways():
    config = tf.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.BertForSequenceClassification(config).eval()
        for p in model.parameters():
            p.data.mul_(10) if p.ndim == 2 else p
    ids = torch.tensor([[1, 7, 8, 9], [1, 5, 6, 0]])
    there = torch.tensor([[True] * 4, [True] * 3 + [False]])
    kept = torch.tensor([[True, False, True, True], [True, True, False, True]])

    def p(ids, mask):
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask.long()).logits.double().softmax(-1)

    target = p(ids, there).argmax(-1)
    for how, changed, mask in (
        ("mask", torch.tensor([[1, 2, 8, 9], [1, 5, 2, 0]]), there),
        ("hide", ids, there & kept),
        ("delete", torch.tensor([[1, 8, 9, 7], [1, 5, 6, 0]]),
         torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()),
    ):  # fmt: skip
        told = f.TokenRemoval(model, ids, there, how=how, mask_id=2)(kept[:, None])
        want = p(changed, mask).gather(1, target[:, None])
        assert torch.allclose(told, want, atol=1e-6), how
    with pytest.raises(InvalidInputError, match="no mask token"):
        f.TokenRemoval(model, ids)
    with pytest.raises(UnknownNameError, match="delete"):
        f.TokenRemoval(model, ids, how="remove")


def test_scores_without_meaning_are_refused():
    with pytest.raises(InvalidInputError, match="not a number"):
        f.places(WEIGHT * torch.nan, REMOVABLE)
    with pytest.raises(InvalidInputError, match="do not fit"):
        f.places(WEIGHT[:, 1:], REMOVABLE)


def test_other_rankings_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 2), nn.Linear(2, 3, bias=False)

        def forward(self, ids):
            return SimpleNamespace(logits=self.head(self.embed(ids).sum(1)))

    net, ids = Net().eval(), torch.tensor([[0, 3]])
    scores = f.gradient_times_input(net, Site("embed"), {"ids": ids}, torch.tensor([2]))
    want = net.embed(ids) @ net.head.weight[2]
    assert torch.allclose(scores, want) and scores.requires_grad is False
    half = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    assert f.rollout([half, half])[0].tolist() == [[1.0, 0.0], [0.4375, 0.5625]]
    assert torch.equal(f.random_scores(ids, 1), f.random_scores(ids, 1))


def test_the_interval_covers_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    centre, low, high = f.interval(values)
    assert low < centre < high and high - low == pytest.approx(4 * 1.0 / 20, rel=0.15)
