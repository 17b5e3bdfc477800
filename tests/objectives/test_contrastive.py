"""Contrastive losses beside plain sums; embedding in chunks beside embedding at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.objectives.contrastive import (
    distil,
    embed_in_chunks,
    info_nce,
    margin_mse,
    same,
)

torch.manual_seed(0)
SCORES = torch.randn(4, 6, dtype=torch.float64)


def by_hand(scores, positives, excluded) -> float:
    total = 0.0
    for row, own, out in zip(scores.tolist(), positives.tolist(), excluded.tolist(), strict=True):
        left = [torch.tensor(s).exp() for s, p, e in zip(row, own, out, strict=True) if p or not e]
        terms = [-(torch.tensor(s) - sum(left).log()) for s, p in zip(row, own, strict=True) if p]
        total += float(sum(terms)) / len(terms)
    return total


def test_the_loss_equals_the_plain_sum() -> None:
    diagonal = torch.eye(4, 6, dtype=torch.bool)
    nobody = torch.zeros_like(diagonal)
    assert float(info_nce(SCORES, temperature=0.5)) == pytest.approx(
        by_hand(SCORES / 0.5, diagonal, nobody), rel=1e-5
    )
    several = diagonal.clone()
    several[0, 4] = several[2, 5] = True
    excluded = torch.zeros_like(diagonal)
    excluded[0, 4] = excluded[0, 1] = excluded[3, :] = True  # a positive stays what it is
    excluded[3, 0] = False
    assert float(info_nce(SCORES, positives=several, excluded=excluded)) == pytest.approx(
        by_hand(SCORES, several, excluded), rel=1e-5
    )
    square = SCORES[:, :4]
    both = info_nce(square, symmetric=True)
    assert float(both) == pytest.approx(float(info_nce(square) + info_nce(square.T)) / 2, rel=1e-6)


def test_excluded_documents_have_no_gradient() -> None:
    scores = SCORES.clone().requires_grad_()
    keys = ["a", "b", "a", "c"]
    info_nce(scores, excluded=same(keys, [*keys, "b", "x"])).backward()
    assert scores.grad[0, 2] == scores.grad[2, 0] == scores.grad[1, 4] == 0
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1]
    assert torch.isfinite(scores.grad).all()


def test_gradients() -> None:
    scores = SCORES.clone().requires_grad_()
    float_loss = info_nce(scores, temperature=0.7)
    (found,) = torch.autograd.grad(float_loss, scores)
    expected = (torch.softmax(SCORES / 0.7, 1) - torch.eye(4, 6)) / 0.7
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_teachers() -> None:
    teacher = torch.randn(4, 6)
    laws = torch.softmax(teacher / 2, 1), torch.log_softmax(SCORES.float() / 2, 1)
    expected = (laws[0] * (laws[0].log() - laws[1])).sum()
    assert float(distil(SCORES, teacher, 2.0)) == pytest.approx(float(expected), rel=1e-5)
    gaps = [(s[:, 0] - s[:, 3]) for s in (SCORES, teacher.double())]
    assert float(margin_mse(SCORES[:, [0, 3]], teacher[:, [0, 3]])) == pytest.approx(
        float((gaps[0] - gaps[1]).square().sum()), rel=1e-5
    )


class Encoder(nn.Module):
    """Dropout before pooling and a dense head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(20, 8), nn.Dropout(0.3)
        self.layer, self.dense = nn.Linear(8, 8), nn.Linear(8, 5)
        self.calls: list[int] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(ids))
        pooled = self.drop(torch.tanh(self.layer(self.table(ids)))).mean(1)
        return nn.functional.normalize(self.dense(pooled), dim=-1)


@pytest.mark.parametrize("chunk", [1, 3, 4, 11])
def test_chunks_give_the_very_gradients(chunk: int) -> None:
    """With dropout on, a dense head, a loss of two parts, and chunks that do not divide B."""
    ids = torch.randint(0, 20, (11, 6), generator=torch.Generator().manual_seed(1))
    chunks = ids.split(chunk)
    results = []
    for cached in (False, True):
        torch.manual_seed(3)
        model = Encoder().double().train()
        if cached:
            vectors = embed_in_chunks(model, chunks)
            documents = embed_in_chunks(model, ids.flip(1).split(chunk))
        else:
            vectors = torch.cat([model(c) for c in chunks])
            documents = torch.cat([model(c) for c in ids.flip(1).split(chunk)])
        # a wrapper as Matryoshka's: the loss of the vectors, and of their beginning
        loss = info_nce(vectors @ documents.T, temperature=0.1)
        loss = loss + info_nce(vectors[:, :2] @ documents[:, :2].T) + 0.01 * vectors.abs().sum()
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()], model.calls))
    (direct, gradients, _), (loss, found, calls) = results
    assert loss.item() == pytest.approx(direct.item(), rel=1e-12)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
    assert max(calls) == min(chunk, 11) and len(calls) == 4 * len(chunks)


def test_without_the_random_state_gradients_would_be_wrong() -> None:
    """The check above sees dropout that is drawn anew."""
    from torch.utils.checkpoint import checkpoint

    ids = torch.randint(0, 20, (6, 6))
    gradients = []
    for kept in (True, False):
        torch.manual_seed(3)
        model = Encoder().double().train()
        vectors = checkpoint(model, ids, use_reentrant=False, preserve_rng_state=kept)
        info_nce(vectors @ vectors.T.detach()).backward()
        gradients.append(model.layer.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


WORKER = """
import json, sys, torch, torch.distributed as dist
from isthmus.objectives.contrastive import gather, info_nce
rank, ranks, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if ranks > 1:
    dist.init_process_group("gloo", f"file://{where}", rank=rank, world_size=ranks)
torch.manual_seed(0)
x, y = torch.randn(6, 4).double(), torch.randn(6, 4).double()
w = torch.randn(4, 3).double().requires_grad_()
own = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
d = gather(y[own] @ w)
positives = torch.eye(6, dtype=torch.bool)[own]
loss = info_nce(x[own] @ w @ d.T, positives=positives)
loss.backward()
if ranks > 1:
    dist.all_reduce(w.grad)
    dist.destroy_process_group()
if rank == 0:
    print(json.dumps(w.grad.tolist()))
"""


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        command = [sys.executable, "-c", WORKER]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), str(tmp_path / "meet")], stdout=subprocess.PIPE
            )
            for rank in range(ranks)
        ]
        outputs = [p.communicate(timeout=120)[0] for p in processes]
        assert not any(p.returncode for p in processes)
        found.append(torch.tensor(json.loads(outputs[0])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_query_without_a_document_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="document of its own"):
        info_nce(torch.zeros(3, 2))
    with pytest.raises(InvalidInputError, match="document of its own"):
        info_nce(torch.zeros(2, 2), positives=torch.tensor([[True, False], [False, False]]))
