"""Trials that codecs of sound are put to: bytes, static tables, gradient shares, and listening."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.codecs.audio_peers import through
from isthmus.codecs.base import TrainedCodec, pack, unpack
from isthmus.codecs.rangecoder import Table, encode_indexed
from isthmus.metrics.sound import aligned, log_mel_distance
from isthmus.metrics.speech import character_error_rate, si_sdr, stoi
from isthmus.models.seanet import folded
from isthmus.roles import Signal
from isthmus.training.audio_codec import AudioCodec, CodecLearner
from isthmus.workbench.recogniser import Recogniser

RATE = 16_000

PEERS = (
    ("Opus at its least", "opus-long", 3.0),
    ("Opus 6", "opus", 6.0),
    ("Opus 12", "opus", 12.0),
    ("MP3 16", "mp3", 16.0),
)
"""Classical coders and the kbit/s they are asked for."""


def signal(sound: Tensor) -> Signal:
    """A sound [N] at 16 kHz as a signal."""
    info = {"medium": "audio", "dtype": "float32", "shape": [1, len(sound)], "rate_hz": RATE}
    return Signal(info, [sound[None]])


def coded(
    codec: TrainedCodec, sounds: Sequence[Tensor], rate: float | None = None
) -> tuple[int, list[Tensor]]:
    """Bytes of the payloads of sounds in files, and the sounds that come back."""
    total, back = 0, []
    for sound in sounds:
        file = io.BytesIO()
        total += pack(codec, signal(sound), file, rate=rate).payload
        back.append(torch.cat(list(unpack(file.getvalue(), codec=codec).signal.chunks), 1)[0])
    return total, back


@torch.no_grad()
def codes(module: AudioCodec, sound: Tensor, hop: int) -> Tensor:
    """Codes of a whole sound, [n_q, T]."""
    x = F.pad(sound, (0, -len(sound) % hop))[None, None]
    found: Tensor = module.quantizer.encode(module.encoder(x))[:, 0]  # type: ignore[operator]
    return found


@torch.no_grad()
def whole(module: AudioCodec, sound: Tensor, hop: int) -> Tensor:
    """A sound [N] through encoder, codebooks and decoder at once."""
    found = module.quantizer.decode(codes(module, sound, hop)[:, None])  # type: ignore[operator]
    y: Tensor = module.decoder(found)
    return y[0, 0, : len(sound)]


@torch.no_grad()
def codebooks(module: AudioCodec, sounds: Sequence[Tensor], hop: int) -> dict[str, list[float]]:
    """Statistics of each codebook over the vectors of all sounds together.

    Args:
        module: The codec.
        sounds: [N] each.
        hop: Samples of a frame.

    Returns:
        ``perplexity``, ``used`` and ``explained``, as :class:`~isthmus.nn.quantize.Quantized` has
        them, and ``energy``: each channel's share of the variance, [D].
    """
    padded = (F.pad(x, (0, -len(x) % hop))[None, None] for x in sounds)
    z = torch.cat([module.encoder(x) for x in padded], -1)
    energy = z[0].var(1, unbiased=False)
    found = module.quantizer(z).stats | {"energy": energy / energy.sum()}
    return {name: value.tolist() for name, value in found.items()}


def largest_share(explained: Sequence[float]) -> float:
    """The part that the most important codebook has in all that codebooks explain.

    Example:
        >>> largest_share([0.25, 0.5, 0.25])
        0.5
    """
    return max(explained) / max(sum(explained), 1e-12)


@torch.no_grad()
def streamed(module: AudioCodec, sound: Tensor, hop: int) -> tuple[float, float, float]:
    """A sound frame by frame, and as a whole.

    Args:
        module: The codec, of nets that stream.
        sound: [N].
        hop: Samples of a frame.

    Returns:
        How far the encoder's vectors are apart at most; how far the decoder's sounds of the same
        codes are; and the share of codes that are another: vectors that differ by rounding alone
        take another code where two are equally near.
    """
    x = F.pad(sound, (0, -len(sound) % hop))[None, None]
    encoder, decoder, quantizer = folded(module.encoder), folded(module.decoder), module.quantizer
    states, pieces = encoder.init_state(), []
    for piece in torch.split(x, hop, -1):
        z, states = encoder.step(piece, states)
        pieces.append(z)
    z, whole_z = torch.cat(pieces, -1), module.encoder(x)
    mine, others = quantizer.encode(z), quantizer.encode(whole_z)  # type: ignore[operator]
    states, pieces = decoder.init_state(), []
    for piece in torch.split(quantizer.decode(mine), 1, -1):  # type: ignore[operator]
        y, states = decoder.step(piece, states)
        pieces.append(y)
    whole_y = module.decoder(quantizer.decode(mine))  # type: ignore[operator]
    far = [float((a - b).abs().max()) for a, b in ((z, whole_z), (torch.cat(pieces, -1), whole_y))]
    return far[0], far[1], float((mine != others).float().mean())


def static_bytes(
    module: AudioCodec,
    hop: int,
    learnt: Sequence[Tensor],
    sounds: Sequence[Tensor],
    *,
    size: int,
    packet: int,
) -> int:
    """Bytes of sounds where each codebook has one table, counted on other sounds.

    Args:
        module: The codec.
        hop: Samples of a frame.
        learnt: Sounds to count on.
        sounds: Sounds to code.
        size: K.
        packet: Frames that are coded together.
    """
    counts = torch.cat([codes(module, x, hop) for x in learnt], 1)
    tables = [Table.from_counts(torch.bincount(c, minlength=size) + 0.5) for c in counts]
    total = 0
    for sound in sounds:
        for part in torch.split(codes(module, sound, hop), packet, 1):
            books = torch.arange(len(part))[:, None].expand_as(part)
            total += len(encode_indexed(part.numpy(), books.numpy(), tables))
    return total


def gradient_shares(
    module: AudioCodec, learner: CodecLearner, *, balance: bool, batches: int = 96
) -> dict[str, float]:
    """Shares of losses in the mean norms of gradients at the decoded sound; nothing is learnt.

    Args:
        module: The codec as it was trained.
        learner: Gives batches.
        balance: Whether gradients are balanced, by the averages of the training, or weighed alone.
        batches: How many are looked at.
    """
    balancer, found = module.balancer, dict.fromkeys(module.balancer.weights, 0.0)
    before, balancer.balance = balancer.balance, balance
    try:
        for part in range(batches):
            _, told = module.eval()(learner.batch(part)[0], None, True)
            for name in found:
                found[name] += float(told[f"norm_{name}"])
    finally:
        balancer.balance = before
    whole = sum(found.values())
    return {name: norm / whole for name, norm in found.items()}


def off_weights(shares: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """How far shares are from their weights at most, as a part of the weight.

    Example:
        >>> off_weights({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 3.0})
        1.0
    """
    total = sum(weights.values())
    return max(abs(shares[name] * total / weight - 1) for name, weight in weights.items())


def peers(sounds: Sequence[Tensor]) -> dict[str, tuple[float, list[Tensor]]]:
    """What classical coders take, kbit/s of packets, and what they give back."""
    seconds, found = sum(map(len, sounds)) / RATE, {}
    for name, coder, kbps in PEERS:
        heard = [through(coder, x, RATE, kbps) for x in sounds]
        took = sum(h.packet_bytes for h in heard) * 8 / seconds / 1000
        found[name] = (took, [h.samples for h in heard])
    return found


def compared(back: Sequence[Tensor], sounds: Sequence[Tensor]) -> dict[str, float]:
    """How decoded sounds compare with what was coded: ``mel_db`` and ``stoi``."""
    pairs = list(zip(back, sounds, strict=True))
    return {
        "mel_db": sum(log_mel_distance(a, b) for a, b in pairs) / len(pairs),
        "stoi": stoi(back, sounds).mean,
    }


def listen(
    listener: Recogniser, back: Sequence[Tensor], sounds: Sequence[Tensor], texts: Sequence[str]
) -> dict[str, float]:
    """How decoded sounds compare with what was coded.

    Args:
        listener: A frozen recogniser.
        back: Decoded sounds.
        sounds: The sounds; the first ones say the texts.
        texts: What is said.

    Returns:
        ``mel_db``, ``stoi``, ``cer`` and ``si_sdr_db``.
    """
    pairs: list[Any] = list(zip(back, sounds, strict=True))
    heard = [listener.transcribe([x])[0] for x in back[: len(texts)]]
    read_out = [listener.letters.decode(t.tokens) for t in heard]
    sdr = [si_sdr(*aligned(a, b)[:2]) for a, b in pairs]
    return compared(back, sounds) | {
        "cer": character_error_rate(texts, read_out).rate,
        "si_sdr_db": float(torch.stack(sdr).mean()),
    }
