"""Random sequences that are said again and again, and a small model that repeats them."""

from __future__ import annotations

import copy
import functools
import zlib
from typing import Any

import torch
from torch import Tensor

from isthmus.roles import Loss
from isthmus.training.loop import Plan, Trainer

VOCABULARY, LENGTH = 48, 32
SHORTEST, LONGEST = 8, 16
"""Tokens that are said before they come again: of no fixed number, or the place would be enough."""


def repeated(count: int, seed: int | str = 0) -> tuple[Tensor, Tensor]:
    """Random tokens, said again and again.

    Args:
        count: Sequences B.
        seed: Of the draw.

    Returns:
        Tokens [B, LENGTH], and after how many of them each sequence begins again [B].
    """
    # crc32 is the same in every process
    draw = torch.Generator().manual_seed(zlib.crc32(f"induction/{seed}".encode()))
    once = torch.randint(VOCABULARY, (count, LONGEST), generator=draw)
    period = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=draw)
    return once.gather(1, torch.arange(LENGTH) % period[:, None]), period


class Repeating:
    """What the loop trains: to go on with a sequence that was said once.

    Args:
        seed: Of weights and data.
    """

    lower_is_better = True

    def __init__(self, seed: int = 0) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=2 * LENGTH,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module: Any = LlamaForCausalLM(config)
        self.seed, self.identity = seed, {"task": "induction", "seed": seed}

    def batch(self, part: int) -> tuple[Tensor, Tensor]:
        """Fresh sequences of that number, and their periods."""
        return repeated(64, f"{self.seed}/{part}")

    def loss(self, batch: tuple[Tensor, Tensor]) -> Loss:
        """Cross-entropy of what was said before, and how much of it is right."""
        ids, period = batch
        logits = self.module(input_ids=ids).logits[:, :-1]
        again = torch.arange(1, LENGTH) >= period[:, None]  # [B, T - 1]
        wanted = ids[:, 1:]
        nats = torch.nn.functional.cross_entropy(logits.mT, wanted, reduction="none")
        right = (logits.argmax(-1) == wanted)[again].sum()
        return Loss((nats * again).sum(), int(again.sum()), {"right": right})

    def validate(self) -> dict[str, float]:
        """Nats a token of held-out repetitions, and the share that is said right."""
        found = self.loss(repeated(128, "held-out"))
        return {
            "nats": float(found.total) / float(found.weight),
            "right": float(found.sums["right"]) / float(found.weight),
        }


@functools.lru_cache(maxsize=2)
def induction_model(steps: int = 600) -> Any:
    """A Llama of two layers of four heads that repeats; trained in a minute or two.

    Args:
        steps: Steps of training.
    """
    learner = Repeating()
    plan = Plan(steps, learning_rate=3e-3, warmup_steps=min(100, steps // 3), weight_decay=0.01)
    Trainer(learner, plan).run()
    return learner.module.eval()


def with_cancelling_heads(model: Any, scale: float = 20.0) -> Any:
    """A copy whose last layer has two heads that look alike and write large opposites.

    What they add is nothing, whatever the input.

    Args:
        model: What :func:`induction_model` gives.
        scale: By how much what the first one wrote grows.
    """
    planted = copy.deepcopy(model)
    attention = planted.model.layers[-1].self_attn
    size = attention.head_dim
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            part.weight[size : 2 * size] = part.weight[:size]
        out = attention.o_proj.weight  # [D, H * d]
        out[:, :size] *= scale
        out[:, size : 2 * size] = -out[:, :size]
    return planted
