"""RetroMAE v2: both halves, what pretraining hides, and the folder it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from isthmus.cli.main import main
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.indexes.collection import Collection
from isthmus.indexes.fusion import fuse
from isthmus.indexes.sparse import SparseIndex, bag
from isthmus.models.duplex_encoder import corrupted, halves
from isthmus.models.embedder import Embedder
from isthmus.systems.retrieval.retromae2 import ARMS, TINY, Retromae2
from isthmus.training.data import Data, Pair
from isthmus.training.loop import Plan
from isthmus.training.system import train

WORDS = ["socket", "file", "path", "thread", "queue", "regex", "parser", "token", "clock", "mail"]
PAIRS = [
    Pair(f"how to use a {a} with {b}", f"the {a} is opened and then the {b} is read, number {i}")
    for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
]
DATA = Data(PAIRS[:70], PAIRS[70:], "made up")
SETTINGS = replace(TINY, pretrain_steps=15)
PLAN = Plan(60, learning_rate=3e-3, validate_every=15)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "system"
    train(Retromae2, DATA, SETTINGS, PLAN, out=out)
    return out


@pytest.fixture(scope="module")
def system(out) -> Retromae2:
    return Retromae2.from_pretrained(out)


def _new(arm: str) -> Retromae2:
    torch.manual_seed(0)
    return Retromae2.untrained(replace(TINY, **ARMS[arm]), DATA)


def test_it_learns(system: Retromae2) -> None:
    curve = system.record["validation"]
    assert curve[-1]["mrr@10"] > curve[0]["mrr@10"] + 0.1
    assert len(system.documents) == len(PAIRS)  # not those of the last validation alone


@pytest.mark.parametrize(
    ("arm", "losses"),
    [
        ("mlm", {"encoder"}),
        ("v1", {"encoder", "decoder"}),
        ("bag", {"encoder", "bag"}),
        ("duplex", {"encoder", "decoder", "bag"}),
    ],
)
def test_an_arm_has_its_own_losses(arm: str, losses: set[str]) -> None:
    learner = _new(arm).learner(DATA, PLAN)
    loss = learner.loss(learner.batch(0))
    assert set(loss.sums) == losses
    weights = {"bag": TINY.bag_weight}
    total = sum(weights.get(n, 1.0) * float(v) for n, v in loss.sums.items())
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-5)


def test_only_the_decoder_teaches_the_first_token_to_know_the_text() -> None:
    """With masks alone, no loss reaches the last layer's state of the first token."""
    for arm, reached in (("mlm", False), ("bag", False), ("v1", True)):
        module = _new(arm).module
        learner = _new(arm).learner(DATA, PLAN)
        kept = []
        states = module.states
        module.states = lambda *args, f=states, k=kept: k.append(f(*args)) or k[-1]
        losses = module.losses(learner.batch(0))
        (gradient,) = torch.autograd.grad(sum(losses.values()), kept)
        assert bool((gradient[:, 0] != 0).any()) is reached


def test_whole_words_are_hidden_and_the_first_token_never() -> None:
    words = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, -1]]).repeat(400, 1)
    ids = torch.arange(8).repeat(400, 1) + 10
    batch = corrupted(
        ids,
        words >= -1,
        words,
        mask_id=1,
        vocab_size=100,
        encoder_rate=0.3,
        generator=torch.Generator().manual_seed(0),
    )
    hidden = batch["hidden"]
    assert torch.equal(hidden[:, 1], hidden[:, 2]) and not hidden[:, [0, 7]].any()
    assert torch.equal(hidden[:, 4], hidden[:, 6])
    assert float(hidden[:, 3].float().mean()) == pytest.approx(0.3, abs=0.08)
    shown = batch["shown"][hidden]
    assert float((shown == 1).float().mean()) == pytest.approx(0.8, abs=0.05)
    assert float((shown == ids[hidden]).float().mean()) == pytest.approx(0.1, abs=0.04)
    assert torch.equal(batch["shown"][~hidden], ids[~hidden])


