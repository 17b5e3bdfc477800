"""A U-Net over waveforms, and how it streams.

Level by level the sound gets shorter and wider, crosses a bottleneck, and comes back; what each
level saw on its way down is added on the way up::

    [B, 1, N] ─▶ conv K/S, ReLU, 1x1, GLU ─▶ ... ─▶ bottleneck [B, T, D] ─┐
    [B, 1, N] ◀─ transposed conv K/S, 1x1, GLU ◀─ + ◀─ ... ◀──────────────┘

After Defossez et al., "Real Time Speech Enhancement in the Waveform Domain", 2020. No layer looks
further ahead than its kernel, so with a causal bottleneck the net can be run on packets of any
size; :func:`conv_step` and :func:`transposed_step` keep what is needed from one to the next.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError


def conv_step(
    conv: nn.Conv1d, x: torch.Tensor, pending: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run an unpadded strided convolution on a packet.

    Args:
        conv: The layer.
        x: [B, C, N], N may be 0.
        pending: Inputs that are still needed, [B, C, P].

    Returns:
        The outputs that are complete, [B, C', T], and the inputs that are still needed.
    """
    x = x if pending is None else torch.cat([pending, x], -1)
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    count = max(0, (x.shape[-1] - kernel) // stride + 1)
    if not count:
        return x.new_zeros(len(x), conv.out_channels, 0), x
    return conv(x[..., : (count - 1) * stride + kernel]), x[..., count * stride :]


def transposed_step(
    conv: nn.ConvTranspose1d, x: torch.Tensor, tail: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run an unpadded transposed convolution on a packet.

    Args:
        conv: The layer.
        x: [B, C, T], T may be 0.
        tail: Sums that later frames will still add to, [B, C', K - S], without the bias.

    Returns:
        The outputs that are complete, [B, C', T * S], and the new tail.
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    if tail is None:
        tail = x.new_zeros(len(x), conv.out_channels, kernel - stride)
    count = x.shape[-1] * stride
    if not count:
        return x.new_zeros(len(x), conv.out_channels, 0), tail
    out = F.conv_transpose1d(x, conv.weight, None, stride)
    out = torch.cat([out[..., : tail.shape[-1]] + tail, out[..., tail.shape[-1] :]], -1)
    bias = 0 if conv.bias is None else conv.bias[:, None]
    return out[..., :count] + bias, out[..., count:]


class Down(nn.Module):
    """One level down: strided convolution, ReLU, 1x1 convolution, GLU.

    Args:
        width: Channels of the input.
        inner: Channels of the output.
        kernel: K.
        stride: S.
    """

    def __init__(self, width: int, inner: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, inner, kernel, stride)
        self.gate = nn.Sequential(nn.Conv1d(inner, 2 * inner, 1), nn.GLU(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [B, C, N] to [B, C', T]."""
        h: torch.Tensor = self.gate(self.conv(x).relu())
        return h

    def step(
        self, x: torch.Tensor, pending: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a packet; see :func:`conv_step`."""
        h, pending = conv_step(self.conv, x, pending)
        return (self.gate(h.relu()) if h.shape[-1] else h), pending


class Up(nn.Module):
    """One level up: 1x1 convolution, GLU, transposed convolution, and a ReLU but at the last.

    Args:
        inner: Channels of the input.
        width: Channels of the output.
        kernel: K.
        stride: S.
        last: Whether this is the last level.
    """

    def __init__(self, inner: int, width: int, kernel: int, stride: int, last: bool) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv1d(inner, 2 * inner, 1), nn.GLU(1))
        self.conv = nn.ConvTranspose1d(inner, width, kernel, stride)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [B, C', T] to [B, C, N]."""
        y: torch.Tensor = self.conv(self.gate(x))
        return y if self.last else y.relu()

    def step(self, x: torch.Tensor, tail: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a packet; see :func:`transposed_step`."""
        y, tail = transposed_step(self.conv, self.gate(x) if x.shape[-1] else x, tail)
        return (y if self.last else y.relu()), tail


@dataclass
class UNetState:
    """What a U-Net keeps between packets.

    Attributes:
        pending: Inputs of each encoder level.
        skips: Outputs of each encoder level that the decoder has not used.
        tails: Sums of each decoder level.
        bottleneck: State of the LSTM.
    """

    pending: list[torch.Tensor | None]
    skips: list[torch.Tensor | None]
    tails: list[torch.Tensor | None]
    bottleneck: tuple[torch.Tensor, torch.Tensor] | None = field(default=None)


class WaveUNet(nn.Module):
    """The net: sound [B, N] to sound of the same length.

    Args:
        hidden: Channels H of the first level; each further level has twice as many.
        depth: Levels L.
        kernel: K.
        stride: S, at most K.
        causal: An LSTM that reads forward only; else both ways and a linear layer behind it.
        layers: Layers of the LSTM; 0 leaves the bottleneck out.
        max_hidden: Channels of a level at most.

    Raises:
        InvalidInputError: A size is below 1, or the stride exceeds the kernel.
    """

    def __init__(
        self,
        hidden: int = 48,
        depth: int = 5,
        kernel: int = 8,
        stride: int = 4,
        *,
        causal: bool = True,
        layers: int = 2,
        max_hidden: int = 10_000,
    ) -> None:
        super().__init__()
        if min(hidden, depth, kernel, stride) < 1 or stride > kernel:
            raise InvalidInputError(
                f"a U-Net has sizes of at least 1 and a stride within its kernel, got {hidden}, "
                f"{depth}, {kernel} and {stride}"
            )
        self.depth, self.kernel, self.stride, self.causal = depth, kernel, stride, causal
        widths = [1, *(min(hidden * 2**level, max_hidden) for level in range(depth))]
        levels = list(itertools.pairwise(widths))
        self.encoder = nn.ModuleList(Down(w, inner, kernel, stride) for w, inner in levels)
        self.decoder = nn.ModuleList(
            Up(inner, w, kernel, stride, last=level == 0)
            for level, (w, inner) in reversed(list(enumerate(levels)))
        )
        width = widths[-1]
        self.width = width
        self.lstm = None
        if layers:
            self.lstm = nn.LSTM(width, width, layers, batch_first=True, bidirectional=not causal)
        self.join = nn.Linear(2 * width, width) if layers and not causal else None
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                _rescale(module)

    @property
    def hop(self) -> int:
        """Samples between two steps of the bottleneck."""
        return int(self.stride**self.depth)

    @property
    def lookahead(self) -> int:
        """Samples after a sample that may still change it."""
        reach = 1
        for _ in range(self.depth):
            reach = (reach - 1) * self.stride + self.kernel
        return reach - 1

    def padded_length(self, length: int) -> int:
        """Samples that the net reads for this many to come out complete.

        Example:
            >>> net = WaveUNet(hidden=1, depth=2, kernel=8, stride=4)
            >>> net.lookahead, net.padded_length(1), net.padded_length(17)
            (35, 36, 52)
        """
        return (-(-length // self.hop) - 1) * self.hop + self.lookahead + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Denoise whole sounds.

        Args:
            x: [B, N], at any N of at least 1.

        Returns:
            [B, N].
        """
        length = x.shape[-1]
        h = F.pad(x, (0, self.padded_length(length) - length))[:, None]  # [B, 1, N']
        skips = []
        for down in self.encoder:
            h = down(h)
            skips.append(h)
        h = self._cross(h)[0]
        for up in self.decoder:
            h = up(h + skips.pop())
        return h[:, 0, :length]

    def _cross(
        self, h: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """The bottleneck, [B, D, T] to the same, and its state."""
        if self.lstm is None or not h.shape[-1]:
            return h, state
        y, state = self.lstm(h.transpose(1, 2), state)
        y = y if self.join is None else self.join(y)
        return y.transpose(1, 2), state

    def init_state(self) -> UNetState:
        """The state before the first packet.

        Raises:
            InvalidInputError: The net is not causal.
        """
        if not self.causal:
            raise InvalidInputError("a U-Net that is not causal cannot stream; train it causal")
        return UNetState([None] * self.depth, [None] * self.depth, [None] * self.depth)

    def step(self, x: torch.Tensor, state: UNetState) -> tuple[torch.Tensor, UNetState]:
        """Take in a packet.

        Args:
            x: [B, N] at any N.
            state: From the packet before; left as it is.

        Returns:
            The samples that are complete, [B, M], and the new state. Feed zeros at the end until
            as many have come out as went in.
        """
        h = x[:, None]
        pending, skips, tails = list(state.pending), list(state.skips), list(state.tails)
        for level, down in enumerate(self.encoder):
            h, pending[level] = down.step(h, pending[level])  # type: ignore[operator]
            waiting = skips[level]
            skips[level] = h if waiting is None else torch.cat([waiting, h], -1)
        h, bottleneck = self._cross(h, state.bottleneck)
        for up, level in zip(self.decoder, reversed(range(self.depth)), strict=True):
            waiting, count = skips[level], h.shape[-1]
            assert waiting is not None
            skips[level] = waiting[..., count:]
            h, tails[level] = up.step(h + waiting[..., :count], tails[level])  # type: ignore[operator]
        return h[:, 0], UNetState(pending, skips, tails, bottleneck)


@torch.no_grad()
def _rescale(conv: nn.Conv1d | nn.ConvTranspose1d, reference: float = 0.1) -> None:
    """Divide weights and bias by sqrt(std / reference), so that all layers start alike."""
    scale = (conv.weight.std() / reference).sqrt() if conv.weight.numel() > 1 else 1.0
    conv.weight /= scale
    if conv.bias is not None:
        conv.bias /= scale
