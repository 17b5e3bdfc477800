"""A net that cleans sound, with what surrounds it: level and rate, whole or in a stream.

::

    [B, N] ─▶ / level ─▶ sinc x U ─▶ net ─▶ sinc / U ─▶ x level ─▶ [B, N]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from isthmus.nn.unet1d import UNetState, WaveUNet, conv_step

FLOOR = 1e-3
"""Added to the level, so that silence stays silent."""


@dataclass
class EnhancerState:
    """What a stream keeps: buffers, and the level of what was heard.

    Attributes:
        up: Inputs of the filter that raises the rate.
        net: State of the U-Net.
        down: Inputs of the filter that lowers it.
        levels: Levels of samples that have not come out yet, [B, n].
        energy: Sum of squares so far, [B, 1].
        heard: Samples so far.
        fixed: The level, where it was given, [B, 1].
    """

    up: torch.Tensor
    net: UNetState
    down: torch.Tensor
    levels: torch.Tensor
    energy: torch.Tensor
    heard: int = 0
    fixed: torch.Tensor | None = None


class WaveEnhancer(nn.Module):
    """A net from sound to sound of level 1, between two sinc filters.

    Plays :class:`~isthmus.roles.Streaming`. In a stream the level is that of all samples so far,
    or one that is given; whole sounds are divided by their standard deviation.

    Args:
        unet: The net.
        factor: U, by what the rate is multiplied inside.
        zeros: Zero crossings of the filters on either side.
    """

    def __init__(self, unet: WaveUNet, factor: int = 1, zeros: int = 56) -> None:
        super().__init__()
        self.unet, self.factor = unet, factor
        self.zeros = zeros if factor > 1 else 0
        reach = self.zeros * self.factor
        t = torch.arange(-reach, reach + 1) / self.factor
        low = torch.sinc(t) * torch.cos(t / (self.zeros + 1) * torch.pi / 2).square()
        self.up = nn.Conv1d(1, self.factor, 2 * self.zeros + 1, bias=False).requires_grad_(False)
        self.down = nn.Conv1d(1, 1, 2 * reach + 1, self.factor, bias=False).requires_grad_(False)
        # phase p of the high rate lies p / U of a sample ahead: every U-th tap, from the p-th on
        taps = F.pad(low, (0, self.factor - 1)).view(-1, self.factor).T  # [U, 2 zeros + 1]
        self.up.weight.copy_(taps.flip(1)[:, None])
        self.down.weight.copy_(low / self.factor)

    def needed(self, length: int) -> int:
        """Samples that must be heard for this many to come out complete."""
        high = (length - 1 + self.zeros) * self.factor + 1
        return -(-self.unet.padded_length(high) // self.factor) + self.zeros

    @property
    def lookahead(self) -> int:
        """Samples after a sample that may still change it; 16 per ms."""
        period = max(1, self.unet.hop // self.factor)
        return max(self.needed(n) - n for n in range(1, period + 1))

    def forward(self, x: torch.Tensor, level: torch.Tensor | None = None) -> torch.Tensor:
        """Clean whole sounds.

        Args:
            x: [B, N].
            level: What they are divided by, [B, 1]; None is their standard deviation.

        Returns:
            [B, N].
        """
        length = x.shape[-1]
        if level is None:
            level = x.std(-1, keepdim=True, correction=0)
        h = F.pad(x / (FLOOR + level), (self.zeros, self.needed(length) - length))
        h = self.up(h[:, None]).transpose(1, 2).flatten(1)  # [B, N U]
        h = self.unet(h)
        h = self.down(F.pad(h, (self.zeros * self.factor, 0))[:, None])[:, 0]
        y: torch.Tensor = h[:, :length] * (FLOOR + level)
        return y

    def init_state(self, batch: int, level: torch.Tensor | None = None) -> EnhancerState:
        """The state before the first packet; with a level [B, 1] it is not estimated."""
        none = next(self.parameters()).new_zeros(batch, 1, 0)
        up, down = (F.pad(none, (n, 0)) for n in (self.zeros, self.zeros * self.factor))
        energy = none.new_zeros(batch, 1)
        return EnhancerState(up, self.unet.init_state(), down, none[:, 0], energy, 0, level)

    @torch.no_grad()
    def step(self, chunk: torch.Tensor, state: EnhancerState) -> tuple[torch.Tensor, EnhancerState]:
        """Take in a packet [B, N]; what is complete comes out, [B, M]."""
        count = state.heard + torch.arange(1, chunk.shape[-1] + 1, device=chunk.device)
        energy = torch.cat([state.energy, chunk.square()], -1).cumsum(-1)
        level = (energy[:, 1:] / count).sqrt()
        if state.fixed is not None:
            level = state.fixed.expand_as(chunk)
        heard = state.heard + chunk.shape[-1]
        state = replace(state, energy=energy[:, -1:], heard=heard)
        state.levels = torch.cat([state.levels, FLOOR + level], -1)
        h, state = self._through(chunk / (FLOOR + level), state)
        levels, state.levels = state.levels.tensor_split([h.shape[-1]], -1)
        return h * levels, state

    @torch.no_grad()
    def flush(self, state: EnhancerState) -> torch.Tensor:
        """The last samples, as if silence followed."""
        due = state.levels.shape[-1]
        if not state.heard:
            return state.levels
        rest = state.levels.new_zeros(len(state.levels), self.needed(state.heard) - state.heard)
        return self._through(rest, state)[0][:, :due] * state.levels

    def _through(self, x: torch.Tensor, state: EnhancerState) -> tuple[torch.Tensor, EnhancerState]:
        """Filters and net on a packet whose level is 1."""
        h, up = conv_step(self.up, x[:, None], state.up)
        h, net = self.unet.step(h.transpose(1, 2).flatten(1), state.net)
        h, down = conv_step(self.down, h[:, None], state.down)
        return h[:, 0], replace(state, up=up, net=net, down=down)
