"""How codecs of sound learn: encoder, quantizer and decoder against an adversary, under a balancer.

::

    x ─▶ encoder ─▶ quantizer ─▶ decoder ─▶ x'      losses of x' ─▶ balancer ─▶ one gradient at x'
                       │                             x, x' ─▶ discriminator, with its own loss
                       codes ─▶ model of codes, when all the rest has learnt and stays as it is

Codec and discriminator take one step together: what the discriminator learns from has no gradient
into the codec, and what the codec learns from is the gradient at x' that the balancer gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.metrics.sound import log_mel_distance
from isthmus.models.audio_disc import Judged
from isthmus.models.code_lm import CodeLM
from isthmus.objectives.audio import (
    LossBalancer,
    feature_matching,
    hinge_discriminator,
    hinge_generator,
    least_squares_discriminator,
    least_squares_generator,
    multiscale_mel,
)
from isthmus.roles import Loss
from isthmus.training.data import Data, Spoken
from isthmus.training.loop import Plan
from isthmus.training.seeds import batch_generator


@dataclass(frozen=True)
class Goals:
    """What a codec learns from.

    Attributes:
        rate_hz: Of the sounds.
        l1: Weight of the distance of waveforms; weights of 0 leave a loss out.
        mel: Weight of the distance of spectra.
        adversarial: Weight of the discriminator's judgement.
        features: Weight of the distance of its features.
        commitment: Weight of the quantizer's own loss, outside the balance.
        hinge: Whether judgements are hinged; else they are squared.
        mel_sizes: Windows.
        balance: Whether weights are shares of the gradient.
        decay: Of the balancer's averages.
    """

    rate_hz: int
    l1: float = 0.1
    mel: float = 1.0
    adversarial: float = 3.0
    features: float = 3.0
    commitment: float = 1.0
    hinge: bool = True
    mel_sizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    balance: bool = True
    decay: float = 0.999


class AudioCodec(nn.Module):
    """A codec and all that it learns with.

    Args:
        encoder: [B, 1, N] to [B, D, T].
        quantizer: Of :mod:`isthmus.nn.quantize`.
        decoder: [B, D, T] to [B, 1, N].
        goals: What it learns from.
        discriminator: Judges sounds [B, N]; None learns without.
        lm: Model of the codes; it learns last, from the codes alone.
    """

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: nn.Module,
        decoder: nn.Module,
        goals: Goals,
        discriminator: nn.Module | None = None,
        lm: CodeLM | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.goals, self.discriminator, self.lm = goals, discriminator, lm
        g = goals
        weights = {"l1": g.l1, "mel": g.mel}
        if discriminator is not None:
            weights |= {"adversarial": g.adversarial, "features": g.features}
        weights = {name: weight for name, weight in weights.items() if weight}
        self.balancer = LossBalancer(weights, decay=g.decay, balance=g.balance)

    def forward(
        self, x: Tensor, n_q: int | None = None, judged: bool = False, judging: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of sounds, and what to report.

        Args:
            x: [B, N], N a multiple of the hop; or codes, int64 [n_q, B, T], from which the model of
                the codes learns and nothing else.
            n_q: Codebooks used; 0 lets vectors pass as they are, so that codebooks can begin later.
            judged: Whether the codec learns from the discriminator.
            judging: Whether the discriminator learns.
        """
        if self.lm is not None and not x.is_floating_point():
            nats = self.lm.nats(x).mean()
            return nats, {"nats": nats.detach()}
        z = self.encoder(x[:, None])
        found: Any = None if n_q == 0 else self.quantizer(z, n_q)
        y = self.decoder(z if found is None else found.z_q)[:, 0]
        losses, real = self._losses(x, y, judged)
        gradient, norms = self.balancer.gradient(losses, y)
        value = sum(self.balancer.weights[k] * v.detach() for k, v in losses.items())
        along = (y * gradient).sum()
        total = along + (value - along).detach()
        told = {k: v.detach() for k, v in losses.items()}
        told |= {f"norm_{k}": v for k, v in norms.items()}
        if found is not None:
            total = total + self.goals.commitment * found.commit_loss
            told |= {"commit": found.commit_loss.detach()}
            told |= {k: found.stats[k].mean() for k in ("used", "perplexity")}
        if judging and self.discriminator is not None:
            real = self.discriminator(x) if real is None else real
            verdict = hinge_discriminator if self.goals.hinge else least_squares_discriminator
            loss = verdict(real, self.discriminator(y.detach()))
            total, told["discriminator"] = total + loss, loss.detach()
        return total, told

    def _losses(
        self, x: Tensor, y: Tensor, judged: bool
    ) -> tuple[dict[str, Tensor], Judged | None]:
        """Losses of x', and what the discriminator says of x."""
        g, losses, real = self.goals, {}, None
        if g.l1:
            losses["l1"] = (y - x).abs().mean()
        if g.mel:
            losses["mel"] = multiscale_mel(y, x, g.rate_hz, sizes=g.mel_sizes)
        if judged and self.discriminator is not None:
            real = self.discriminator(x)
            fake: Judged = self.discriminator(y)
            verdict = hinge_generator if g.hinge else least_squares_generator
            losses |= {"adversarial": verdict(fake), "features": feature_matching(real, fake)}
        return losses, real


