"""Consensus and minimum Bayes risk against sums by hand, samples against the law."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import tiny
import torch

from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.rerank import Consensus, Samples, consensus, ngram_f
from isthmus.decoding.search import search
from isthmus.decoding.table import TableTarget
from isthmus.errors import DeadEnd, InvalidInputError
from isthmus.metrics.cider import CiderD
from isthmus.roles import Hypothesis, Rerank, Search


def said(*texts):
    return [Hypothesis(tuple(map(ord, t)), 0.0, 0.0) for t in texts]


def test_support_is_the_mean_over_the_others():
    u = np.array([[9.0, 1.0, 2.0], [3.0, 9.0, 4.0], [5.0, 6.0, 9.0]])
    assert consensus(u).tolist() == [1.5, 3.5, 5.5]
    with pytest.raises(InvalidInputError, match=r"finite matrix \[n, n\], got \[2, 3\]"):
        consensus(np.zeros((2, 3)))


def test_ties_go_to_the_first_and_a_copy_raises_its_score():
    rule = Consensus()
    assert rule.choose(said("ab", "ab")) == 0 and rule.choose(said("xy", "ab")) == 0
    texts = ["the cat", "a dog!", "cowboys"]
    rule.choose(said(*texts))
    before = rule.support[1]
    assert rule.choose(said(*texts, "a dog!")) == 1 and rule.support[1] > before
    assert rule.choose(said("alone")) == 0
    assert isinstance(rule, Rerank) and isinstance(Samples(), Search)


def test_ngram_f_is_the_mean_f1():
    def f1(a, b, n):
        grams = [[t[i : i + n] for i in range(len(t) - n + 1)] for t in (a, b)]
        shared = sum(min(grams[0].count(g), grams[1].count(g)) for g in {*grams[0]})
        sizes = len(grams[0]) + len(grams[1])
        return 2 * shared / sizes if sizes else None

    texts = ["abab", "abb", "c", "", "ababab"]
    found = ngram_f(texts, orders=3)
    for (i, a), (j, b) in itertools.product(enumerate(texts), repeat=2):
        parts = [p for n in (1, 2, 3) if (p := f1(a, b, n)) is not None]
        assert found[i, j] == pytest.approx(sum(parts) / len(parts) if parts else 1.0)


def test_samples_have_the_law_of_whole_answers():
    target = TableTarget(4, seed=3, end_token=0)
    law = Law(temperature=1.0)
    width = 4_000
    found = search(
        target,
        [torch.tensor([1])],
        Samples(width),
        max_new_tokens=3,
        end_tokens=[0],
        law=law,
        generator=torch.Generator().manual_seed(0),
        renormalize=True,
    )[0]
    truth = target.truth([1], 3, law)
    counts = Counter(h.tokens for h in found)
    assert sum(counts.values()) == width and set(counts) <= set(truth)
    for answer, p in truth.items():
        assert abs(counts[answer] - width * p) < 5 * (width * p * (1 - p)) ** 0.5 + 1
    for h in found[:50]:
        assert h.logprob == pytest.approx(np.log(truth[h.tokens]), abs=1e-5)


def test_mbr_is_a_strategy_in_both_doors():
    model = Model(tiny.target("Llama", "float32"))
    told = {"max_new_tokens": 5, "strategy": "mbr", "n": 6, "seed": 1}
    found = model.generate([3, 4, 5], **told)
    assert len(found.hypotheses) == 6
    answers = [h.tokens for h in found.hypotheses]
    support = consensus(ngram_f(answers))
    assert found.tokens == list(answers[0]) and support[0] == support.max()
    assert model.generate([3, 4, 5], **told).tokens == found.tokens
    with pytest.raises(InvalidInputError, match="takes no drafts"):
        model.generate([3], drafter="prompt-lookup", **told)
    with pytest.raises(InvalidInputError, match="samples must be at least 1"):
        model.generate([3], **{**told, "n": 0})


def test_a_law_without_a_token_is_a_dead_end():
    samples = Samples(2)
    samples.start(1, torch.Generator(), end_tokens=[], max_new_tokens=2)
    with pytest.raises(DeadEnd):
        samples.step(torch.full((1, 1, 3), -torch.inf))


def test_cider_by_hand():
    corpus = [[["a", "b", "c", "d"]], [["a", "x"]], [["y", "z"], ["y", "a"]]]
    cider = CiderD(corpus)
    assert cider.documents == 3 and cider.frequency[("a",)] == 3 and cider.frequency[("y",)] == 1
    assert cider.score(["a", "b", "c", "d"], [["a", "b", "c", "d"]]) == pytest.approx(10.0)
    # every unigram but "a" (idf 0) weighs log 3; "b c" of order 2 and nothing of orders 3 and 4
    idf = np.log(3)
    one = 2 * idf**2 / (np.sqrt(2) * idf * np.sqrt(3) * idf)  # b, c of b, c, d
    two = idf**2 / (idf * np.sqrt(3) * idf)  # "b c" alone in the candidate
    penalty = np.exp(-(2**2) / (2 * 36))
    assert cider.score(["b", "c"], [["a", "b", "c", "d"]]) == pytest.approx(
        10 * penalty * (one + two) / 4
    )
    u = cider.matrix([["b", "c"], ["a", "b", "c", "d"], []])
    assert u[0][1] == pytest.approx(10 * penalty * (one + two) / 4) and u[2] == [0.0, 0.0, 0.0]
    # counts are clipped: saying a word twice is no better than once, but for the length
    twice = cider.score(["b", "b"], [["b", "q"]])
    assert twice <= cider.score(["b", "r"], [["b", "q"]]) * np.sqrt(2)
