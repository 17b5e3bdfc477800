"""Every drafter, every architecture: the greedy output of transformers, token for token."""

from typing import Any

import pytest
import tiny

from isthmus import registry
from isthmus.decoding.cost import Cost
from isthmus.decoding.drafters import ModelDrafter, PromptLookup
from isthmus.decoding.policy import Auto, Fixed
from isthmus.roles import Policy, Shape

NEW = 24


def policies(name: str, dtype: str) -> dict[str, Policy]:
    model = tiny.facade(name, dtype)
    recycling = registry.load("token-recycling")
    sampling = registry.load("speculative-sampling")
    draft: Any = model.draft_model
    # a drafter that is nearly free, so that `auto` does draft
    auto = Auto([PromptLookup(), recycling(), sampling(draft)], Cost({1: 1.0, 64: 1.2}), survey=5)
    return {
        "none": Fixed(),
        "prompt-lookup": model.policy("prompt-lookup"),
        "token-recycling": model.policy("token-recycling"),
        "speculative-sampling": model.policy("speculative-sampling"),
        "draft-tree": Fixed(ModelDrafter(draft, branching=(3, 2, 1)), Shape(20, 4, 3)),
        "auto": auto,
    }


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_greedy_equals_transformers(name: str, dtype: str) -> None:
    want = tiny.reference(name, dtype, NEW)
    assert len({t for row in want for t in row}) > 5, "degenerate text tests nothing"
    forwards: dict[str, int] = {}
    for drafter, policy in policies(name, dtype).items():
        for rows in ([0], [0, 1, 2]):
            out = tiny.generate(name, dtype, policy, NEW, rows)
            for row, result in zip(rows, out, strict=True):
                tiny.assert_same(name, dtype, row, result.tokens, want[row])
                forwards[drafter] = forwards.get(drafter, 0) + result.stats.target_forwards
    assert forwards["none"] == 4 * NEW
    if not tiny.target(name).recurrent:
        # nothing is proven where nothing is ever accepted
        assert forwards["speculative-sampling"] < 0.8 * forwards["none"]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_reach(name: str) -> None:
    assert tiny.target(name).reach == tiny.REACH[name]
    assert tiny.target(name).vocab_size == tiny.V
