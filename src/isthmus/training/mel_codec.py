"""How codecs of mel spectra learn: from windows, with a reference taken elsewhere in the recording.

::

    recording  ──── reference ────┊┄┄┊──── window ────
                      │ g             │ mel ─▶ encoder ─▶ codebook ─▶ decoder ─▶ mel'
                      └───────────────┴──────────────────────────────────┘

A reference that shared the window's moments could tell them to the decoder for nothing: what is
sent once would then be counted as if it held no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.metrics.sound import mel_cepstral_distance
from isthmus.models.mel_codec import (
    FACTOR,
    LEVELS,
    Form,
    MelDecoder,
    MelDiscriminator,
    MelEncoder,
    ReferenceEncoder,
    rounded,
)
from isthmus.nn.quantize import VQ
from isthmus.objectives.audio import least_squares_discriminator, least_squares_generator
from isthmus.roles import Loss
from isthmus.signals.mel import MelSpectrum
from isthmus.training.data import Data, Spoken
from isthmus.training.loop import Plan
from isthmus.training.seeds import batch_generator


class MelCodec(nn.Module):
    """Reference encoder, encoder, codebook, decoder and, where there is one, their adversary.

    Args:
        form: Sizes.
        size: K.
        decay: Of the codebook's averages.
        dead_below: See :class:`~isthmus.nn.quantize.VQ`.
        commitment: Weight of its loss.
        disc_width: Channels of the adversary; 0 for none.
        adversarial: Weight of its judgement.
    """

    def __init__(
        self,
        form: Form,
        size: int,
        *,
        decay: float = 0.99,
        dead_below: float = 2.0,
        commitment: float = 0.25,
        disc_width: int = 0,
        adversarial: float = 0.1,
    ) -> None:
        super().__init__()
        width, mels = form.width, form.mels
        self.reference = ReferenceEncoder(mels, width // 2, form.g_dim) if form.g_dim else None
        self.encoder, self.decoder = MelEncoder(form), MelDecoder(form)
        self.quantizer = VQ(form.dim, size, decay=decay, dead_below=dead_below)
        self.discriminator = MelDiscriminator(disc_width) if disc_width else None
        self.commitment, self.adversarial = commitment, adversarial

    def vector(self, mel: Tensor, frames: Tensor | None = None) -> Tensor | None:
        """What stays, [B, G] on the grid of files; None for a codec without."""
        return None if self.reference is None else rounded(self.reference(mel, frames))

    def forward(
        self,
        mel: Tensor,
        other: Tensor,
        frames: Tensor,
        quantized: bool = True,
        judged: bool = False,
        heard: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of spectra, and what to report.

        Args:
            mel: Windows [B, M, F].
            other: References from elsewhere [B, M, R].
            frames: Valid frames of the references [B].
            quantized: Whether codes are used yet; vectors pass as they are before.
            judged: Whether the adversary counts and learns.
            heard: What the encoder hears instead of the windows, [B, M, F].
        """
        g = self.vector(other, frames)
        z, told = self.encoder(mel if heard is None else heard, g), {}
        if quantized:
            found = self.quantizer(z)
            told = {"commit": found.commit_loss.detach()}
            told |= {k: found.stats[k].mean() for k in ("used", "perplexity")}
        y = self.decoder(found.z_q if quantized else z, g)
        told |= {"l1": F.l1_loss(y, mel), "l2": F.mse_loss(y, mel)}
        total = told["l1"] + told["l2"]
        if quantized:
            total = total + self.commitment * found.commit_loss
        if judged and self.discriminator is not None:
            fooled = least_squares_generator(self.discriminator(y))
            # at y: the adversary has no part in being fooled
            (gradient,) = torch.autograd.grad(fooled, y)
            along = (y * gradient).sum()
            total = total + self.adversarial * (along + (fooled - along).detach())
            verdict = least_squares_discriminator(
                self.discriminator(mel), self.discriminator(y.detach())
            )
            total = total + verdict
            told |= {"fooled": fooled, "discriminator": verdict}
        return total, {k: v.detach() for k, v in told.items()}

    @torch.no_grad()
    def numbers(self, mel: Tensor) -> Tensor:
        """What is sent of g, heard in spectra [B, M, R]: -127 to 127, int64 [B, G]; G may be 0."""
        g = self.vector(mel)
        return (mel.new_zeros(len(mel), 0) if g is None else (g * LEVELS).round()).long()

    @torch.no_grad()
    def codes(self, mel: Tensor, numbers: Tensor) -> Tensor:
        """Codes [B, F / 4] of spectra [B, M, F] from which g is taken away."""
        return self.quantizer.encode(self.encoder(mel, self._vector(numbers)))

    @torch.no_grad()
    def spectra(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """The spectra [B, M, 4 T] of what was sent."""
        y: Tensor = self.decoder(self.quantizer.decode(codes), self._vector(numbers))
        return y

    def _vector(self, numbers: Tensor) -> Tensor | None:
        return None if self.reference is None else numbers.float() / LEVELS


def elsewhere(length: int, at: int, window: int, most: int, draws: tuple[float, float]) -> slice:
    """A stretch of a recording outside a window.

    Args:
        length: Of the recording.
        at: Where the window begins.
        window: Its length.
        most: Longest stretch.
        draws: Two numbers from 0 to below 1: which side, and where on it.

    Returns:
        At most ``most`` long; the whole recording where less than a quarter of the window is left
        on either side.

    Example:
        >>> elsewhere(100, 60, 30, 50, (0.0, 0.0)), elsewhere(100, 60, 30, 50, (0.99, 0.0))
        (slice(0, 50, None), slice(90, 100, None))
    """
    before, after = at, length - at - window
    least = max(1, window // 4)
    if max(before, after) < least:
        return slice(0, length)
    first = draws[0] * (before + after) < before
    if (before if first else after) < least:
        first = not first
    room, start = (before, 0) if first else (after, at + window)
    taken = min(most, room)
    start += int(draws[1] * (room - taken + 1))
    return slice(start, start + taken)


def played(sound: Tensor, samples: int) -> Tensor:
    """A sound [N] played so fast or slow that it has other samples, [samples].

    Pitch and resonances move together, as those of another speaker's throat do.

    Example:
        >>> played(torch.tensor([0.0, 2.0, 4.0, 6.0]), 2)
        tensor([1., 5.])
    """
    if samples == len(sound):
        return sound
    return F.interpolate(sound[None, None], samples, mode="linear")[0, 0]


class MelSettings(Protocol):
    """What the learner asks of a system's settings."""

    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def window(self) -> int: ...  # noqa: D102
    @property
    def heard(self) -> int: ...  # noqa: D102
    @property
    def quantized_from(self) -> float: ...  # noqa: D102
    @property
    def judged_from(self) -> float: ...  # noqa: D102
    @property
    def bend(self) -> float: ...  # noqa: D102
    @property
    def warp(self) -> float: ...  # noqa: D102


class Batch(NamedTuple):
    """What a step learns from; see :class:`MelCodec`."""

    mel: Tensor
    other: Tensor
    frames: Tensor
    quantized: bool
    judged: bool
    heard: Tensor | None = None


def warped(mel: Tensor, by: Tensor) -> Tensor:
    """Spectra as if others spoke: band m has what was at band ``by m``.

    An encoder that hears them cannot tell by its codes who speaks: only g does. After Jaitly and
    Hinton, "Vocal Tract Length Perturbation (VTLP) improves speech recognition", 2013.

    Args:
        mel: [B, M, F].
        by: Of each, [B].

    Example:
        >>> warped(torch.tensor([[[0.0], [1.0], [2.0], [3.0]]]), torch.tensor([1.5])).flatten()
        tensor([0.0000, 1.5000, 3.0000, 3.0000])
    """
    last = mel.shape[1] - 1
    places = (torch.arange(last + 1, device=mel.device) * by[:, None].to(mel)).clamp(max=last)
    low = places.long()[..., None].expand_as(mel)  # [B, M, F]
    part = (places - places.floor())[..., None]
    return mel.gather(1, low) * (1 - part) + mel.gather(1, (low + 1).clamp(max=last)) * part


class MelCodecLearner:
    """Windows of sound with references from elsewhere, and the loss of :class:`MelCodec`.

    Args:
        module: What learns.
        spectrum: Of the sounds.
        settings: ``batch_size``, ``window`` and ``heard`` (frames of windows and, at most, of
            references), ``quantized_from`` and ``judged_from`` (shares of the training after which
            codes and the adversary count), ``bend`` (recordings are played up to so many times
            faster or slower, each as if by a voice of its own) and ``warp`` (of
            :func:`warped`, at most).
        data: Sounds, each of one voice.
        plan: The training.
        says: Plain data that decides what is learnt.
    """

    lower_is_better = True

    def __init__(
        self,
        module: MelCodec,
        spectrum: MelSpectrum,
        settings: MelSettings,
        data: Data[Spoken],
        plan: Plan,
        says: Mapping[str, Any],
    ) -> None:
        self.module: Any = module
        self.spectrum, self.settings, self.plan = spectrum, settings, plan
        self.identity = {**says, "data": data.fingerprint}
        self.train = list(data.train)
        self.valid = [record.sound.at(spectrum.rate) for record in data.valid[:16]]

    def batch(self, part: int) -> Batch:
        """Spectra, at a level drawn for each row."""
        s, hop = self.settings, self.spectrum.hop
        draw = batch_generator(self.plan.seed, part)
        rows = torch.randint(len(self.train), (s.batch_size,), generator=draw).tolist()
        draws = torch.rand(s.batch_size, 4, generator=draw).tolist()
        gains = 10 ** (torch.empty(s.batch_size).uniform_(-6, 0, generator=draw) / 20)
        window, cuts, others = s.window * hop, [], []
        for row, (where, side, place, turn), gain in zip(rows, draws, gains, strict=True):
            sound, speed = self.train[row].sound.at(self.spectrum.rate), s.bend ** (2 * turn - 1)
            taken, most = round(window * speed), int(s.heard * hop * speed)
            sound = F.pad(sound, (0, max(0, taken - len(sound)))) * gain
            at = int(where * (len(sound) - taken + 1))
            away = elsewhere(len(sound), at, taken, most, (side, place))
            cuts.append(played(sound[at : at + taken], window))
            others.append(played(sound[away], max(1, int((away.stop - away.start) / speed))))
        frames = torch.tensor([-(-len(x) // hop) for x in others])
        longest = int(frames.max()) * hop
        padded = torch.stack([F.pad(x, (0, longest - len(x))) for x in others])
        done = part / (self.plan.steps * self.plan.accumulate)
        when = done >= s.quantized_from, done >= s.judged_from
        mel, heard = self.spectrum(torch.stack(cuts)), None
        if s.warp:
            by = 1 + s.warp * (2 * torch.rand(s.batch_size, generator=draw) - 1)
            heard = warped(mel, by)
        return Batch(mel, self.spectrum(padded), frames, *when, heard)

    def loss(self, batch: Batch) -> Loss:
        """Of one batch."""
        total, told = self.module(*batch)
        return Loss(total, 1.0, dict(told))

    def validate(self) -> dict[str, float]:
        """Mel-cepstral distance of held-out sounds, g taken from each itself."""
        distance = 0.0
        for sound in self.valid:
            x = F.pad(sound, (0, -len(sound) % (FACTOR * self.spectrum.hop)))
            mel = self.spectrum(x[None])
            numbers = self.module.numbers(mel)
            back = self.module.spectra(numbers, self.module.codes(mel, numbers))
            natural = self.spectrum.natural
            distance += mel_cepstral_distance(natural(back[0]), natural(mel[0]))
        return {"mcd_db": distance / len(self.valid)}
