"""The fast target: the same function as the model, bit-identical however tokens are grouped."""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import MAKERS

import isthmus
from isthmus.decoding import fast, native
from isthmus.decoding.exact import ExactTarget
from isthmus.decoding.fast import FastTarget, best_target
from isthmus.decoding.model import Model
from isthmus.decoding.program import panels
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Taps
from isthmus.testing.targets import check_target

FAST = ("Llama", "Qwen3", "Mistral", "Qwen2")


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    if name == "Qwen2":  # biases, and head widths that do not fill the model's
        config = tf.Qwen2Config(
            vocab_size=64,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=112,
            tie_word_embeddings=True,
        )
        model = tf.Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model.to(dtype).eval()
    return MAKERS[name]().to(dtype).eval()


def wide_llama() -> Any:
    """Its widths fill vectors of int8."""
    torch.manual_seed(3)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=192,
        )
    ).eval()


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_do_not_depend_on_how_tokens_are_grouped(name: str, dtype: torch.dtype) -> None:
    target = FastTarget(make(name, dtype))
    assert target.kernel is not None
    assert check_target(target, rounds=5) == 0.0  # not one bit


@pytest.mark.parametrize("name", FAST)
def test_a_tree_in_a_ragged_batch_is_what_the_model_says(name: str) -> None:
    model = make(name)
    fast, general = FastTarget(model), HubTarget(model)
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 64, (n,), generator=generator) for n in (9, 2, 14)]
    tokens = torch.randint(0, 64, (3, 6), generator=generator)
    tree = TokenTree(tokens, Topology(torch.tensor([[-1, 0, 0, 1, 1, 3]])))
    taps = Taps(final=True, layers=(0, 2))
    found = []
    for target in (fast, general):
        session = target.session(3)
        before = session.prefill(rows, taps=taps)
        first = session.score(tree, taps=taps)
        session.keep(torch.tensor([[0, 1, 4], [0, 2, -1], [0, 1, 3]]))
        again = session.fork([2, 0]).score(TokenTree.root(tokens[:2, 1]), taps=taps)
        states = [
            f.final if i is None else f.layers[i]
            for f in (before, first.features, again.features)
            if f is not None
            for i in (None, 0, 2)
        ]
        states[:3] = [x[2] for x in states[:3]]  # the others are padded
        found.append([first.logits, again.logits, *states])
    assert len(found[0]) == 11
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_greedy_text_is_that_of_transformers_whoever_drafts(name: str) -> None:
    model = make(name)
    ours = Model(model)
    assert isinstance(ours.target, FastTarget)
    prompt = torch.randint(0, 64, (1, 11), generator=torch.Generator().manual_seed(2))
    want = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 11:].tolist()
    for drafter in ("none", "prompt-lookup", "token-recycling"):
        out = ours.generate(prompt[0], max_new_tokens=40, drafter=drafter, ignore_end=True)
        assert out.tokens == want, drafter


def test_bfloat16_weights_give_the_float32_text_of_the_same_weights() -> None:
    model = make("Llama", torch.bfloat16)
    prompts = [torch.arange(1, n) for n in (6, 9)]
    compact = Model(model).generate(prompts, max_new_tokens=30, drafter="none", ignore_end=True)
    wide = Model(model.float(), fast=False)
    plain = wide.generate(prompts, max_new_tokens=30, drafter="none", ignore_end=True)
    assert [o.tokens for o in compact] == [o.tokens for o in plain]


def test_threads_do_not_change_a_bit(two_threads: None) -> None:
    target = FastTarget(make("Llama", torch.bfloat16))
    tokens = torch.arange(1, 61)[None]
    logits = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        session = target.session(1)
        logits.append(session.score(TokenTree(tokens, chain_topology(60))).logits)
    assert torch.equal(*logits)


