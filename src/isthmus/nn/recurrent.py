"""Gated recurrent units in both forms, and the deep output of early encoder-decoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GatedUnit(nn.Module):
    """The gated unit over a sequence; what is known of the whole sequence may enter every gate.

    ::

        r = sigmoid(W_r x + U_r h + C_r c)        z = sigmoid(W_z x + U_z h + C_z c)
        before:  h~ = tanh(W x + U (r h) + C c)
        after:   h~ = tanh(W x + r (U h + C c))
        h <- z h + (1 - z) h~

    The form *before* is that of Cho et al., "Learning phrase representations using RNN
    encoder-decoder", 2014 (arXiv 1406.1078); cuDNN and :class:`torch.nn.GRU` have the form *after*.
    There are no biases, as in the paper.

    Args:
        input_size: Width of the inputs x.
        hidden_size: Width D of the state h.
        context_size: Width of c; 0 has none.
        reset_before: Which form.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        context_size: int = 0,
        *,
        reset_before: bool = True,
    ) -> None:
        super().__init__()
        self.hidden_size, self.reset_before = hidden_size, reset_before
        self.from_input = nn.Linear(input_size, 3 * hidden_size, bias=False)  # r, z, h~
        self.from_state = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.from_reset = nn.Linear(hidden_size, hidden_size, bias=False)
        self.from_context = (
            nn.Linear(context_size, 3 * hidden_size, bias=False) if context_size else None
        )

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States after every input.

        Args:
            x: Inputs [B, T, input_size].
            state: State before them [B, D]; zeros when None.
            context: c [B, context_size].
            mask: Where there is an input, bool [B, T]; elsewhere the state stays. All when None.

        Returns:
            [B, T, D].
        """
        h = x.new_zeros(len(x), self.hidden_size) if state is None else state
        inputs = self.from_input(x)
        width = self.hidden_size
        added = None
        if self.from_context is not None:
            gates, added = torch.split(self.from_context(context), [2 * width, width], 1)
            inputs = inputs + F.pad(gates, (0, width))[:, None]
        states = []
        for t in range(x.shape[1]):
            gates = torch.sigmoid(inputs[:, t, : 2 * width] + self.from_state(h))
            r, z = torch.split(gates, width, 1)
            if self.reset_before:
                inner = self.from_reset(r * h)
                inner = inner if added is None else inner + added
            else:
                inner = self.from_reset(h)
                inner = r * (inner if added is None else inner + added)
            new = z * h + (1 - z) * torch.tanh(inputs[:, t, 2 * width :] + inner)
            h = new if mask is None else torch.where(mask[:, t, None], new, h)
            states.append(h)
        return torch.stack(states, 1)


class DeepOutput(nn.Module):
    """Maxout of pairs between states and logits, with a low-rank output matrix.

    Args:
        inputs: Widths of what enters; each has a matrix of its own.
        units: Maxout units; twice as many before the maximum.
        rank: Rank of the output matrix.
        vocab_size: Tokens V.

    Example:
        >>> layer = DeepOutput((2,), 1, 1, 1)
        >>> for p in layer.parameters(): _ = nn.init.ones_(p)
        >>> layer.inputs[0].weight.data[1] = 2.0
        >>> layer(torch.tensor([[1.0, 2.0]])).tolist()  # max(1 + 2, 2 (1 + 2))
        [[6.0]]
    """

    def __init__(self, inputs: tuple[int, ...], units: int, rank: int, vocab_size: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(n, 2 * units, bias=False) for n in inputs)
        self.down = nn.Linear(units, rank, bias=False)
        self.up = nn.Linear(rank, vocab_size, bias=False)

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of what enters, [..., n] each, broadcast against each other."""
        total = sum(layer(value) for layer, value in zip(self.inputs, x, strict=True))
        assert isinstance(total, torch.Tensor)
        units = total.view(*total.shape[:-1], -1, 2).amax(-1)
        logits: torch.Tensor = self.up(self.down(units))
        return logits
