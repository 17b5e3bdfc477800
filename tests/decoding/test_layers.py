"""A target taken apart: its layers by slices, and what it has cached."""

from typing import Any, cast

import pytest
import tiny
import torch

from isthmus.decoding.cache import LayerShape
from isthmus.decoding.layers import (
    LayerSlices,
    Memory,
    Rotation,
    ShallowRun,
    cached_at,
    cached_layer,
    cached_mask,
    check_layer,
    frozen,
    one_kind,
)
from isthmus.decoding.target import HubTarget, SlotSession
from isthmus.decoding.tree import TokenTree, chain_topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.nn.decoder import rotate
from isthmus.roles import Taps

SLICED = ["Llama", "Qwen3", "Mistral", "Gemma3", "GPT2", "GPTNeoX", "Phi"]


@pytest.mark.parametrize("name", SLICED)
def test_slices_are_the_model(name: str) -> None:
    target = tiny.target(name)
    slices = LayerSlices(target)
    ids = torch.stack(tiny.prompts((11, 11)))
    want = target.forward(ids, taps=Taps(final=True, layers=(0, 1, 2))).features
    assert want is not None and want.final is not None
    positions = torch.arange(11).expand(2, -1)
    h = slices.embed(ids, positions)
    for layer in range(3):
        torch.testing.assert_close(h, want.layers[layer], rtol=0, atol=1e-10)
        if layer < 2:
            h = slices.run(h, layer, layer + 1, positions)
    torch.testing.assert_close(slices.finish(h), want.final, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["Bart", "T5", "Mamba", "Bloom"])
def test_what_cannot_be_sliced_is_refused_by_name(name: str) -> None:
    kind = type(tiny.network(name)).__name__
    with pytest.raises(UnsupportedModelError, match=kind):
        LayerSlices(tiny.target(name))


def test_a_model_whose_layers_are_not_all_of_it_is_refused() -> None:
    model = tiny.fresh("Llama")
    # a hook between the layers, as an adapter library would add it, is not seen by hidden states
    model.model.layers[1].register_forward_pre_hook(
        lambda m, a, k: ((a[0] + (a[0].shape[1] > 6),), k), with_kwargs=True
    )
    model.model.norm.register_forward_hook(lambda m, a, out: out + 0.5 * (out.shape[1] == 5))
    target = HubTarget(model, reach="tree")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot be run one by one"):
        LayerSlices(target)


def test_frozen_passes_gradients_on_and_collects_none() -> None:
    target = tiny.target("Llama")
    slices = LayerSlices(target)
    h = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    with frozen(target.model):
        slices.run(h, 0, 2, torch.arange(4)[None]).sum().backward()
    assert h.grad is not None and bool(h.grad.any())
    assert all(p.grad is None and p.requires_grad for p in target.model.parameters())


def ragged(name: str) -> SlotSession:
    """Three rows of different length that have been through a ragged commit."""
    session = cast(SlotSession, tiny.target(name).session(3))
    session.prefill(tiny.prompts())
    tree = TokenTree(torch.stack(tiny.prompts((4, 4, 4), seed=8)), chain_topology(4))
    session.score(tree)
    session.keep(torch.tensor([[0, 1, -1], [0, -1, -1], [0, 1, 2]]))
    return session


@pytest.mark.parametrize(
    ("name", "known"), [*((name, 3) for name in SLICED), *(("Llama", n) for n in (0, 1, 5))]
)
def test_a_resumed_chain_scores_as_the_whole_forward(name: str, known: int) -> None:
    """However many tokens ran ahead: same logits, same taps, same cache after every commit."""
    slices = LayerSlices(tiny.target(name))
    tokens = torch.stack(tiny.prompts((5, 5, 5), seed=9))
    tree = TokenTree(tokens, chain_topology(5))
    taps = Taps(final=True, layers=(1, 2))
    for kept in (0, 2, 5):
        plain, ours = ragged(name), ragged(name)
        run = ShallowRun(slices, ours, 1)
        for i in range(known):
            run.step(tokens[:, i : i + 1])
        ours.ahead = run
        want, got = plain.score(tree, taps=taps), ours.score(tree, taps=taps)
        assert run.tokens.shape[1] == 5 and ours.ahead is None
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-9)
        assert got.features is not None and want.features is not None
        for layer in (1, 2):
            torch.testing.assert_close(got.features.layers[layer], want.features.layers[layer])
        torch.testing.assert_close(got.features.final, want.features.final)
        path = torch.arange(5).expand(3, -1).masked_fill(torch.arange(5) >= kept, -1)
        for session in (plain, ours):
            session.keep(path)
        assert ours.lengths == plain.lengths
        last = TokenTree.root(tokens[:, 0])
        again = ours.score(last).logits
        torch.testing.assert_close(again, plain.score(last).logits, rtol=0, atol=1e-9)