class CodecSettings(Protocol):
    """What the learner asks of a system's settings."""

    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def segment_s(self) -> float: ...  # noqa: D102
    @property
    def choices(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def quantized_from(self) -> float: ...  # noqa: D102
    @property
    def judged_from(self) -> float: ...  # noqa: D102
    @property
    def judging(self) -> float: ...  # noqa: D102


class CodecLearner:
    """Windows of sound at a random level, and the loss of :class:`AudioCodec`.

    Args:
        module: What learns.
        hop: Samples of a frame.
        settings: ``batch_size``, ``segment_s``, ``choices`` (numbers of codebooks, one drawn for
            each batch), ``quantized_from`` and ``judged_from`` (shares of the training after which
            codebooks and the discriminator count) and ``judging`` (how often it learns).
        data: Sounds.
        plan: The training.
        says: Plain data that decides what is learnt.
        coding: Share of the training after which the model of the codes learns, while all else
            stays as it is; length of its windows in seconds; and how many are a batch.
    """

    lower_is_better = True

    def __init__(
        self,
        module: AudioCodec,
        hop: int,
        settings: CodecSettings,
        data: Data[Spoken],
        plan: Plan,
        says: Mapping[str, Any],
        coding: tuple[float, float, int] = (1.0, 1.0, 1),
    ) -> None:
        self.module: Any = module
        self.settings, self.plan, self.rate, self.hop = settings, plan, module.goals.rate_hz, hop
        self.identity = {**says, "data": data.fingerprint}
        self.train = list(data.train)
        self.valid = [record.sound.at(self.rate) for record in data.valid[:16]]
        self.window = round(settings.segment_s * self.rate) // hop * hop
        self.coding_from, coding_s, self.coding_size = coding
        self.frames = max(2, round(coding_s * self.rate) // hop)
        self.codes: dict[int, Tensor] = {}  # of whole sounds, once they stay as they are
        if self.window < max(module.goals.mel_sizes):
            raise InvalidInputError(
                f"segment_s of {settings.segment_s} is {self.window} samples, below the longest "
                f"window, {max(module.goals.mel_sizes)}; give a longer one"
            )

    def batch(self, part: int) -> tuple[Any, ...]:
        """Sounds [B, N], codebooks, and whether the discriminator counts and learns; or codes."""
        s, draw = self.settings, batch_generator(self.plan.seed, part)
        done = part / (self.plan.steps * self.plan.accumulate)
        if self.module.lm is not None and done >= self.coding_from:
            return (self._codes(draw),)
        rows = torch.randint(len(self.train), (s.batch_size,), generator=draw).tolist()
        starts = torch.rand(s.batch_size, generator=draw).tolist()
        gains = 10 ** (torch.empty(s.batch_size, 1).uniform_(-10, 6, generator=draw) / 20)
        cuts = []
        for row, start in zip(rows, starts, strict=True):
            sound = self.train[row].sound.at(self.rate)
            sound = F.pad(sound, (0, max(0, self.window - len(sound))))
            at = int(start * (len(sound) - self.window + 1))
            cuts.append(sound[at : at + self.window])
        n_q = self._count(draw)
        n_q, late = (n_q if done >= s.quantized_from else 0), done >= s.judged_from
        learns = float(torch.rand((), generator=draw)) < s.judging
        return (torch.stack(cuts) * gains).clamp(-1, 1), n_q, late, late and learns

    @torch.no_grad()
    def _codes(self, draw: torch.Generator) -> Tensor:
        """Codes [n_q, B, T] of windows, by a codec that learns no more."""
        module, cuts = self.module, []
        rows = torch.randint(len(self.train), (self.coding_size,), generator=draw).tolist()
        starts = torch.rand(self.coding_size, generator=draw).tolist()
        for row, start in zip(rows, starts, strict=True):
            if row not in self.codes:
                sound = self.train[row].sound.at(self.rate)
                more = max(-len(sound) % self.hop, self.frames * self.hop - len(sound))
                x = F.pad(sound, (0, more))[None, None].to(module.quantizer.layers[0].embed)
                self.codes[row] = module.quantizer.encode(module.encoder(x))[:, 0].cpu()
            found = self.codes[row]
            at = int(start * (found.shape[1] - self.frames + 1))
            cuts.append(found[:, at : at + self.frames])
        return torch.stack(cuts, 1)[: self._count(draw)]

    def _count(self, draw: torch.Generator) -> int:
        """How many codebooks a batch uses."""
        choices = self.settings.choices
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    def loss(self, batch: tuple[Any, ...]) -> Loss:
        """Of one batch."""
        total, told = self.module(*batch)
        return Loss(total, 1.0, dict(told))

    def validate(self) -> dict[str, float]:
        """Log-mel distance with all codebooks, and what the model of codes saves."""
        module, distance, bits, codes = self.module, 0.0, 0.0, 0
        for sound in self.valid:
            x = F.pad(sound, (0, -len(sound) % self.hop))[None, None]
            found = module.quantizer(module.encoder(x))
            y = module.decoder(found.z_q)[0, 0, : len(sound)]
            distance += log_mel_distance(y, sound, self.rate)
            if module.lm is not None:
                bits += float(module.lm.nats(found.codes).sum() / torch.tensor(2.0).log())
                codes += found.codes.numel()
        told = {"mel_db": distance / len(self.valid)}
        return told | ({"bits_per_code": bits / codes} if codes else {})