def test_two_python_threads_share_a_target() -> None:
    model = Model(make("Llama"))
    prompts = [torch.arange(1, 30), torch.arange(30, 50)]

    def write(prompt: torch.Tensor) -> list[int]:
        out: list[int] = model.generate(
            prompt, max_new_tokens=60, drafter="none", ignore_end=True
        ).tokens
        return out

    alone = [write(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert list(pool.map(write, prompts)) == alone


def test_a_cache_that_grows_and_a_text_longer_than_the_first_table() -> None:
    config = tf.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    target = FastTarget(model)
    text = torch.randint(0, 32, (1400,), generator=torch.Generator().manual_seed(1))
    session = target.session(1)
    session.prefill([text[:600]])
    session.prefill([text[600:-1]])
    got = session.score(TokenTree.root(text[-1:])).logits[0, 0]
    with torch.no_grad():
        want = model(text[None]).logits[0, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_embed_and_head_of_bfloat16_weights_are_float32() -> None:
    model = make("Llama", torch.bfloat16)
    target = FastTarget(model)
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    want = states @ model.lm_head.weight.float().T
    torch.testing.assert_close(target.head(states), want, rtol=1e-5, atol=1e-6)
    assert target.embed(torch.tensor([1, 2])).dtype == torch.float32
    session = target.session(1)  # the head must leave the kernel as it found it
    first = session.score(TokenTree.root(torch.tensor([5]))).logits
    target.head(states)
    session.keep(torch.tensor([[-1]]))
    assert torch.equal(session.score(TokenTree.root(torch.tensor([5]))).logits, first)


def test_int8_is_the_model_with_rounded_weights_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("Qwen2")
    target = FastTarget(model)
    tokens = torch.arange(1, 12)[None]
    with pytest.raises(UnsupportedModelError, match="multiples"):
        target.to_int8()  # 48 values do not fill vectors of four times eight
    wide = wide_llama()
    target = FastTarget(wide)
    before = target.session(1).score(TokenTree(tokens, chain_topology(11))).logits
    target.to_int8()
    assert check_target(target) == 0.0
    after = target.session(1).score(TokenTree(tokens, chain_topology(11))).logits
    assert 0 < float((after - before).abs().max() / before.std()) < 0.2
    monkeypatch.setattr(fast, "TWICE", 0)
    rows = FastTarget(wide)
    rows.to_int8()
    assert target.lowered.decoder.laid and not rows.lowered.decoder.laid
    assert check_target(rows) == 0.0
    stays = rows.session(1).score(TokenTree(tokens, chain_topology(11))).logits
    torch.testing.assert_close(after, stays, rtol=1e-4, atol=1e-5)
    for module in wide.modules():  # the same rounding, done by hand
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.data.abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
    by_hand = FastTarget(wide).session(1).score(TokenTree(tokens, chain_topology(11))).logits
    torch.testing.assert_close(after, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GPT2", "Gemma3", "Phi", "Bloom"])
def test_what_is_built_in_another_way_runs_module_by_module_and_says_why(name: str) -> None:
    target = best_target(MAKERS[name]().eval())
    assert type(target) is HubTarget
    assert "has no fast forward" in target.why_general
    assert best_target(make("Llama").double()).why_general


def test_a_model_that_computes_something_else_is_found_out() -> None:
    model = make("Llama")

    def twice(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return 2 * output

    model.model.layers[1].mlp.register_forward_hook(twice)
    with pytest.raises(UnsupportedModelError, match="differs from the model's own"):
        FastTarget(model)


def test_weights_that_change_or_move_after_loading_are_followed() -> None:
    model = make("Llama")
    target = FastTarget(model)
    root = TokenTree.root(torch.tensor([5]))

    def logits() -> torch.Tensor:
        return target.session(1).score(root).logits

    first = logits()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.equal(logits(), 2 * first)
    model.to(torch.bfloat16).to(torch.float32)  # other places, rounded numbers
    again = logits()
    assert not torch.equal(again, 2 * first)
    with torch.no_grad():
        torch.testing.assert_close(again[0, 0], model(root.tokens).logits[0, 0])
    model.double()
    with pytest.raises(UnsupportedModelError, match="float32"):
        logits()


def test_without_a_compiler_everything_works_and_the_reason_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native.library.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    target = best_target(make("Llama"))
    native.library.cache_clear()
    assert type(target) is HubTarget and "install gcc or clang" in target.why_general


def test_a_compiler_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("CC", "false")
    native.library.cache_clear()
    with pytest.raises(UnsupportedModelError, match="C compiler") as caught:
        FastTarget(make("Llama"))
    native.library.cache_clear()
    assert "\n" not in str(caught.value)


def test_load_keeps_bfloat16_weights_and_is_exact_without_padding() -> None:
    model = isthmus.load(exact=True)
    assert isinstance(model.target, FastTarget) and model.target.dtype == torch.bfloat16
    assert isinstance(Model(MAKERS["GPT2"]().eval(), exact=True).target, ExactTarget)
    assert type(isthmus.load(dtype="float32").target) is FastTarget


def test_a_plain_decoder_takes_no_encoder_inputs() -> None:
    with pytest.raises(InvalidInputError, match="no encoder inputs"):
        FastTarget(make("Llama")).session(1, input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_another_default_dtype_does_not_reach_the_kernel() -> None:
    """A model that is being loaded in another thread changes it for the whole process."""
    model = isthmus.load()
    want = model.generate("def add(a, b):", max_new_tokens=16, drafter="none").tokens
    fresh = isthmus.load()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fresh.generate("def add(a, b):", max_new_tokens=16, drafter="none").tokens == want
    finally:
        torch.set_default_dtype(torch.float32)


def test_room_for_many_nodes_is_room_for_fewer(two_threads: None) -> None:
    config = tf.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2048,
    )
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    text = torch.randint(0, 32, (1, 333), generator=torch.Generator().manual_seed(1))
    target = FastTarget(model)
    for count in (300, 64, 65, 7, 33):  # the buffers stay those of the largest
        got = target.session(1).score(TokenTree(text[:, :count], chain_topology(count))).logits
        with torch.no_grad():
            want = model(text[:, :count]).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_stay_where_they_are_give_the_same_function(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name, dtype)
    laid = FastTarget(model)
    monkeypatch.setattr(fast, "TWICE", 0)
    target = FastTarget(model)
    assert laid.lowered.decoder.laid and not target.lowered.decoder.laid
    assert check_target(target, rounds=5) == 0.0  # not one bit
    text = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    found = [
        each.session(1).score(TokenTree(text, chain_topology(40))).logits for each in (laid, target)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_panels_hold_every_weight_once() -> None:
    weight = torch.randn(130, 16, generator=torch.Generator().manual_seed(1))
    laid = panels(weight)
    assert laid.shape == (3, 16, 64) and laid[2, :, 2:].abs().sum() == 0
    for row in (0, 63, 64, 129):
        assert torch.equal(laid[row // 64, :, row % 64], weight[row])


@pytest.mark.parametrize("kind", ["panels", "rows", "int8 panels", "int8 rows"])
@pytest.mark.skipif("avx2" not in " ".join(native._processor()), reason="needs a PC with AVX2")
def test_wide_registers_hold_the_sums_of_narrow_ones(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind.endswith("rows"):
        monkeypatch.setattr(fast, "TWICE", 0)
    target = FastTarget(make("Llama", torch.bfloat16))
    if kind.startswith("int8"):
        target = FastTarget(wide_llama())
        target.to_int8()
        assert bool(target.lowered.decoder.laid) == (kind == "int8 panels")
    narrow = tmp_path / "narrow.so"
    flags = ["-O2", "-march=x86-64-v3", "-ffp-contract=off", "-fPIC", "-shared"]
    subprocess.run(["cc", *flags, str(native.SOURCE), "-o", str(narrow), "-lm"], check=True)
    other = ctypes.CDLL(str(narrow))
    for name in ("isthmus_forward", "isthmus_scratch"):
        ours = getattr(target.kernel.library, name)
        getattr(other, name).argtypes, getattr(other, name).restype = ours.argtypes, ours.restype
    text = torch.randint(0, 64, (2, 70), generator=torch.Generator().manual_seed(1))
    found = []
    for library in (target.kernel.library, other):
        target.kernel.library = library
        session = target.session(2)
        session.prefill([text[0], text[1, :9]])
        counts = (1, 2, 3, 8, 11, 40)
        found.append([session.score(TokenTree(text[:, :n], chain_topology(n))) for n in counts])
    for wide, plain in zip(*found, strict=True):
        assert torch.equal(wide.logits, plain.logits)
