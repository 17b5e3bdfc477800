"""Small networks that tag every token of a sequence, and their endless data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.roles import Loss


class Tagger:
    """A bidirectional transformer that learns a function of sequences: what the loop trains.

    Args:
        alphabet: Tokens; sequences are drawn from them evenly.
        oracle: What each token of a sequence is to be tagged with: a token, T, P, F, - or a number
            up to 12.
        layers: Layers.
        heads: Heads of a layer.
        width: D.
        batch_size: Sequences a step, each of its own length from 3 to 12.
        seed: Of weights and data.
    """

    lower_is_better = False
    shortest, longest = 3, 12

    def __init__(
        self,
        alphabet: str,
        oracle: Callable[[Sequence[str]], list[Any]],
        layers: int,
        heads: int,
        width: int = 64,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.alphabet, self.oracle = alphabet, oracle
        self.batch_size, self.seed = batch_size, seed
        self.identity = {"layers": layers, "heads": heads, "width": width, "seed": seed}
        self.outputs = {str(v): n for n, v in enumerate([*alphabet, *"TPF-", *range(13)])}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module: Any = _Tagging(
                len(alphabet) + 2,
                len(self.outputs),
                self.longest + 1,
                layers,
                heads,
                width,
            )

    def draw(self, count: int, seed: str) -> tuple[Tensor, Tensor]:
        """Tokens [B, T + 1] after a marker, 0 beyond the end, and labels [B, T + 1], -1 there."""
        rng = random.Random(f"tagging/{self.seed}/{seed}")
        given = torch.zeros(count, self.longest + 1, dtype=torch.int64)
        wanted = torch.full_like(given, -1)
        for row in range(count):
            text = rng.choices(self.alphabet, k=rng.randint(self.shortest, self.longest))
            ids = [2 + self.alphabet.index(t) for t in text]
            given[row, : len(ids) + 1] = torch.tensor([1, *ids])
            marks = [self.outputs[str(v)] for v in self.oracle(text)]
            wanted[row, 1 : len(ids) + 1] = torch.tensor(marks)
        return given, wanted

    def batch(self, part: int) -> tuple[Tensor, Tensor]:
        """Fresh examples of that number."""
        return self.draw(self.batch_size, str(part))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Loss:
        """Cross-entropy of the tokens."""
        given, wanted = batch
        logits = self.module(given).flatten(0, 1)
        total = nn.functional.cross_entropy(
            logits, wanted.flatten(), ignore_index=-1, reduction="sum"
        )
        return Loss(total, int((wanted >= 0).sum()))

    def validate(self) -> dict[str, float]:
        """Share of tokens that are right, on sequences never trained on."""
        given, wanted = self.draw(500, "held-out")
        real = wanted >= 0
        return {"accuracy": float((self.module(given).argmax(-1) == wanted)[real].double().mean())}


class _Tagging(nn.Module):
    def __init__(
        self, vocabulary: int, outputs: int, longest: int, layers: int, heads: int, width: int
    ) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, given: Tensor) -> Tensor:
        """Logits [B, T, outputs] of tokens [B, T], 0 for padding."""
        x = self.embed(given) + self.place.weight[: given.shape[1]]  # [B, T, D]
        logits: Tensor = self.head(self.layers(x, src_key_padding_mask=given == 0))
        return logits
