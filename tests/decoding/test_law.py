"""The law: as transformers composes it, and every node of a tree sees its own path."""

from typing import Any

import pytest
import torch
from transformers.generation import logits_process as lp

from isthmus.decoding.law import Law, chain_logits, node_prefixes
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Context


class ReadsPrefix(lp.LogitsProcessor):
    """A custom processor: bans the token after the sum of the prefix."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        banned = input_ids.sum(1, keepdim=True) % scores.shape[1]
        return scores.scatter(1, banned, -torch.inf)


LAWS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.3},
    "custom": {"temperature": 1.0, "processors": [ReadsPrefix()]},
    "no-repeat": {"temperature": 1.0, "processors": [lp.NoRepeatNGramLogitsProcessor(2)]},
    "all": {
        "temperature": 0.7,
        "top_k": 6,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "processors": [lp.NoRepeatNGramLogitsProcessor(3), ReadsPrefix()],
    },
}


def ragged() -> tuple[TokenTree, Context]:
    """Two rows of unlike length and a tree of three levels."""
    ids = torch.tensor([[1, 2, 3, 1, 2, 0], [4, 5, 4, 0, 0, 0]])
    lengths = [5, 3]
    tokens = torch.tensor([[2, 3, 6, 1, 7], [4, 5, 4, 4, 5]])
    tree = TokenTree(tokens, Topology.of([-1, 0, 0, 1, 3]))
    context = Context(ids, lengths, [2, 2], Law(), torch.Generator(), [0, 1])
    return tree, context


def path_ids(tree: TokenTree, context: Context, row: int, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(int(tree.tokens[row, node]))
        node = int(tree.topology.parent[0, node])
    return context.ids[row, : context.lengths[row] - 1].tolist() + path[::-1]


@pytest.mark.parametrize("name", LAWS)
def test_every_node_sees_its_own_path(name: str) -> None:
    tree, context = ragged()
    law = Law(**LAWS[name])
    logits = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    got = law.logits(logits, tree, context)
    for row in range(2):
        for node in range(5):
            ids = torch.tensor([path_ids(tree, context, row, node)])
            want = law.row(logits[row, node][None], ids)[0]
            torch.testing.assert_close(got[row, node], want, rtol=0, atol=0)
    probs = law.probs(logits, tree, context)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 5).double())
    assert bool((probs[got == -torch.inf] == 0.0).all())


@pytest.mark.parametrize("name", ["temperature", "top-k", "top-p", "min-p", "repetition"])
def test_row_equals_transformers(name: str) -> None:
    """The same numbers as the processors that ``generate`` would build."""
    options = LAWS[name]
    chain = lp.LogitsProcessorList()
    if "repetition_penalty" in options:
        chain.append(lp.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options["temperature"] != 1.0:
        chain.append(lp.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        chain.append(lp.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        chain.append(lp.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        chain.append(lp.MinPLogitsWarper(options["min_p"]))
    ids = torch.randint(0, 9, (20, 6), generator=torch.Generator().manual_seed(1))
    logits = 2 * torch.randn(20, 9, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(Law(**options).row(logits, ids), chain(ids, logits))


def test_top_p_with_ties_is_one_law() -> None:
    """Tied logits in two memory layouts keep the same tokens."""
    logits = torch.zeros(4, 33)
    law = Law(temperature=1.0, top_p=0.5)
    one = law.row(logits, torch.zeros(4, 1, dtype=torch.int64))
    two = law.row(logits.T.contiguous().T, torch.zeros(4, 1, dtype=torch.int64))
    assert torch.equal(one, two)
    assert torch.equal(one[0], one[3])


def test_node_prefixes_are_grouped_by_length() -> None:
    tree, context = ragged()
    groups = node_prefixes(tree, context)
    assert sorted(ids.shape[1] for _, ids in groups) == [3, 4, 5, 6, 7, 8]
    seen = {int(w): ids.tolist()[i] for where, ids in groups for i, w in enumerate(where)}
    for row in range(2):
        for node in range(5):
            assert seen[row * 5 + node] == path_ids(tree, context, row, node)


def test_chain_logits_see_the_drafted_tokens() -> None:
    _, context = ragged()
    law = Law(temperature=1.0, repetition_penalty=2.0)
    context.law = law
    logits = torch.ones(2, 8)
    got = chain_logits(logits, context, torch.tensor([[6, 7], [1, 0]]))
    want = [
        law.row(logits[:1], torch.tensor([[1, 2, 3, 1, 2, 6, 7]]))[0],
        law.row(logits[:1], torch.tensor([[4, 5, 4, 1, 0]]))[0],
    ]
    torch.testing.assert_close(got, torch.stack(want))


def test_low_precision_logits_become_float32() -> None:
    tree, context = ragged()
    logits = torch.randn(2, 5, 8).bfloat16()
    assert Law(temperature=1.0).probs(logits, tree, context).dtype == torch.float32
    assert Law().logits(logits, tree, context).dtype == torch.float32
    assert Law().logits(logits.double(), tree, context).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_bad_values_are_named(options: dict[str, float], name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        Law(**options)  # type: ignore[arg-type]


def test_processors_with_state_are_refused() -> None:
    class SynthIDTextWatermarkLogitsProcessor(lp.LogitsProcessor):
        pass

    with pytest.raises(InvalidInputError, match="keeps state between calls"):
        Law(temperature=1.0, processors=[SynthIDTextWatermarkLogitsProcessor()])


def test_greedy_ignores_warpers_but_not_processors() -> None:
    assert Law(temperature=0.0, top_k=5, top_p=0.5).plain
    law = Law(repetition_penalty=1.5)
    assert law.greedy and not law.plain
