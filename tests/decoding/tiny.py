"""Tiny random models of every architecture that the engine is tested on, and their references."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as tf

from isthmus.api import Model
from isthmus.decoding.target import HubTarget

V = 64
CONTEXT = 128
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

_DECODER = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_PAIR = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    # tied embeddings make a random model repeat its input
    "tie_word_embeddings": False,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TWO_KINDS = ["sliding_attention", "full_attention"]

MAKERS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)),
    "Qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED, head_dim=8)),
    # the window is smaller than any text here, and only one of the two layers has it
    "Gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=5, layer_types=_TWO_KINDS)
    ),
    "Mistral": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**_GROUPED, sliding_window=5, head_dim=8)
    ),
    "GPT2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **_TOKENS)
    ),
    "GPTNeoX": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_DECODER)),
    "Phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_GROUPED)),
    "Bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(
            vocab_size=V, hidden_size=32, n_layer=2, n_head=4, tie_word_embeddings=False, **_TOKENS
        )
    ),
    "Mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=8, **_TOKENS)
    ),
    "Mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
            expand=2,
            chunk_size=8,
            **_TOKENS,
        )
    ),
    "T5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=V,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
        )
    ),
    "Bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(**_PAIR, max_position_embeddings=CONTEXT)
    ),
    "Marian": lambda: tf.MarianMTModel(tf.MarianConfig(**_PAIR, max_position_embeddings=CONTEXT)),
    "Whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            **_PAIR,
            max_source_positions=20,
            max_target_positions=CONTEXT,
            num_mel_bins=8,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
}

_MADE: list[tuple[str, Any, list[float]]] = []

REACH = dict.fromkeys(MAKERS, "tree") | {"Bloom": "chain", "Mamba": "step", "Mamba2": "chain"}
NAMES = list(MAKERS)


def _sums(model: Any) -> list[float]:
    return [float(p.detach().double().sum()) for p in model.parameters()]


def changed() -> list[str]:
    """Names of shared networks whose weights are no longer those they were made with."""
    return [name for name, model, sums in _MADE if _sums(model) != sums]


@cache
def network(name: str, dtype: str = "float64", *, noise: float = 0.0) -> Any:
    """A random model; with noise, a relative of it that mostly agrees: a draft model."""
    if noise:
        model = copy.deepcopy(network(name, dtype))
        generator = torch.Generator().manual_seed(7)
        for p in model.parameters():
            extra = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.data += noise * float(p.data.float().std(correction=0)) * extra
        _MADE.append((f"{name}, {dtype}, noise {noise}", model, _sums(model)))
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MAKERS[name]()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(3)  # as made, the logits are nearly flat and every answer is one token
    model = model.eval().to(DTYPES[dtype])
    _MADE.append((f"{name}, {dtype}", model, _sums(model)))
    return model


@cache
def target(name: str, dtype: str = "float64", *, noise: float = 0.0) -> HubTarget:
    """The model as a target; its reach is measured once."""
    return HubTarget(network(name, dtype, noise=noise))


@cache
def facade(name: str, dtype: str = "float64") -> Model:
    """The model behind the Python door, with a draft model of its family where one can be."""
    model = object.__new__(Model)
    model.target, model.tokenizer, model._policies = target(name, dtype), None, {}
    family = "Llama" if target(name, dtype).recurrent else name
    model.draft_model = target(family, dtype, noise=0.3)
    return model


def prompts(lengths: tuple[int, ...] = (9, 13, 6), seed: int = 3) -> list[torch.Tensor]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=generator) for n in lengths]


def features(name: str, dtype: str, rows: int = 3) -> torch.Tensor:
    """Random log-mel features."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 8, 40, generator=generator).to(DTYPES[dtype])


@cache
def reference(name: str, dtype: str, new: int) -> list[list[int]]:
    """New tokens of transformers' own greedy ``generate`` for the three prompts, one by one."""
    model = network(name, dtype)
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    out = []
    for row, ids in enumerate(prompts()):
        if name == "Whisper":
            given = {
                "input_features": features(name, dtype)[row : row + 1],
                "decoder_input_ids": torch.tensor([[1]]),
            }
        else:
            given = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
        out.append(model.generate(**given, **options)[0].tolist()[-new:])
    return out


def generate(name: str, dtype: str, drafter: Any, new: int, rows: list[int]) -> list[Any]:
    """Results of isthmus for the given rows of the three prompts, in one batch."""
    model = facade(name, dtype)
    options = {"drafter": drafter, "max_new_tokens": new, "ignore_end": True}
    if name == "Whisper":
        inputs = {"input_features": features(name, dtype)[rows]}
        return model.generate([""] * len(rows), inputs=inputs, **options)
    return model.generate([prompts()[r] for r in rows], **options)


def assert_same(name: str, dtype: str, row: int, got: list[int], want: list[int]) -> None:
    """Equal tokens; in float32 a first difference is excused where the target nearly ties."""
    if got == want:
        return
    at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
    assert dtype != "float64", f"{name}: token {at} is {got[at]}, transformers gives {want[at]}"
    engine = target(name, dtype)
    encoded, start = None, prompts()[row]
    if engine.encoder_decoder:
        start = torch.tensor([engine.start_token])
        source = {"input_ids": prompts()[row][None]}
        if name == "Whisper":
            source = {"input_features": features(name, dtype)[row : row + 1]}
        encoded = engine.encode(**source)
    ids = torch.cat([start, torch.tensor(want[:at], dtype=torch.int64)])
    logits = engine.forward(ids[None], encoded=encoded).logits[0, -1]
    top = logits.topk(2)
    gap = float(top.values[0] - top.values[1]) / float(logits.max() - logits.min())
    assert {got[at], want[at]} == set(top.indices.tolist()) and gap < 1e-4, (
        f"{name}: token {at} is {got[at]}, transformers gives {want[at]}; the gap is {gap:.1e}"
    )


def fresh(name: str, dtype: str = "float64") -> Any:
    """A copy of the model that a test may change."""
    return copy.deepcopy(network(name, dtype))
