"""Stores: counts, suffix arrays and searches against slow references; files that are refused."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.decoding.stores import (
    Adapted,
    NGramStore,
    SuffixStore,
    Trie,
    likeliest_tree,
    tokenizer_hash,
)
from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError, MismatchError
from isthmus.roles import Shape

TEXTS = st.lists(st.integers(0, 4), max_size=60)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(2, 4), st.integers(1, 3))
def test_counts_equal_a_slow_reference(ids: list[int], order: int, keep: int) -> None:
    store = NGramStore.build(np.array(ids, dtype=np.int64), 5, order=order, keep=keep, end=4)
    grams = Counter(
        tuple(ids[i : i + order])
        for i in range(len(ids) - order + 1)
        if 4 not in ids[i : i + order]
    )
    contexts = {g[:-1] for g in grams}
    assert len(store.contexts) == len(contexts)
    for context in contexts:
        follow = {g[-1]: n for g, n in grams.items() if g[:-1] == context}
        want = sorted(follow, key=lambda t: (-follow[t], t))[:keep]
        tokens, weights = store.successors(context)
        assert tokens == want
        total = sum(follow.values())
        assert np.allclose(weights, [follow[t] / total for t in want])
    assert store.successors((4,) * (order - 1)) == ([], [])
    assert store.successors((0,) * (order - 2)) == ([], []), "too short a context knows nothing"


def test_nudge_adds_and_stops_at_the_cap_and_spares_the_table() -> None:
    store = NGramStore.build(np.array([1, 2, 3, 1, 2, 4]), 6)
    mine = Adapted(store, gain=0.4, cap=1.0, keep=2)
    mine.nudge([1, 2, 4])
    tokens, weights = mine.successors((1, 2))
    assert tokens == [4, 3] and weights == pytest.approx([0.9, 0.5])
    mine.nudge([1, 2, 4, 0])
    assert mine.successors((1, 2))[1] == pytest.approx([1.0, 0.5]), "capped, not renormalised"
    mine.nudge([1, 2, 5])
    assert mine.successors((1, 2))[0] == [4, 3], "only the best two are shown"
    mine.nudge([1, 2, 5])
    assert mine.successors((1, 2))[0] == [4, 5], "but all of them are remembered"
    assert mine.successors((2, 4)) == ([0], [0.4]), "a new context begins at the gain"
    assert store.successors((1, 2)) == ([3, 4], [0.5, 0.5])


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 4), max_size=12), st.integers(1, 9))
def test_the_longest_match_equals_a_slow_search(
    ids: list[int], context: list[int], reach: int
) -> None:
    store = SuffixStore(np.array(ids, dtype=np.int64), 5, reach=reach)
    prefixes = [ids[at : at + reach] for at in store.order.tolist()]
    assert all(a <= b for a, b in pairwise(prefixes))
    assert sorted(store.order.tolist()) == list(range(len(ids)))
    want: tuple[int, list[int]] = (0, [])
    for size in range(1, min(reach, len(context)) + 1):
        tail = context[-size:]
        hits = [i + size for i in range(len(ids) - size + 1) if ids[i : i + size] == tail]
        if hits:
            want = (size, hits)
    assert store.search(context, shortest=1) == want


def test_long_texts_of_one_token_and_large_vocabularies_sort() -> None:
    order = SuffixStore(np.zeros(40), 1, reach=16).order.tolist()
    assert order[:15] == list(range(39, 24, -1)) and sorted(order) == list(range(40))
    rng = np.random.default_rng(0)
    ids = rng.integers(149_990, 150_000, 300)
    store = SuffixStore(ids, 150_000)
    got = [ids[i : i + 16].tolist() for i in store.order]
    assert got == sorted(got)


def test_continuations_end_with_their_document() -> None:
    store = SuffixStore(np.array([1, 2, 3, 9, 1, 2, 9]), 10, end=9)
    assert store.continuations([1, 2], length=5) == (2, {(3,): 1})
    assert store.continuations([7, 8]) == (0, {})
    assert store.search([1, 2], limit=1)[1] in ([2], [6])


def test_best_first_is_the_most_likely_tree() -> None:
    table = {(0,): ([1, 2], [0.6, 0.4]), (1,): ([3, 4], [0.9, 0.1]), (2,): ([5, 6], [0.5, 0.5])}
    lookup = lambda at: table.get(at, ([], []))  # noqa: E731
    # 1: 0.6, 13: 0.54, 2: 0.4, 25: 0.2, 26: 0.2, 14: 0.06
    assert likeliest_tree(lookup, (0,), Shape(9, 9)).tokens == [0, 1, 3, 2, 5, 6, 4]
    assert likeliest_tree(lookup, (0,), Shape(3, 9)).tokens == [0, 1, 3, 2]
    assert likeliest_tree(lookup, (0,), Shape(9, 1)).tokens == [0, 1, 2]
    assert likeliest_tree(lookup, (0,), Shape(9, 9, 1)).tokens == [0, 1, 3]
    assert likeliest_tree(lookup, (7,), Shape(9, 9)).tokens == [7]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=8))
def test_a_trie_is_the_union_of_its_paths(paths: list[list[int]]) -> None:
    trie = Trie(9, Shape(1000, 10))
    added = sum(trie.add(p) for p in paths)
    tree = trie.tree()
    assert tree.nodes == added + 1
    got = set()
    for node in range(tree.nodes):
        path, at = [], node
        while at:
            path.append(trie.tokens[at])
            at = trie.parents[at]
        got.add(tuple(path[::-1]))
    assert got == {tuple(p[:n]) for p in paths for n in range(len(p) + 1)} | {()}


class _Tokenizer:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {w: i for i, w in enumerate(self.words)}


def test_files_come_back_and_belong_to_one_tokenizer(tmp_path: Path) -> None:
    mark, other = tokenizer_hash(_Tokenizer("a", "b")), tokenizer_hash(_Tokenizer("b", "a"))
    assert mark != other and tokenizer_hash(None) == ""
    ids = np.array([1, 2, 3, 1, 2, 3, 0, 1])
    grams = NGramStore.build(ids, 4, tokenizer=mark)
    suffixes = SuffixStore(ids, 4, reach=5, end=0, tokenizer=mark)
    for store in (grams, suffixes):
        path = tmp_path / f"{type(store).__name__}.safetensors"
        store.save(path)
        with pytest.raises(MismatchError, match="another tokenizer"):
            type(store).load(path, other)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(BrokenFileError, match="delete it"):
            type(store).load(path, mark)
        store.save(path)
    back = NGramStore.load(tmp_path / "NGramStore.safetensors", mark)
    assert back.successors((1, 2)) == grams.successors((1, 2)) == ([3], [1.0])
    again = SuffixStore.load(tmp_path / "SuffixStore.safetensors", mark)
    assert again.continuations([1, 2]) == suffixes.continuations([1, 2])
    assert again.continuations([1, 2])[1] == {(3, 1, 2, 3): 1, (3,): 1}
    with pytest.raises(BrokenFileError, match="not a NGramStore"):
        NGramStore.load(tmp_path / "SuffixStore.safetensors", mark)
    with pytest.raises(BrokenFileError, match="no store"):
        NGramStore.load(tmp_path / "absent", mark)
    grams.tokens = grams.tokens + 7  # a token outside the vocabulary
    grams.save(tmp_path / "bad.safetensors")
    with pytest.raises(BrokenFileError, match="damaged"):
        NGramStore.load(tmp_path / "bad.safetensors", mark)
    assert not list(tmp_path.glob(".*")), "no temporary file stays"


@pytest.mark.parametrize(
    "make",
    [
        lambda: NGramStore(4, order=1),
        lambda: NGramStore(200_000, order=4),
        lambda: NGramStore.build(np.array([5]), 4),
        lambda: NGramStore.build(np.array([1]), 4, keep=0),
        lambda: SuffixStore(np.array([[1]]), 4),
        lambda: SuffixStore(np.array([-1]), 4),
        lambda: SuffixStore(np.array([1]), 4, reach=0),
        lambda: NGramStore(4).require(5),
        lambda: SuffixStore(np.array([1]), 4).require(5),
    ],
)
def test_bad_input_is_refused_in_one_line(make: object) -> None:
    with pytest.raises(IsthmusError) as error:
        make()  # type: ignore[operator]
    assert "\n" not in str(error.value)
    assert isinstance(error.value, InvalidInputError | MismatchError)
