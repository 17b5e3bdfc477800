"""RASD: retrieval, pruning and fusion against plain sets; empty cases; losslessness."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.stores import SuffixStore
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree, merge
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.rasd import Rasd, Settings
from isthmus.testing import check_drafter
from isthmus.workbench.tokenizer import train_tokenizer

TARGET = TableTarget(12, seed=3, sharpness=2.0, order=2)
DRAFT = TableTarget(12, seed=4, sharpness=1.0, order=2)


def answers(drafter: Rasd | None, rows: list[list[int]], new: int = 40, **law: Any) -> list[Any]:
    """Results of the table target, all rows in one batch."""
    requests = [Request(torch.tensor(r), Stopper(max_new_tokens=new)) for r in rows]
    policy = Fixed(drafter, drafter.default_shape) if drafter else Fixed()
    generator = torch.Generator().manual_seed(0)
    for _ in decode(
        TARGET, requests, policy=policy, acceptance=Lossless(), law=Law(**law), generator=generator
    ):
        pass
    return [r.result for r in requests]


def draft(drafter: Rasd, ids: list[int], shape: Shape) -> TokenTree:
    """What is drafted after ids."""
    n = len(ids)
    context = Context(torch.tensor([ids]), [n], [n], Law(), torch.Generator(), [0])
    drafter.begin(context, TARGET)
    return drafter.propose(context, shape)


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    """All token paths below the root of a one-row tree."""
    tokens, parents = tree.tokens[0].tolist(), tree.topology.parents_list
    out: list[tuple[int, ...]] = [()]
    for node in range(1, tree.nodes):
        out.append((*out[parents[node]], tokens[node]))
    return set(out)


def text(new: int = 60) -> np.ndarray[Any, Any]:
    """What the target writes by itself."""
    return np.array([1, 2, *answers(None, [[1, 2]], new)[0].tokens])


def test_fusion_takes_the_likeliest_nodes_of_both() -> None:
    drafter = Rasd(DRAFT)
    drawn = TokenTree.from_paths(7, [[1, 2], [1, 3], [4]])
    chance = torch.tensor([1.0, 0.6, 0.1, 0.3, 0.2])  # of (), 1, 4, 12, 13
    assert paths(drawn) == {(), (1,), (1, 2), (1, 3), (4,)}
    retrieved = {(1,): 0.5, (1, 2): 0.4, (1, 2, 5): 0.25, (6,): 0.15, (6, 6): 0.05}
    fused = drafter.fuse(drawn, chance, retrieved, Shape(50, 10))
    assert paths(fused) == paths(drawn) | {(), *retrieved}
    assert paths(fused) == paths(merge(drawn, TokenTree.from_paths(7, list(retrieved))))
    cut = drafter.fuse(drawn, chance, retrieved, Shape(50, 2, 2))
    assert paths(cut) == {(), (1,), (6,), (1, 2), (1, 3), (6, 6)}, "4 would be a third child"
    drafter.offered = 0
    few = drafter.fuse(drawn, chance, retrieved, Shape(4, 9))
    assert paths(few) == {(), (1,), (1, 2), (1, 2, 5), (1, 3)} and drafter.offered == 3


def test_retrieval_keeps_likely_branches_and_estimates_their_probability() -> None:
    # after (1, 2): 3 5 twice, 3 6 once, 4 8 once
    ids = np.array([1, 2, 3, 5, 0, 1, 2, 3, 6, 0, 1, 2, 4, 8, 0, 1, 2, 3, 5, 0])
    store = SuffixStore(ids, 12, end=0)
    likely = {4: 0.5, 3: 0.3, 9: 0.2}
    drafter = Rasd(DRAFT, Settings(length=2), store)
    found = {(4,): 0.5, (3,): 0.3, (4, 8): 0.25, (3, 5): 0.15, (3, 6): 0.075}
    assert drafter.retrieve([9, 1, 2], likely) == pytest.approx(found)
    only = Rasd(DRAFT, Settings(length=2, retrieved=3), store)
    assert list(only.retrieve([1, 2], likely)) == [(4,), (3,), (4, 8)]
    assert only.retrieve([1, 2], {9: 1.0}) == {} and only.retrieve([7, 8], likely) == {}
    union = Rasd(DRAFT, Settings(length=2, prune=False), store)
    found = {(3,): 0.6, (3, 5): 0.3, (4,): 0.2, (3, 6): 0.15, (4, 8): 0.1}
    assert union.retrieve([1, 2], {}) == pytest.approx(found)


def test_without_a_match_the_model_alone_drafts() -> None:
    empty = SuffixStore(np.array([], dtype=np.int64), 12)
    shape = Shape(32, 10)
    alone = draft(Rasd(DRAFT, Settings(retrieved=0)), [1, 2, 3], shape)
    for drafter in (Rasd(DRAFT), Rasd(DRAFT, store=empty)):
        assert paths(draft(drafter, [1, 2, 3], shape)) == paths(alone)
    assert alone.nodes == 33, "what retrieval leaves is the model's"
    assert draft(Rasd(DRAFT, Settings(model=0), empty), [1, 2], shape).nodes == 1


def test_pruned_branches_begin_with_a_likely_token() -> None:
    store = SuffixStore(np.tile(np.arange(12), 3), 12)
    settings = Settings(model=0, top_k=2)
    for last in range(12):
        ids = [(last - 1) % 12, last]
        law = DRAFT.logits(DRAFT.state(torch.tensor([ids])))[0]
        likely = set(law.topk(2).indices.tolist())
        tree = draft(Rasd(DRAFT, settings, store), ids, Shape(32, 10))
        follows = (last + 1) % 12
        assert ((follows,) in paths(tree)) == (follows in likely)


@pytest.mark.parametrize("law", [{}, {"temperature": 1.0}])
def test_rows_of_a_batch_keep_the_plain_output(law: dict[str, float]) -> None:
    store = SuffixStore(text(), 12)
    rows = [[1, 2], [3, 4, 5], [6]]
    got = answers(Rasd(DRAFT, store=store), rows, **law)
    if not law:
        plain = answers(None, rows)
        assert [r.tokens for r in got] == [r.tokens for r in plain]
    assert all(len(r.tokens) == 40 for r in got)


def test_the_mechanism_matters() -> None:
    """With the target's own text as the datastore, the fused tree beats the model alone."""
    store = SuffixStore(text(), 12)
    small = {"nodes": 8, "model": 8}
    length = {
        name: answers(Rasd(DRAFT, settings, store), [[1, 2]])[0].stats.acceptance_length
        for name, settings in (
            ("on", Settings(**small, retrieved=5)),  # type: ignore[arg-type]
            ("off", Settings(**small, retrieved=0)),  # type: ignore[arg-type]
        )
    }
    assert length["on"] > length["off"] + 0.1


