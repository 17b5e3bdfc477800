"""Retrieval tasks of the workbench."""

from __future__ import annotations

import ast

import pytest

from isthmus.errors import InvalidInputError
from isthmus.workbench import codesearch as tasks


def test_parts_share_no_package() -> None:
    packages = {
        part: {f.id.split(":")[0].split("/")[0] for f in tasks.functions(part)}
        for part in ("train", "dev", "test")
    }
    assert all(packages.values())
    assert not packages["train"] & packages["dev"] and not packages["test"] & packages["train"]
    assert sum(len(tasks.functions(p)) for p in packages) == len(tasks.functions())


def test_a_function_is_searched_without_its_docstring() -> None:
    task = tasks.doc2code("test")
    assert set(task.qrels) == set(task.queries)
    for query, text in list(task.queries.items())[:50]:
        for found in task.qrels[query]:
            tree = ast.parse(task.documents[found]).body[0]
            assert ast.get_docstring(tree) is None or text not in ast.get_docstring(tree)
    wide = tasks.doc2code("test", distractors=True)
    assert wide.queries.keys() == task.queries.keys()
    assert len(wide.documents) == len(tasks.functions()) > 4 * len(task.documents)


def test_equal_queries_are_one_with_several_documents() -> None:
    task = tasks.doc2code("train")
    assert len(set(task.queries.values())) == len(task.queries)
    assert max(map(len, task.qrels.values())) > 1


def test_without_names_less_leaks() -> None:
    named, hard = tasks.doc2code("test"), tasks.doc2code("test", names=False)
    assert 0.05 < tasks.leak(named) < 0.6
    assert all(d.startswith(("def f(", "async def f(", "@")) for d in hard.documents.values())
    some = next(iter(named.documents))
    assert named.documents[some] != hard.documents[some]
    for code in list(hard.documents.values())[:100]:
        compile(code, "f", "exec")


@pytest.mark.parametrize("words", [32, 200])
def test_long_documents_hide_one_passage(words: int) -> None:
    short, task = tasks.text("test"), tasks.long("test", words)
    assert task.queries == short.queries and task.qrels == short.qrels
    for key, text in task.documents.items():
        assert len(text.split()) == words
        own = short.documents[key].split()[:words]
        assert " ".join(own) in " ".join(text.split())
    assert tasks.long("test", words) == task
    assert tasks.long("test", words, seed=1).documents != task.documents


def test_a_span_is_found_by_its_rare_words_and_its_meaning() -> None:
    task = tasks.containing(64, 200, seed="a")
    assert len(task.documents) == 500 and len(task.queries) == 200
    again, other = tasks.containing(64, 200, seed="a"), tasks.containing(64, 200, seed="b")
    assert again == task and other.documents == task.documents and other.queries != task.queries
    fewest, most = tasks.SPAN
    for query, text in task.queries.items():
        assert fewest <= len(text.split()) <= most
        assert task.qrels[query]
        for key in task.qrels[query]:
            assert text in tasks.other_tongue(task.documents[key])
    plain = tasks.containing(64, 200, seed="a", tongue=False)
    assert plain.qrels == task.qrels
    assert tasks.bm25(plain) > 0.95 > tasks.bm25(task) + 0.1
    pairs = tasks.spans(64, 20, seed="a")
    assert len(pairs) == 20 and pairs != tasks.spans(64, 20, seed="b")
    assert all(p.source in tasks.other_tongue(p.target) for p in pairs)
    with pytest.raises(InvalidInputError, match="at most"):
        tasks.containing(64, 10, documents=10**6)
    with pytest.raises(InvalidInputError, match="25 words"):
        tasks.containing(24, 10)


def test_wrong_parts_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="train, dev, test"):
        tasks.text("tset")
    with pytest.raises(InvalidInputError, match="at least"):
        tasks.long("test", 2)