def test_another_tree_than_the_prepared_one_is_scored_whole() -> None:
    slices, session = LayerSlices(tiny.target("Llama")), ragged("Llama")
    tokens = torch.stack(tiny.prompts((3, 3, 3), seed=9))
    run = ShallowRun(slices, session, 1)
    run.step(tokens[:, :2])
    other = TokenTree(tokens.flip(0), chain_topology(3))
    branched = TokenTree.from_paths(5, [[1], [2]])
    assert run.finish(other, None) is None and run.finish(branched, None) is None
    assert run.finish(TokenTree(tokens, chain_topology(3)), Taps(layers=(0,))) is None
    session.ahead = run
    want = ragged("Llama").score(other).logits
    torch.testing.assert_close(session.score(other).logits, want)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_cached_keys_by_place(name: str) -> None:
    """Each row's keys are found by position, wherever a ragged commit has left them."""
    target, session = tiny.target(name), ragged(name)
    cache = session.cache
    extra = torch.stack(tiny.prompts((4, 4, 4), seed=8))
    for row, (ids, kept) in enumerate(zip(tiny.prompts(), (2, 1, 3), strict=True)):
        past = target.empty_cache()
        target.forward(torch.cat([ids, extra[row, :kept]])[None], cache=past)
        places = torch.arange(cache.lengths[row])[None].expand(3, -1)
        keys, values = cached_at(cache, places, (0, 1))
        for layer in (0, 1):
            torch.testing.assert_close(keys[layer, row], past.layers[layer].keys[0])
            torch.testing.assert_close(values[layer, row], past.layers[layer].values[0])
        keys, _ = cached_layer(cache, 1)
        mask: Any = cached_mask(cache, torch.float64)
        live = mask[row, 0, 0] == 0
        assert int(live.sum()) == cache.lengths[row]
        torch.testing.assert_close(keys[row][:, live], past.layers[1].keys[0])
    assert one_kind(target).key_dim == 8


def test_layers_of_different_shapes_are_refused() -> None:
    target = tiny.target("Llama")
    twin = object.__new__(HubTarget)
    twin.__dict__ |= target.__dict__
    twin.layout = [LayerShape(2, 8, 8), LayerShape(4, 8, 8)]
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        one_kind(twin)
    with pytest.raises(InvalidInputError, match="exit_layer must be 1 to 2"):
        check_layer(target, 3, "exit_layer")


def test_memory_keeps_what_is_real() -> None:
    memory = Memory(LayerShape(1, 2, 2), 2, torch.float64, torch.device("cpu"))
    rows: list[list[float]] = [[], []]
    generator = torch.Generator().manual_seed(0)
    for count in ((3, 2), (1, 0), (2, 4)):
        k = torch.randn(2, 1, max(count), 2, generator=generator, dtype=torch.float64)
        valid = torch.arange(max(count)) < torch.tensor(count)[:, None]
        memory.append(k, -k, valid)
        for row in (0, 1):
            rows[row] += k[row, 0, valid[row], 0].tolist()
    assert memory.lengths == [6, 6]
    memory.select([1, 0])
    keys, values, mask = memory.read()
    for row, want in enumerate(reversed(rows)):
        live = slice(None) if mask is None else mask[row, 0, 0] == 0
        assert keys[row, 0, live, 0].tolist() == want
        assert values[row, 0, live, 1].tolist() == (-keys[row, 0, live, 1]).tolist()


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3", "Phi", "GPTNeoX"])
def test_rotation_is_the_target_s(name: str) -> None:
    target = tiny.target(name)
    turn = Rotation(target)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    assert torch.equal(turn(x, torch.zeros(1, 3, dtype=torch.int64)), x)
    positions = torch.tensor([[1, 5, 9]])
    if name == "Llama":  # by hand, in the house's own rotation
        torch.testing.assert_close(turn(x, positions), rotate(x, positions, 1e4), rtol=0, atol=1e-5)
    q, k = x[:, :, :1], x[:, :, 1:2]
    near = (turn(q, torch.tensor([[7]])) * turn(k, torch.tensor([[4]]))).sum(-1)
    far = (turn(q, torch.tensor([[27]])) * turn(k, torch.tensor([[24]]))).sum(-1)
    # distances count, not places; the angles are float32
    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)


def test_learned_positions_rotate_nothing_and_odd_keys_are_refused() -> None:
    x = torch.randn(1, 2, 3, 8)
    assert Rotation(tiny.target("GPT2"))(x, torch.arange(3)[None]) is x
    model = tiny.fresh("Llama")
    target = HubTarget(model)
    model.model.layers[-1].self_attn.k_proj.register_forward_hook(lambda m, a, out: out.flip(-1))
    assert Rotation(target) is not None  # other keys, rotated all the same
    model.model.layers[-1].register_forward_pre_hook(
        lambda m, a, k: (a, k | {"position_embeddings": k["position_embeddings"][::-1]}),
        with_kwargs=True,
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        Rotation(target)
