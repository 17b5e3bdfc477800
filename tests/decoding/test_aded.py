"""ADED: the PUCT value by hand, the searched tree, adaptation on and off, losslessness."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.puct import Puct
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.stores import NGramStore
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.aded import Aded, Settings
from isthmus.testing import check_drafter
from isthmus.workbench import corpus
from isthmus.workbench.tokenizer import train_tokenizer

TARGET = TableTarget(30, seed=3, sharpness=3.0, order=2)


def run(drafter: Aded | None, prompt: list[int], new: int = 60, **law: Any) -> Any:
    """One answer of the table target."""
    request = Request(torch.tensor(prompt), Stopper(max_new_tokens=new))
    policy = Fixed(drafter, drafter.default_shape) if drafter else Fixed()
    generator = torch.Generator().manual_seed(0)
    for _ in decode(
        TARGET, [request], policy=policy, acceptance=Lossless(), law=Law(**law), generator=generator
    ):
        pass
    return request.result


def draft(drafter: Aded, ids: list[int], shape: Shape) -> Any:
    """What is drafted after ids."""
    n = len(ids)
    context = Context(torch.tensor([ids]), [n], [n], Law(), torch.Generator(), [0])
    drafter.begin(context, TARGET)
    return drafter.propose(context, shape)


def test_puct_value_on_a_hand_tree() -> None:
    """Three kids of a root with N = 9; the second wins by 18.96 against 18.39 and 13.02."""
    search = Puct(lambda at: ([], []), random.Random(0))
    search.visits, search.total = [9, 4, 2, 2], [0.0, 8.0, 3.0, 2.0]
    search.prior = [0.0, 0.7, 0.5, 0.3]
    scale = 3 * (32 + math.log(18 / 8))
    values = [
        2.0 + scale * 0.7 / 5,
        1.5 + scale * 0.5 / 3,
        1.0 + scale * 0.3 / 3,
    ]
    assert values == pytest.approx([15.7805, 17.9054, 10.8433], abs=1e-3)
    assert search.select(0, [1, 2, 3]) == 1 + values.index(max(values))
    search.visits[3] = 0
    assert search.select(0, [1, 2, 3]) == 3, "a child that was never visited comes first"


def test_scores_are_passed_up_along_parents() -> None:
    table = {(0,): ([1], [0.5]), (1,): ([2], [0.25])}
    search = Puct(lambda at: table.get(at, ([], [])), random.Random(0), depth=2)
    search.run((0,), 3)
    # every sentence is 1, 2 and scores 1 + 0.5 + 0.25, wherever its simulation turned to a roll-out
    assert search.tokens == [0, 1, 2] and search.parents == [-1, 0, 1]
    assert search.visits == [3, 2, 1] and search.total == [5.25, 3.5, 1.75]


def test_visits_add_up_and_follow_the_weights() -> None:
    rng = np.random.default_rng(0)
    store = NGramStore.build(rng.integers(0, 6, 400), 6)
    search = Puct(store.successors, random.Random(1))
    search.run((2, 3), 150)
    assert search.visits[0] == 150
    for node, kids in enumerate(search.kids):
        for kid in kids or []:
            assert search.parents[kid] == node and search.contexts[kid][-1] == search.tokens[kid]
        if kids:
            assert sum(search.visits[k] for k in kids) == search.visits[node] - 1, (
                "all simulations but the one that expanded a node went on below it"
            )
    first = search.kids[0] or []
    heaviest = max(first, key=lambda k: search.prior[k])
    assert search.visits[heaviest] == max(search.visits[k] for k in first)


def test_the_most_visited_prefixes_are_drafted_one_token_longer() -> None:
    store = NGramStore.build(np.array([1, 2, 3, 4, 5, 6, 7, 8]), 30)
    chain = draft(Aded(Settings(adapt=False), store), [1, 2], Shape(64, 5, 12))
    assert chain.tokens[0].tolist() == [2, 3, 4, 5, 6, 7], "four searched tokens and one more"
    bare = draft(Aded(Settings(adapt=False), store), [9, 9], Shape(64, 5, 12))
    assert bare.nodes == 1
    assert draft(Aded(Settings(), store), [2], Shape(64, 5, 12)).nodes == 1, "no bigram yet"
    text = np.random.default_rng(0).integers(0, 9, 500)
    for search in ("puct", "best-first"):
        drafter = Aded(Settings(search=search), NGramStore.build(text, 30))  # type: ignore[arg-type]
        for shape in (Shape(24, 5, 12), Shape(6, 2, 3), Shape(4, 4, 1)):
            tree = draft(drafter, [1, 2], shape)
            assert 1 < tree.nodes <= shape.nodes + 1 and tree.topology.max_depth <= shape.depth


def test_the_contract_is_kept_with_a_table() -> None:
    store = NGramStore.build(np.array([0, 1, 2, 0, 1, 3, 1, 3, 2, 2, 0, 5] * 2), 11)
    for search in ("puct", "best-first"):
        made = Settings(iterations=12, search=search)  # type: ignore[arg-type]
        check_drafter(lambda made=made: Aded(made, store), shapes=(Shape(6, 2, 3),))  # type: ignore[misc]


def test_the_mechanism_matters_and_the_output_stays() -> None:
    plain = run(None, [1, 2], new=200)
    on, off = (run(Aded(Settings(adapt=a)), [1, 2], new=200) for a in (True, False))
    assert on.tokens == off.tokens == plain.tokens
    assert off.stats.acceptance_length == 1.0, "an empty table that never learns drafts nothing"
    assert on.stats.acceptance_length > 1.5
    written = NGramStore.build(np.array(plain.tokens), 30)
    known = run(Aded(Settings(adapt=False), written), [1, 2], new=200)
    assert known.tokens == plain.tokens and known.stats.acceptance_length > 2.0


def test_learning_is_kept_only_when_asked_and_never_in_the_store() -> None:
    store = NGramStore.build(np.array([1, 2, 3]), 30)
    before = store.weights.copy()
    for remember in (True, False):
        drafter = Aded(Settings(remember=remember), store)
        cold = run(drafter, [1, 2], new=200).stats.acceptance_length
        warm = run(drafter, [1, 2], new=200).stats.acceptance_length
        assert (warm > cold) == remember
    assert np.array_equal(store.weights, before)


def test_weights_grow_by_the_gain_with_every_round() -> None:
    drafter = Aded(Settings(gain=0.04))
    draft(drafter, [5, 6, 7], Shape(4, 4, 1))
    assert drafter.table is not None
    assert drafter.table.successors((5, 6)) == ([7], [0.04])


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="best-first"):
        Aded(Settings(search="random"))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="at least 1"):
        Aded(Settings(iterations=0))
    with pytest.raises(MismatchError, match="vocabulary of 7"):
        run(Aded(store=NGramStore(7)), [1, 2])


def test_a_store_is_built_from_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "words.txt"
    text.write_text("one two three one two four\n" * 3)
    tokenizer = train_tokenizer([text.read_text()], 300)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)

    class Model:
        target = TableTarget(300)

    model: Any = Model()
    model.tokenizer = tokenizer
    drafter = Aded.for_model(model, files=[text])
    assert drafter.store is not None
    ids = tokenizer.encode(text.read_text())
    for first in range(len(ids) - 2):
        context = (ids[first], ids[first + 1])
        assert ids[first + 2] in drafter.store.successors(context)[0]
    kept = sorted((tmp_path / "cache" / "stores").iterdir())
    assert len(kept) == 1
    again = Aded.for_model(model, files=[text])
    assert again.store is not None and again.store.successors(context) == (
        drafter.store.successors(context)
    )
    text.write_text("another text altogether, of another fingerprint")
    Aded.for_model(model, files=[text])
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 2
    with pytest.raises(InvalidInputError, match="at least one file"):
        corpus.texts([])
    model.tokenizer = None
    with pytest.raises(InvalidInputError, match="tokenizer"):
        Aded.for_model(model, files=[text])