def test_a_batch_of_pretraining_hides_whole_words_of_real_texts() -> None:
    learner = _new("mlm").learner(DATA, PLAN)
    ids, present, words = learner.system.read(learner.texts)
    assert torch.equal(words >= 0, present & (torch.arange(ids.shape[1]) > 0))
    batches = [learner.batch(part) for part in range(TINY.pretrain_steps)]
    share = sum(int(b["hidden"].sum()) for b in batches) / sum(
        int(b["present"][:, 1:].sum()) for b in batches
    )
    assert share == pytest.approx(0.3, abs=0.1)
    loss = learner.loss(batches[0])
    assert float(loss.sums["encoder"]) > 0 and loss.total.requires_grad


def test_the_sparse_half_keeps_the_largest_scores_at_any_level() -> None:
    scores = torch.tensor([[-9.0, -4.0, -7.0, -8.0]])
    kept = halves(scores, 2)
    assert (kept > 0).tolist() == [[False, True, True, False]]
    torch.testing.assert_close(halves(scores + 30, 2), kept)
    torch.testing.assert_close(kept.norm(), torch.tensor(1.0))
    torch.testing.assert_close(halves(torch.tensor([[3.0, -1.0]]), 2), torch.tensor([[1.0, 0.0]]))


def test_tuning_begins_with_directions_of_equal_strength() -> None:
    system = _new("v1")
    learner = system.learner(DATA, PLAN)
    ids, present, _ = system.read(learner.texts)

    def dense() -> torch.Tensor:
        made: torch.Tensor = system.module.dense(system.module.states(ids, present)[:, 0])
        return made.detach()

    raw = [dense()]
    learner.batch(TINY.pretrain_steps - 1)
    raw.append(dense())
    learner.batch(TINY.pretrain_steps)
    raw.append(dense())
    assert torch.equal(raw[0], raw[1])
    alike = [float(torch.nn.functional.normalize(r, dim=-1).mean(0).norm()) for r in raw]
    assert alike[0] > 0.9 and alike[2] < 0.6
    before = system.module.dense.linear.weight.clone()
    learner.batch(TINY.pretrain_steps)  # as after an interrupt: from the same states the same
    torch.testing.assert_close(system.module.dense.linear.weight, before)
    learner.batch(TINY.pretrain_steps + 1)
    torch.testing.assert_close(system.module.dense.linear.weight, before)


def test_the_head_begins_with_the_law_of_single_words() -> None:
    system = _new("duplex")
    ids, present, _ = system.read([text for pair in DATA.train for text in pair])
    law = system.module.common.softmax(0)
    seen = ids[present].bincount(minlength=len(law)).float()
    torch.testing.assert_close(law, (seen + 1) / (seen + 1).sum())


def test_a_score_is_the_sum_of_both_products(system: Retromae2) -> None:
    documents = {str(i): p.target for i, p in enumerate(PAIRS)}
    system.index(documents)
    query = PAIRS[3].source
    found = system.search({"q": query})["q"]
    dense, sparse = system.encode([query, documents["3"]])
    overlap = sum(v * sparse[1].get(t, 0.0) for t, v in sparse[0].items())
    assert found["3"] == pytest.approx(float(dense[0] @ dense[1]) + overlap, abs=1e-5)
    assert max(len(s) for s in sparse) <= SETTINGS.terms
    alone = system.encode([query])[0][0]
    np.testing.assert_allclose(alone, dense[0], atol=1e-5)  # padding changes nothing


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_is_written_and_read(arm: str, tmp_path) -> None:
    """The half that is not searched with has an empty index, and none on disk."""
    made = _new(arm)
    made.index({str(i): p.target for i, p in enumerate(PAIRS)})
    made.save_pretrained(tmp_path / "s")
    again = Retromae2.from_pretrained(tmp_path / "s")
    assert again.search({"q": "a queue"}) == made.search({"q": "a queue"})
    assert len(again.search({"q": "a queue"})["q"]) == len(PAIRS)