def test_the_contract_is_kept_with_a_datastore() -> None:
    target = TableTarget(11, seed=3, sharpness=2.0, order=2)
    guess = TableTarget(11, seed=4, sharpness=1.5, order=2)
    store = SuffixStore(np.array([0, 1, 2, 0, 1, 3, 1, 3, 2, 2, 0, 5] * 2), 11)
    check_drafter(lambda: Rasd(guess, store=store), target=target, shapes=(Shape(5, 2, 3),))


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="longest at least"):
        Rasd(DRAFT, Settings(longest=1))
    with pytest.raises(InvalidInputError, match="negative"):
        Rasd(DRAFT, Settings(retrieved=-1))
    with pytest.raises(MismatchError, match="vocabulary of 5"):
        draft(Rasd(DRAFT, store=SuffixStore(np.array([1]), 5)), [1, 2], Shape(4, 4))

    class Model:
        draft_model = None

    with pytest.raises(InvalidInputError, match="--draft-model"):
        Rasd.for_model(Model())


def test_a_datastore_is_built_from_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "words.txt"
    text.write_text("one two three one two four\n" * 3)
    tokenizer = train_tokenizer([text.read_text()], 280)
    target = TableTarget(280)
    model = SimpleNamespace(target=target, draft_model=target, tokenizer=tokenizer)
    made = [Rasd.for_model(model, files=[text]).store for _ in range(2)]
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 1
    ids = tokenizer.encode(text.read_text())
    for store in made:
        assert store is not None and store.end == tokenizer.eos_token_id
        assert store.ids.tolist() == [*ids, store.end]
        size, found = store.continuations([0, *ids[:12]], length=2)
        assert size == 12 and tuple(ids[12:14]) in found
