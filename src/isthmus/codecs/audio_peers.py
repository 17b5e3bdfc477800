"""Lossy coders of sound that ours are measured beside: Opus and MP3, through PyAV."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.errors import InvalidInputError, UnknownNameError, require
from isthmus.metrics.sound import aligned
from isthmus.signals.audio import resample

FORMATS = {
    "opus": ("libopus", "ogg", {"application": "voip"}),
    # headers count less in long packets: the least that Opus can do with
    "opus-long": ("libopus", "ogg", {"application": "voip", "frame_duration": "60"}),
    "mp3": ("libmp3lame", "mp3", {}),
}
"""Encoder, container and options by name."""


@dataclass(frozen=True)
class Heard:
    """What a coder makes of a sound.

    Attributes:
        samples: float32 [N], aligned with the sound and of its length.
        packet_bytes: Sum of the packets, as payload is counted.
        file_bytes: The whole file.
        delay: Samples by which it came late.
    """

    samples: torch.Tensor
    packet_bytes: int
    file_bytes: int
    delay: int


def through(name: str, samples: torch.Tensor, rate: int, kbps: float) -> Heard:
    """Code and decode a sound.

    Args:
        name: ``opus``, ``opus-long`` (packets of 60 ms) or ``mp3``.
        samples: float32 [N], nominally within [-1, 1].
        rate: Hz; one that the coder takes: 8, 12, 16, 24 or 48 kHz.
        kbps: Wanted kbit/s; what it really takes is in the answer.

    Raises:
        UnknownNameError: No such coder.
        InvalidInputError: The coder refuses the rate.
        MissingExtraError: PyAV is not installed.
    """
    if name not in FORMATS:
        raise UnknownNameError("coder of sound", name, FORMATS)
    av: Any = require("av", "codec")
    codec, form, options = FORMATS[name]
    file, packets = io.BytesIO(), 0
    pcm = (samples * 32768).round().clamp(-32768, 32767).short().numpy()
    try:
        with av.open(file, "w", format=form) as out:
            stream = out.add_stream(codec, rate=rate, options=options)
            stream.bit_rate, stream.layout = round(1000 * kbps), "mono"
            frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
            frame.sample_rate = rate
            for given in (frame, None):
                for packet in stream.encode(given):
                    packets += packet.size
                    out.mux(packet)
    except av.FFmpegError as error:
        raise InvalidInputError(f"{name} refuses {rate} Hz at {kbps} kbit/s ({error})") from error
    data, back, at = file.getvalue(), [], rate
    with av.open(io.BytesIO(data)) as given:
        for decoded in given.decode(audio=0):
            part = torch.from_numpy(decoded.to_ndarray()).float()
            packed = decoded.format.is_planar or part.shape[0] > 1
            part = part.mean(0) if packed else part[0].view(-1, decoded.layout.nb_channels).mean(1)
            back.append(part / 32768 if decoded.format.name.startswith("s16") else part)
            at = decoded.sample_rate
    sound = torch.cat(back)
    sound = sound if at == rate else resample(sound, at, rate)
    found, _, late = aligned(sound, samples)
    pad = len(samples) - len(found)
    before = max(0, -late)
    whole = torch.nn.functional.pad(found, (before, max(0, pad - before)))[: len(samples)]
    return Heard(whole, packets, len(data), late)
