"""What codecs of sound learn from: spectra at many scales, adversaries, and a balance of gradients.

After Défossez et al., "High Fidelity Neural Audio Compression", 2022 (arXiv 2210.13438), 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import InvalidInputError
from isthmus.models.audio_disc import Judged
from isthmus.signals.features import mel_filters

FLOOR = 1e-5


def log_mel(x: Tensor, size: int, rate: int, mels: int = 64) -> Tensor:
    """Natural log of the mel spectrum of magnitudes, hop a quarter of the window.

    Args:
        x: Sounds [B, N], longer than half a window.
        size: Window and FFT.
        rate: Of the sounds.
        mels: Bands M; some are empty where windows are short.

    Returns:
        [B, M, T].
    """
    window = torch.hann_window(size, device=x.device)
    spectrum = torch.stft(x, size, size // 4, window=window, normalized=True, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    filters = mel_filters(mels, size, rate).to(x)
    # areas of 1 Hz make filters tiny: heights of 1 instead
    filters = filters / filters.amax().clamp(min=1e-12)
    return (filters @ (power + 1e-12).sqrt()).clamp(min=FLOOR).log()


def multiscale_mel(
    estimate: Tensor,
    truth: Tensor,
    rate: int,
    *,
    sizes: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
    mels: int = 64,
) -> Tensor:
    """L1 plus L2 distance of log-mel spectra, averaged over window lengths (equation 3).

    Args:
        estimate: [B, N].
        truth: The same shape.
        rate: Hz.
        sizes: Windows.
        mels: Bands.

    Returns:
        Scalar.

    Raises:
        InvalidInputError: The shapes differ, or sounds are shorter than half a window.

    Example:
        >>> x = torch.randn(1, 4096)
        >>> round(float(multiscale_mel(torch.e * x, x, 16000, sizes=(512,))), 3)
        2.0
    """
    if estimate.shape != truth.shape or estimate.ndim != 2:
        raise InvalidInputError(
            f"both sounds are [B, N], got {list(estimate.shape)} and {list(truth.shape)}"
        )
    if estimate.shape[1] <= max(sizes) // 2:
        raise InvalidInputError(f"sounds need more than {max(sizes) // 2} samples")
    total = estimate.new_zeros(())
    for size in sizes:
        gap = log_mel(estimate, size, rate, mels) - log_mel(truth, size, rate, mels)
        total = total + gap.abs().mean() + gap.square().mean().add(1e-12).sqrt()
    return total / len(sizes)


def hinge_discriminator(real: Judged, decoded: Judged) -> Tensor:
    """``max(0, 1 - D(x)) + max(0, 1 + D(x'))``, averaged over scales (equation 5)."""
    pairs = zip(real, decoded, strict=True)
    found = [F.relu(1 - r).mean() + F.relu(1 + d).mean() for (r, _), (d, _) in pairs]
    return torch.stack(found).mean()


def hinge_generator(decoded: Judged) -> Tensor:
    """``max(0, 1 - D(x'))``, averaged over scales."""
    return torch.stack([F.relu(1 - d).mean() for d, _ in decoded]).mean()


def least_squares_discriminator(real: Judged, decoded: Judged) -> Tensor:
    """``(D(x) - 1)^2 + D(x')^2``, averaged over scales."""
    pairs = zip(real, decoded, strict=True)
    found = [(r - 1).square().mean() + d.square().mean() for (r, _), (d, _) in pairs]
    return torch.stack(found).mean()


def least_squares_generator(decoded: Judged) -> Tensor:
    """``(D(x') - 1)^2``, averaged over scales."""
    return torch.stack([(d - 1).square().mean() for d, _ in decoded]).mean()


def feature_matching(real: Judged, decoded: Judged) -> Tensor:
    """Distance of the discriminator's features over their mean size (equation 4)."""
    found = [
        (a.detach() - b).abs().mean() / a.detach().abs().mean().clamp(min=1e-8)
        for (_, xs), (_, ys) in zip(real, decoded, strict=True)
        for a, b in zip(xs, ys, strict=True)
    ]
    return torch.stack(found).mean()


class LossBalancer(nn.Module):
    """Gives every loss the share of the gradient that its weight says, however it is scaled.

    ::

        g_i = dl_i / dx'      G_i: moving average of || g_i ||      sum of R w_i / (sum w) g_i / G_i

    Norms are means over the sounds of a batch, so that what is learnt from beside the balance
    (commitment) weighs as much in large batches as in small ones.

    Losses that do not depend on x' (commitment) stay outside. The averages are buffers: a run that
    is resumed goes on with them.

    Args:
        weights: By name of the loss, positive.
        decay: Of the averages.
        norm: R.
        balance: Whether norms are divided by their averages; off, weights are those of the losses,
            as everywhere else.

    Raises:
        InvalidInputError: No loss, or a weight that is not positive.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> both = {"a": 50 * x.square().sum(), "b": -x.sum()}  # gradients 300 and -1
        >>> gradient, norms = LossBalancer({"a": 1.0, "b": 3.0}).gradient(both, x)
        >>> gradient.tolist(), norms["a"].item()  # 1/4 - 3/4
        ([-0.5], 0.25)
    """

    average: Tensor
    seen: Tensor

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        decay: float = 0.999,
        norm: float = 1.0,
        balance: bool = True,
    ) -> None:
        super().__init__()
        if not weights or min(weights.values()) <= 0:
            raise InvalidInputError(f"every loss has a positive weight, got {dict(weights)}")
        self.weights, self.decay, self.norm, self.balance = dict(weights), decay, norm, balance
        self.register_buffer("average", torch.zeros(len(weights)))
        self.register_buffer("seen", torch.zeros(len(weights)))

    def gradient(self, losses: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient to go on with from x', and the share each loss has in it.

        Args:
            losses: Some or all of those that have a weight; averages of others stay.
            x: x', which they depend on.

        Returns:
            A gradient of the shape of x', and the norm of each loss's part in it.
        """
        names, places = list(losses), {name: i for i, name in enumerate(self.weights)}
        grads = [torch.autograd.grad(losses[name], x, retain_graph=True)[0] for name in names]
        norms = torch.stack([g.view(len(g), -1).norm(dim=1).mean() for g in grads])
        at = torch.tensor([places[name] for name in names], device=x.device)
        weights = torch.tensor([self.weights[name] for name in names], device=x.device)
        if not self.balance:
            scale = weights
        else:
            if self.training:
                self.average[at] = self.average[at].lerp(norms, 1 - self.decay)
                self.seen[at] = self.seen[at].lerp(torch.ones_like(norms), 1 - self.decay)
            mean = self.average[at] / self.seen[at].clamp(min=1e-12)
            mean = torch.where(self.seen[at] > 0, mean, norms)
            scale = self.norm * weights / weights.sum() / mean.clamp(min=1e-12)
        total = torch.zeros_like(x)
        for factor, grad in zip(scale, grads, strict=True):
            total = total + factor * grad
        return total, dict(zip(names, scale * norms, strict=True))
