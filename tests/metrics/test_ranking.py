"""Measures of rankings, beside trec_eval."""

from __future__ import annotations

from pathlib import Path

import ir_measures
import numpy as np
import pytest

from isthmus.errors import BrokenFileError, InvalidInputError, UnknownNameError
from isthmus.metrics.ranking import (
    evaluate,
    paired_bootstrap,
    ranked,
    read_qrels,
    read_run,
    write_qrels,
    write_run,
)

NAMES = {
    "ndcg@10": "nDCG@10",
    "ndcg": "nDCG",
    "mrr": "RR",
    "map": "AP",
    "map@5": "AP@5",
    "recall@5": "R@5",
    "success@3": "Success@3",
    "precision@5": "P@5",
}


def random_task(seed: int) -> tuple[dict, dict]:
    """Graded relevances, and coarse scores with many ties; a query finds nothing."""
    rng = np.random.default_rng(seed)
    docs = [f"d{i}" for i in range(30)]
    qrels, run = {}, {}
    for q in range(12):
        judged = {d: int(r) for d, r in zip(docs, rng.integers(0, 4, 30), strict=True) if r}
        qrels[f"q{q}"] = dict(list(judged.items())[: int(rng.integers(1, 12))])
        shown = rng.choice(docs, 20, replace=False)
        run[f"q{q}"] = {str(d): float(rng.integers(0, 6)) for d in shown}
    return qrels, {k: v for k, v in run.items() if k != "q3"}


@pytest.mark.parametrize("seed", range(5))
def test_all_measures_are_those_of_trec_eval(seed: int) -> None:
    qrels, run = random_task(seed)
    ours = evaluate(qrels, run, list(NAMES))
    measures = {ir_measures.parse_measure(v): k for k, v in NAMES.items()}
    theirs = {(measures[m.measure], m.query_id): m.value for m in
              ir_measures.iter_calc(measures, qrels, run)}  # fmt: skip
    for name, values in ours.items():
        for query, value in zip(qrels, values, strict=True):
            assert value == pytest.approx(theirs.get((name, query), 0.0), abs=1e-6), (name, query)


def test_a_reciprocal_rank_below_the_cut_is_0() -> None:
    run = {"q": {f"d{i}": -float(i) for i in range(20)}}
    found = evaluate({"q": {"d10": 1}}, run, ["mrr@10", "mrr@11"])
    assert found["mrr@10"][0] == 0 and found["mrr@11"][0] == 1 / 11


def test_exponential_gain_by_hand() -> None:
    values = evaluate(
        {"q": {"a": 2, "b": 1}}, {"q": {"b": 2.0, "a": 1.0}}, ["ndcg@2"], gain="exponential"
    )
    best, got = 3 + 1 / np.log2(3), 1 + 3 / np.log2(3)
    assert values["ndcg@2"][0] == pytest.approx(got / best)


def test_ties_have_a_switch() -> None:
    scores = {"a": 1.0, "b": 1.0}
    assert ranked(scores) == ["b", "a"] and ranked(scores, "ascending") == ["a", "b"]
    assert evaluate({"q": {"a": 1}}, {"q": scores}, ["mrr"])["mrr"][0] == 0.5
    assert evaluate({"q": {"a": 1}}, {"q": scores}, ["mrr"], ties="ascending")["mrr"][0] == 1


def test_what_cannot_be_judged_is_refused() -> None:
    run = {"q": {"a": 1.0}}
    with pytest.raises(InvalidInputError, match="no relevant document"):
        evaluate({"q": {"a": 0}}, run)
    with pytest.raises(InvalidInputError, match="not a finite number"):
        evaluate({"q": {"a": 1}}, {"q": {"a": float("nan")}})
    with pytest.raises(InvalidInputError, match="qrels are empty"):
        evaluate({}, run)
    with pytest.raises(UnknownNameError, match="ndcg"):
        evaluate({"q": {"a": 1}}, run, ["ndgc@10"])
    for name in ("precision", "recall@0"):
        with pytest.raises(InvalidInputError):
            evaluate({"q": {"a": 1}}, run, [name])


def test_the_interval_of_a_difference_covers_it() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        gaps = rng.normal(0.1, 1.0, 50)
        found = paired_bootstrap(gaps, np.zeros(50), samples=400, seed=seed)
        covered += found.low <= 0.1 <= found.high
    assert 180 <= covered <= 200
    with pytest.raises(InvalidInputError, match="query by query"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_trec_files(tmp_path: Path) -> None:
    qrels, run = random_task(0)
    write_qrels(tmp_path / "qrels", qrels)
    write_run(tmp_path / "run", run)
    assert read_qrels(tmp_path / "qrels") == qrels
    assert read_run(tmp_path / "run") == run
    theirs = {q.query_id for q in ir_measures.read_trec_qrels(str(tmp_path / "qrels"))}
    assert theirs == set(qrels)
    (tmp_path / "bad").write_text("q 0 d 1\nq 0 d\n")
    with pytest.raises(BrokenFileError, match="bad, line 2: needs 4 columns"):
        read_qrels(tmp_path / "bad")
    (tmp_path / "bad").write_text("q Q0 d 1 high me\n")
    with pytest.raises(BrokenFileError, match="line 1: 'high' is no score"):
        read_run(tmp_path / "bad")
    with pytest.raises(InvalidInputError, match="no room"):
        write_run(tmp_path / "x", {"q": {"a b": 1.0}})
