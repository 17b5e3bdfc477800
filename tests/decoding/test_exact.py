"""Exact mode: a node's numbers do not depend on what else is in the forward, to the last bit."""

from typing import Any

import pytest
import tiny
import torch

from isthmus.api import Model
from isthmus.decoding.exact import ExactTarget, attention
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.testing import check_target


def exact_model(name: str = "Llama", dtype: str = "bfloat16") -> Model:
    return Model(tiny.fresh(name, dtype), exact=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_alone_or_in_a_tree(dtype: str) -> None:
    target = ExactTarget(tiny.fresh("Llama", dtype))
    generator = torch.Generator().manual_seed(0)
    state = torch.randint(0, tiny.V, (20,), generator=generator)
    for size in (2, 5, 11, 17):
        parents = [
            -1,
            *(int(torch.randint(0, i, (1,), generator=generator)) for i in range(1, size)),
        ]
        tokens = torch.randint(0, tiny.V, (1, size), generator=generator)
        session = target.session(1)
        session.prefill([state])
        logits = session.score(TokenTree(tokens, Topology.of(parents))).logits[0]
        for node in range(size):
            path = [node]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            alone = target.session(1)
            alone.prefill([state])
            for i in path[::-1]:
                got = alone.score(TokenTree.root(tokens[:, i])).logits[0, 0]
                alone.keep(torch.tensor([[0]]))
            assert torch.equal(got, logits[node]), f"{size} nodes, node {node}"


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT2"])
def test_tokens_are_the_same_bit_for_bit(name: str) -> None:
    model = exact_model(name)
    prompts = tiny.prompts((9, 13, 6, 20))
    options: dict[str, Any] = {"max_new_tokens": 90, "ignore_end": True}
    for prompt in prompts:
        plain = model.generate(prompt, drafter="none", **options)
        for drafter in ("token-recycling", "prompt-lookup"):
            out = model.generate(prompt, drafter=drafter, **options)
            assert out.tokens == plain.tokens, drafter


def test_sampled_tokens_are_the_same_under_shared_noise() -> None:
    from isthmus.decoding.acceptance import Coupled

    model = exact_model()
    options: dict[str, Any] = {"max_new_tokens": 60, "ignore_end": True, "temperature": 1.0}
    prompt = tiny.prompts()[0]
    plain = model.generate(prompt, drafter="none", acceptance=Coupled(1), **options)
    for drafter in ("token-recycling", "prompt-lookup"):
        out = model.generate(prompt, drafter=drafter, acceptance=Coupled(1), **options)
        assert out.tokens == plain.tokens


def test_contract() -> None:
    check_target(ExactTarget(tiny.fresh("Llama")), rounds=2, tolerance=1e-12)
    check_target(ExactTarget(tiny.fresh("T5")), rounds=1, tolerance=1e-12)


def test_attention_equals_the_models_own() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.float64)
    mask[..., 4] = torch.finfo(torch.float64).min
    got, _ = attention(None, q, k, v, mask)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=mask)
    torch.testing.assert_close(got.transpose(1, 2), want)


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="exact mode needs tree masks"):
        ExactTarget(tiny.fresh("Bloom"))
    with pytest.raises(InvalidInputError, match="block"):
        ExactTarget(tiny.fresh("Llama"), block=0)
    target = ExactTarget(tiny.fresh("Llama"), block=3)
    assert target.max_nodes == 2
    session = target.session(1)
    with pytest.raises(InvalidInputError, match="does not fit a block"):
        session.score(TokenTree(torch.zeros(1, 4, dtype=torch.int64), Topology.of([-1, 0, 0, 0])))
    q = torch.zeros(1, 1, 1, 4)
    with pytest.raises(UnsupportedModelError, match="soft-capped"):
        attention(None, q, q, q, None, softcap=30.0)
