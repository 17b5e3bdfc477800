"""What codecs of sound share: how files are opened, what is refused, and pieces with neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from isthmus.codecs.base import TrainedCodec
from isthmus.roles import Medium, Signal
from isthmus.signals.audio import fit, read

MOST_CHANNELS = 8


class SoundCodec(TrainedCodec):
    """Base of trained codecs of sound: float32 at the rate of ``settings.rate_hz``."""

    medium: ClassVar[Medium] = "audio"

    def open(self, path: Path) -> Signal:
        """A sound, brought to the codec's rate: as it is where it has that, else as one channel."""
        signal, rate = super().open(path), self.settings.rate_hz
        if signal.info["rate_hz"] == rate:
            return signal
        wave, _ = fit(read(path), rate, name=str(path))
        info = {"medium": "audio", "dtype": "float32", "shape": list(wave.samples.shape)}
        return Signal(info | {"rate_hz": rate}, [wave.samples])

    def check_sound(self, info: Mapping[str, Any], error: type[Exception]) -> None:
        """Raise an error where a sound is of another kind than the codec's."""
        hz, kind, channels = info["rate_hz"], info["dtype"], info["shape"][0]
        wanted = (self.settings.rate_hz, "float32")
        if (hz, kind) != wanted or not 1 <= channels <= MOST_CHANNELS:
            takes = f"1 to {MOST_CHANNELS} channels of {self.settings.rate_hz} Hz in float32"
            raise error(f"this codec takes {takes}, not {channels} of {hz} Hz in {kind}")


class Piece(NamedTuple):
    """A piece between its neighbours.

    Attributes:
        window: [..., left + own + right].
        left: Places of the piece before.
        own: Places of the piece itself.
    """

    window: Tensor
    left: int
    own: int


def overlapped(pieces: Iterable[Tensor], margin: int) -> Iterator[Piece]:
    """Pieces with what lies beside them, for nets that look to both sides but not far.

    Args:
        pieces: [..., N] each, of the same leading sizes; each but the last has ``margin`` places or
            more where nothing may be missing.
        margin: Places wanted on either side; the first and the last piece have none outside.

    Example:
        >>> found = overlapped(torch.arange(5.0).split(2), 1)
        >>> [(window.tolist(), left, own) for window, left, own in found]
        [([0.0, 1.0, 2.0], 0, 2), ([1.0, 2.0, 3.0, 4.0], 1, 2), ([3.0, 4.0], 1, 1)]
    """
    before = now = None
    for after in chain(pieces, [None]):
        if now is not None:
            parts = (
                [now] if before is None else [before[..., max(0, before.shape[-1] - margin) :], now]
            )
            left = sum(part.shape[-1] for part in parts[:-1])
            parts += [] if after is None else [after[..., :margin]]
            yield Piece(torch.cat(parts, -1), left, now.shape[-1])
        before, now = now, after