def test_its_folder_is_an_embedding_model(system: Retromae2, out) -> None:
    texts = [p.target for p in PAIRS[:5]]
    expected = system.encode(texts)[0]
    np.testing.assert_allclose(Embedder.from_pretrained(out).encode(texts), expected, atol=1e-5)
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(out), device="cpu"
    )
    np.testing.assert_allclose(theirs.encode(texts), expected, atol=1e-5)


def test_a_collection_is_searched_with_both_halves(
    system: Retromae2, out, tmp_path, capsys
) -> None:
    """The model's own scores, and those fused with BM25 by reciprocal ranks."""
    documents = {str(i): p.target for i, p in enumerate(PAIRS)}
    rows = [json.dumps({"id": i, "text": text}) for i, text in documents.items()]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    made, query = str(tmp_path / "index"), "how to use a queue"
    assert main(["index", str(tmp_path / "d.jsonl"), "-o", made, "-m", str(out)]) == 0
    found = {}
    for mode in ("learned", "dense", "auto"):
        capsys.readouterr()
        assert main(["search", made, query, "--mode", mode, "-k", "90", "--json"]) == 0
        hits = json.loads(capsys.readouterr().out)["hits"]
        found[mode] = {h["id"]: h["score"] for h in hits}
    system.index(documents)
    (asked,), texts = system.weigh([query]), system.weigh(list(documents.values()))
    overlap = {
        i: sum(v * text.get(t, 0.0) for t, v in asked.items())
        for i, text in zip(documents, texts, strict=True)
    }
    assert found["learned"] == pytest.approx({i: v for i, v in overlap.items() if v > 0}, abs=1e-5)
    own = system.search({"": query})
    assert found["dense"] == pytest.approx({i: own[""][i] - overlap[i] for i in own[""]}, abs=1e-5)
    words = SparseIndex()
    words.add(list(documents), [bag(text) for text in documents.values()])
    ids, scores = words.search([bag(query)], len(documents))
    bm25 = {i: float(v) for i, v in zip(ids[0], scores[0], strict=True) if v > 0}
    assert found["auto"] == pytest.approx(fuse([{"": bm25}, own], method="rrf")[""])


def test_a_collection_of_one_half_has_no_other(tmp_path) -> None:
    def weigh(texts, side):
        return [{"length": float(len(text))} for text in texts]

    Collection({"a": "one", "b": "three"}, weigh=weigh, model="lengths").save(tmp_path / "c")
    again = Collection.load(tmp_path / "c", lambda name: None, lambda name: weigh)
    assert [h.id for h in again.search("x")] == ["b", "a"] and again.dense is None
    with pytest.raises(InvalidInputError, match="no vectors"):
        again.search("x", mode="dense")
    with pytest.raises(MismatchError, match="lengths makes other"):
        Collection.load(tmp_path / "c", None, lambda name: lambda t, s: [{"length": 1.0}] * len(t))
    Collection({"a": "one"}).save(tmp_path / "words")
    with pytest.raises(InvalidInputError, match="no learned weights"):
        Collection.load(tmp_path / "words").search("x", mode="learned")


def test_it_answers_and_refuses(system: Retromae2, out, tmp_path) -> None:
    system.index({"a": "the mail", "b": "the queue"})
    answer = system.run("queue")
    assert {h["id"] for h in answer.record["hits"]} == {"a", "b"}
    json.dumps(answer.record)
    with pytest.raises(InvalidInputError, match="empty"):
        system.run(" ")
    with pytest.raises(InvalidInputError, match="search must be"):
        Retromae2.untrained(replace(TINY, search="all"), DATA)
    system.save_pretrained(tmp_path / "s")
    (tmp_path / "s" / "rest.safetensors").unlink()
    with pytest.raises(BrokenFileError):
        Retromae2.from_pretrained(tmp_path / "s")
