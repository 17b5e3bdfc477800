"""Freshly initialised models of any size: what they cost does not depend on what they know.

:func:`encoding` and :func:`generating` are the two uses of them that are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree, chain_topology


def decoder(
    hidden_size: int,
    num_hidden_layers: int,
    *,
    kv_heads: int | None = None,
    context: int = 4096,
    vocab_size: int = 1024,
    seed: int = 0,
) -> Any:
    """A Llama in eval mode, float32: 12 D^2 parameters a layer, as many as :func:`encoder` has.

    Args:
        hidden_size: Width D, a multiple of 192; heads are 64 wide.
        num_hidden_layers: Layers L.
        kv_heads: Heads of keys and values; all when None.
        context: Longest text.
        vocab_size: Width V of the logits.
        seed: Seed of the weights.
    """
    heads = hidden_size // 64
    config = tf.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _made(tf.LlamaForCausalLM, config, seed)


def encoder(
    hidden_size: int,
    num_hidden_layers: int,
    *,
    context: int = 4096,
    vocab_size: int = 1024,
    seed: int = 0,
) -> Any:
    """A BERT in eval mode, float32, without a head; see :func:`decoder`."""
    config = tf.BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=context,
    )
    return _made(lambda c: tf.BertModel(c, add_pooling_layer=False), config, seed)


def encoding(model: Any, length: int) -> Callable[[], Any]:
    """Run an encoder on ``length`` tokens."""
    ids = torch.ones(1, length, dtype=torch.int64, device=model.device)

    def run() -> Any:
        with torch.no_grad():
            return model(ids)

    return run


def generating(
    target: HubTarget, new: int, cached: int, *, batch: int = 1
) -> Callable[[], list[torch.Tensor]]:
    """Write ``new`` tokens greedily, one by one, after ``cached`` ones; the same at each call.

    Args:
        target: The model.
        new: Tokens of each row.
        cached: Tokens of each row before them.
        batch: Rows B.
    """
    session = target.session(batch)
    session.prefill([torch.ones(cached, dtype=torch.int64)] * batch)
    root = torch.zeros(batch, 1, dtype=torch.int64, device=target.device)

    def run() -> list[torch.Tensor]:
        tokens = [root]
        for _ in range(new):
            tree = TokenTree(tokens[-1], chain_topology(1))
            tokens.append(session.score(tree).logits.argmax(-1))
            session.keep(root)
        session.truncate([cached] * batch)
        return tokens[1:]

    return run


def _made(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws from the global generator
        return kind(config).eval()
