"""Indexes beside brute force and bm25s; files that are altered."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest
import torch

from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.indexes import dense
from isthmus.indexes.base import to_run
from isthmus.indexes.dense import DenseIndex
from isthmus.indexes.fusion import best_weight, fuse
from isthmus.indexes.multi_vector import MultiVectorIndex
from isthmus.indexes.sparse import SparseIndex, bag, words
from isthmus.roles import Index

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(300, 16)).astype(np.float32)
QUERIES = RNG.normal(size=(7, 16)).astype(np.float32)
IDS = [f"d{i}" for i in range(300)]
VOCABULARY = [f"w{i}" for i in range(40)]
TEXTS = [
    " ".join(RNG.choice(VOCABULARY, RNG.integers(1, 30), p=np.arange(40, 0, -1) / 820))
    for _ in range(60)
]


def filled(**settings) -> DenseIndex:
    index = DenseIndex(**settings)
    index.add(IDS[:100], VECTORS[:100])
    index.add(IDS[100:], torch.from_numpy(VECTORS[100:]))
    return index


def test_dense_equals_sorting_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK", 64)
    monkeypatch.setattr(dense, "ROWS", 3)
    ids, scores = filled().search(QUERIES, 20)
    every = QUERIES @ VECTORS.T
    order = np.argsort(-every, axis=1)[:, :20]
    assert ids == [[IDS[p] for p in row] for row in order]
    np.testing.assert_allclose(scores, np.take_along_axis(every, order, 1), rtol=1e-5)


@pytest.mark.parametrize("block", [2, 100])
def test_equal_scores_come_in_the_order_of_ids(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(dense, "BLOCK", block)
    index = DenseIndex()
    index.add(["c", "a", "e", "b", "d"], np.ones((5, 2)))
    assert index.search([[1.0, 1.0]], 3)[0] == [["a", "b", "c"]]
    assert index.search([[1.0, 1.0]], 9)[0] == [["a", "b", "c", "d", "e"]]


def test_small_vectors_keep_most_of_the_ranking() -> None:
    truth = filled().search(QUERIES, 10)[0]
    kept = {}
    for precision in ("float32", "int8", "binary"):
        index = filled(precision=precision)
        found = index.search(QUERIES, 10)[0]
        kept[precision] = np.mean(
            [len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)]
        )
        assert index.exact == (precision == "float32")
        assert index.nbytes == {"float32": 4, "int8": 1, "binary": 1 / 8}[precision] * 300 * 16
    assert kept["float32"] == 1 and kept["int8"] >= 0.95 and kept["binary"] >= 0.3
    scale = np.abs(VECTORS[:100]).max(0) / 127
    rounded = np.clip(np.rint(VECTORS / scale), -127, 127) * scale
    expected = np.sort(QUERIES @ rounded.T, axis=1)[:, ::-1][:, :10]
    np.testing.assert_allclose(filled(precision="int8").search(QUERIES, 10)[1], expected, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_graph_says_how_much_it_finds(precision: str) -> None:
    index = filled(graph=True, precision=precision)
    ids, scores = index.search(QUERIES, 10)
    assert not index.exact
    assert index.recall(QUERIES, 10) >= 0.9
    assert filled(precision=precision).recall(QUERIES, 10) == 1
    exact = to_run(list("abcdefg"), filled(precision=precision).search(QUERIES, 300))
    for query, row, values in zip("abcdefg", ids, scores, strict=True):
        assert [exact[query][d] for d in row] == pytest.approx(values.tolist(), rel=1e-4)
        assert (np.diff(values) <= 0).all()
    one = filled(graph=True, expansion=1, connectivity=2)
    assert one.recall(QUERIES, 10) < index.recall(QUERIES, 10)


@pytest.mark.parametrize("weighting", ["lucene", "robertson", "atire"])
@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.4), (2.0, 0.0)])
def test_bm25_is_that_of_bm25s(weighting: str, k1: float, b: float) -> None:
    index = SparseIndex(weighting, k1, b)
    index.add(IDS[:40], [bag(t) for t in TEXTS[:40]])
    index.add(IDS[40:60], [bag(t) for t in TEXTS[40:]])
    reference = bm25s.BM25(method=weighting, k1=k1, b=b)
    reference.index([words(t) for t in TEXTS], show_progress=False)
    for query in ("w1 w5", "w0", "w30 w30 w2 unheard"):
        ids, scores = index.search([bag(query)], 60)
        theirs = reference.get_scores([w for w in words(query) if w in index.terms])
        ours = np.array([dict(zip(ids[0], scores[0], strict=True))[i] for i in IDS[:60]])
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_learnt_sparse_vectors_are_an_inner_product() -> None:
    index = SparseIndex("none")
    index.add(["a", "b", "c"], [{"x": 1.0, "y": 2.0}, {"y": 0.5}, {}])
    ids, scores = index.search([{"y": 2.0, "x": 1.0}, {"z": 1.0}], 3)
    assert ids == [["a", "b", "c"], ["a", "b", "c"]]
    assert scores.tolist() == [[5.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", [DenseIndex, SparseIndex, MultiVectorIndex])
def test_all_play_the_role(kind: type) -> None:
    assert isinstance(kind(), Index)


def test_words_of_code() -> None:
    assert words("parse_HTTPHeader2 = x.getXML()") == [
        "parse",
        "http",
        "header",
        "2",
        "x",
        "get",
        "xml",
    ]
    assert words("Дата 日本") == ["дата", "日本"]
    assert bag("aB ab AB") == Counter({"a": 1, "b": 1, "ab": 2})


@pytest.mark.parametrize("interaction", ["sum", "max"])
def test_several_vectors_equal_the_triple_loop(interaction: str) -> None:
    documents = [RNG.normal(size=(n, 8)) for n in (1, 4, 2, 7)]
    query = RNG.normal(size=(3, 8))
    index = MultiVectorIndex(interaction)
    index.add(list("abcd"), documents)
    together = {"sum": sum, "max": max}[interaction]
    expected = {
        name: together(max(float(q @ d) for d in document) for q in query)
        for name, document in zip("abcd", documents, strict=True)
    }
    found = to_run(["q"], index.search([query], 4))["q"]
    assert list(found) == sorted(expected, key=lambda d: -expected[d])
    assert found == pytest.approx(expected, rel=1e-5)


def test_one_vector_a_document_is_a_dense_index() -> None:
    index = MultiVectorIndex()
    index.add(IDS, VECTORS[:, None])
    ids, scores = index.search(QUERIES[:, None], 12)
    expected = filled().search(QUERIES, 12)
    assert ids == expected[0]
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5)


def sparse() -> SparseIndex:
    index = SparseIndex("atire", 0.9, 0.4)
    index.add(IDS[:60], [bag(t) for t in TEXTS])
    return index


def several() -> MultiVectorIndex:
    index = MultiVectorIndex("max")
    index.add(IDS[:20], [VECTORS[i : i + 1 + i % 3] for i in range(20)])
    return index


KINDS = {
    "float32": (filled, QUERIES),
    "int8": (lambda: filled(precision="int8"), QUERIES),
    "binary": (lambda: filled(precision="binary"), QUERIES),
    "graph": (lambda: filled(graph=True), QUERIES),
    "sparse": (sparse, [bag("w1 w7"), bag("w3")]),
    "several": (several, QUERIES[:, None]),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_index_on_disk_finds_the_same(tmp_path: Path, name: str) -> None:
    make, queries = KINDS[name]
    index = make()
    expected = index.search(queries, 9)
    for _ in range(2):  # the second replaces the first
        index.save(tmp_path / "index")
    again = type(index).load(tmp_path / "index")
    found = again.search(queries, 9)
    assert found[0] == expected[0] and (found[1] == expected[1]).all()
    assert again.exact == index.exact
    with pytest.raises(InvalidInputError, match="'d3' is there already"):
        again.add(["x", "d3"], None)


@pytest.mark.parametrize("name", ["float32", "sparse", "several"])
def test_altered_files_are_refused(tmp_path: Path, name: str) -> None:
    index, folder = KINDS[name][0](), tmp_path / "index"
    for file, change in (
        ("index.safetensors", lambda b: b[:-1]),
        ("index.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("ids.json", lambda b: b.replace(b"d3", b"d4")),
        ("index.json", lambda b: b[:-3]),
        ("index.json", lambda b: b.replace(b"settings", b"setting")),
    ):
        index.save(folder)
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        with pytest.raises(BrokenFileError, match="build"):
            type(index).load(folder)
    index.save(folder)
    (folder / "ids.json").unlink()
    with pytest.raises(BrokenFileError):
        type(index).load(folder)
    other = MultiVectorIndex if name == "float32" else DenseIndex
    index.save(folder)
    with pytest.raises(MismatchError, match="index of kind"):
        other.load(folder)
    with pytest.raises(BrokenFileError, match="holds no index"):
        other.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["float32", "int8", "sparse", "several"])
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path: Path, name: str) -> None:
    """With digests that were put right, too."""
    from safetensors.numpy import load_file, save_file

    from isthmus.indexes.base import digest

    index, folder = KINDS[name][0](), tmp_path / "index"
    index.save(folder)
    tensors = folder / "index.safetensors"
    whole = load_file(tensors)
    for key, value in whole.items():
        if key == "vocabulary":
            continue
        save_file({**whole, key: value[:-1] if len(value) > 1 else value + 1}, tensors)
        told = json.loads((folder / "index.json").read_text())
        told["sha256"]["index.safetensors"] = digest(tensors)
        (folder / "index.json").write_text(json.dumps(told))
        with pytest.raises(BrokenFileError, match="damaged"):
            type(index).load(folder)


def test_wrong_input_is_refused() -> None:
    index = filled()
    for ids, reps, says in (
        (["x"], np.ones((2, 16)), "1 ids for 2"),
        (["x"], np.ones((1, 5)), r"\[N, 16\]"),
        (["x"], np.full((1, 16), np.nan), "not finite"),
        (["x", "x"], np.ones((2, 16)), "id of its own"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            index.add(ids, reps)
    assert len(index) == 300 and index.search(QUERIES, 1)[1].shape == (7, 1)
    with pytest.raises(InvalidInputError, match="at least 1"):
        index.search(QUERIES, 0)
    for kind in (DenseIndex, SparseIndex, MultiVectorIndex):
        with pytest.raises(InvalidInputError, match="empty"):
            kind().search([], 1)
    with pytest.raises(InvalidInputError, match="not negative"):
        SparseIndex().add(["a"], [{"x": -1.0}])
    with pytest.raises(InvalidInputError, match="at least one vector"):
        MultiVectorIndex().add(["a"], [np.empty((0, 4))])
    with pytest.raises(InvalidInputError, match="float32, int8, binary"):
        DenseIndex("int4")
    with pytest.raises(InvalidInputError, match="weighting"):
        SparseIndex("bm26")


def test_fusion() -> None:
    first = {"q": {"a": 3.0, "b": 1.0}, "r": {"a": 1.0}}
    second = {"q": {"b": 10.0, "c": 0.0}}
    assert fuse([first, second], weights=[1, 0]) == {
        "q": {"a": 3, "b": 1, "c": 1},
        "r": {"a": 1},
    }
    scaled = fuse([first, second], scaling="min-max")["q"]
    assert scaled == {"a": 1.0, "b": 1.0, "c": 0.0}
    standard = fuse([first, second], scaling="z-score")["q"]
    assert standard == {"a": 0.0, "b": 0.0, "c": -2.0}
    reciprocal = fuse([first, second], method="rrf", weights=[1, 2])["q"]
    assert reciprocal == pytest.approx({"a": 1 / 61, "b": 1 / 62 + 2 / 61, "c": 2 / 62})
    qrels = {"q": {"b": 1}, "r": {"a": 1}}
    assert best_weight(first, second, qrels, [0.0, 0.1, 1.0]) == 1.0
    assert best_weight(first, second, {"q": {"a": 1}}, [0.0, 0.1, 1.0]) == 0.0
    with pytest.raises(InvalidInputError, match="weight"):
        fuse([first, second], weights=[1])
    with pytest.raises(InvalidInputError, match="rrf"):
        fuse([first], method="borda")
