"""Hybrid retrieval: one vector, several, and words beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.indexes.dense import DenseIndex
from isthmus.indexes.sparse import SparseIndex, bag
from isthmus.metrics.ranking import ranked
from isthmus.models.dual_encoder import DualEncoder, best_match
from isthmus.systems.retrieval.hybrid_retrieval import Contrast, HybridRetrieval
from isthmus.training.data import Data, Pair
from isthmus.training.loop import Plan
from isthmus.training.system import train
from isthmus.workbench.codesearch import Task

WORDS = ["socket", "file", "path", "thread", "queue", "regex", "parser", "token", "clock", "mail"]
PAIRS = [
    Pair(f"how to use a {a} with {b}", f"the {a} is opened and then the {b} is read, number {i}")
    for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
]
DATA = Data(PAIRS[:70], PAIRS[70:], "made up")
SETTINGS = replace(HybridRetrieval.scales["test"].settings, vocab_size=400, vectors=3)
PLAN = Plan(steps=60, validate_every=30, learning_rate=5e-3, schedule="constant")


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> HybridRetrieval:
    torch.manual_seed(0)
    return train(
        HybridRetrieval, DATA, SETTINGS, PLAN, out=tmp_path_factory.mktemp("made") / "system"
    )


def test_it_learns(system: HybridRetrieval) -> None:
    curve = system.record["validation"]
    torch.manual_seed(0)
    new = HybridRetrieval.untrained(SETTINGS, DATA)
    with torch.no_grad():
        before = Contrast(new, DATA, PLAN).validate()["mrr@10"]
    assert curve[-1]["mrr@10"] > before + 0.2


def test_a_score_is_the_best_match_of_the_vectors(system: HybridRetrieval) -> None:
    documents = system.vectors(["the file is read", "mail"])
    query = system.vectors(["file"], query=True)
    assert documents.shape == (2, 3, 16) and query.shape == (1, 1, 16)
    torch.testing.assert_close(documents.norm(dim=-1), torch.ones(2, 3))
    by_hand = [max(float(query[0, 0] @ v) for v in document) for document in documents]
    assert best_match(query, documents)[0].tolist() == pytest.approx(by_hand)
    alone = torch.cat([system.vectors([t]) for t in ("the file is read", "mail")])
    torch.testing.assert_close(documents, alone, atol=1e-5, rtol=1e-4)


def test_one_vector_is_a_dual_encoder() -> None:
    """m = 1: the very ranking of a dense index."""
    torch.manual_seed(0)
    plain = HybridRetrieval.untrained(replace(SETTINGS, vectors=1, hybrid=False), DATA)
    documents = {str(i): p.target for i, p in enumerate(PAIRS)}
    queries = {str(i): p.source for i, p in enumerate(PAIRS[:9])}
    plain.index(documents)
    found = plain.search(queries)
    index = DenseIndex()
    index.add(list(documents), plain.vectors(list(documents.values()))[:, 0])
    ids, scores = index.search(plain.vectors(list(queries.values()), query=True)[:, 0], 90)
    for query, row, values in zip(queries, ids, scores, strict=True):
        assert list(found[query].values()) == pytest.approx(values.tolist(), abs=1e-6)
        assert set(found[query]) == set(row)


def test_without_weight_it_is_bm25(system: HybridRetrieval) -> None:
    documents = {str(i): p.target for i, p in enumerate(PAIRS)}
    system.index(documents)
    system.weight = 0.0
    index = SparseIndex()
    index.add(list(documents), [bag(t) for t in documents.values()])
    for pair in PAIRS[:9]:
        found = system.search({"q": pair.source})["q"]
        ids, _ = index.search([bag(pair.source)], 20)
        assert ranked(found, "ascending")[:20] == ids[0]


def test_the_weight_is_chosen_on_development_queries(system: HybridRetrieval) -> None:
    blind = Task({"q": "zzz"}, {"a": "the file", "b": "the mail"}, {"q": {"b": 1}})
    system.tune(blind)
    first = list(system.search({"q": "zzz"})["q"])
    assert system.weight in (0.0, 1.0)  # the words say nothing, so no weight is better than 1
    assert len(first) == 2


def test_batches_hold_documents_of_like_lengths_and_no_false_negatives() -> None:
    long = [Pair(p.source, p.target + " and more" * 60) for p in PAIRS[:40]]
    data = Data([*PAIRS[:40], *long], PAIRS[40:50], "two lengths")
    torch.manual_seed(0)
    system = HybridRetrieval.untrained(replace(SETTINGS, max_length=200), data)
    learner = Contrast(system, data, PLAN)
    for part in range(learner.sampler.parts):
        lengths = [len(learner.documents[i]) for i in learner.batch(part)]
        assert max(lengths) < 65 or min(lengths) > 64
    twins = Data([Pair("same", "one"), Pair("same", "two")], PAIRS[:4], "twins")
    loss = Contrast(system, twins, PLAN).loss([0, 1])
    assert loss.weight == 2 and float(loss.total.detach()) == 0  # neither is the other's negative


def test_it_is_written_and_read_with_its_documents(system: HybridRetrieval, tmp_path) -> None:
    system.index({str(i): p.target for i, p in enumerate(PAIRS)})
    system.weight = 2.0
    system.save_pretrained(tmp_path / "s")
    again = HybridRetrieval.from_pretrained(tmp_path / "s")
    answer = again.run("how to use a queue with clock")
    assert answer.record == system.run("how to use a queue with clock").record
    assert "queue" in answer.record["hits"][0]["text"] and again.weight == 2.0
    assert len(answer.text.splitlines()) == 5
    with pytest.raises(InvalidInputError, match="empty"):
        again.run(" ")
    (tmp_path / "s" / "documents.json").write_text("[]")
    with pytest.raises(BrokenFileError, match="cannot be read"):
        HybridRetrieval.from_pretrained(tmp_path / "s")


def test_each_of_several_vectors_begins_at_its_stretch() -> None:
    torch.manual_seed(0)
    model = DualEncoder(90, vectors=4, dimension=64, hidden_size=64, num_layers=0)
    words = list(range(1, 81))
    for place in range(4):
        query = model([words[20 * place + 6 : 20 * place + 14]], query=True)
        scores = torch.einsum("qk,mk->m", query[0], model([words])[0])
        assert int(scores.argmax()) == place
    alone = DualEncoder(90, vectors=1, dimension=64, hidden_size=64, num_layers=0)
    assert not alone.stretches.weight.any()  # one vector begins at the whole document


def test_a_query_is_not_read_as_a_document() -> None:
    torch.manual_seed(0)
    model = DualEncoder(50, vectors=2, dimension=4, hidden_size=8, num_layers=1, num_heads=2)
    ids = [[1, 2, 3]]
    query, document = model(ids, query=True), model(ids)
    assert query.shape == (1, 1, 4) and document.shape == (1, 2, 4)
    assert not np.allclose(query[:, 0].detach(), document[:, 0].detach())
    with pytest.raises(InvalidInputError, match="at least 1"):
        DualEncoder(50, vectors=0)
