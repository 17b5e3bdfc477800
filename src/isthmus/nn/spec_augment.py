"""SpecAugment: bands and stretches of time taken out of a spectrogram while training.

After Park et al., 2019 (arXiv 1904.08779), with time masks as a share of the
length as in "adaptive" SpecAugment (arXiv 1912.05533).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SpecAugment:
    """Masks of every example, none beyond its length.

    Attributes:
        freq_masks: Bands taken out.
        freq_width: Widest band.
        time_masks: Stretches taken out.
        time_share: Longest stretch, as a share of the frames of the example.
        fill_mean: Fill with the example's mean; 0 is the mean of normalised features.

    Example:
        >>> augment = SpecAugment(freq_masks=1, freq_width=2, time_masks=0)
        >>> x = augment(torch.ones(1, 4, 3), torch.tensor([3]), torch.Generator().manual_seed(1))
        >>> x[0, :, 0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """

    freq_masks: int = 2
    freq_width: int = 27
    time_masks: int = 10
    time_share: float = 0.05
    fill_mean: bool = False

    def __call__(
        self, features: torch.Tensor, frames: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Mask a batch.

        Args:
            features: [B, M, F].
            frames: Valid frames [B].
            generator: Source of the draws, on the CPU.

        Returns:
            [B, M, F], a copy.
        """
        batch, mels, length = features.shape
        frames = frames.cpu()
        bands = self._masks(
            torch.full((batch,), mels), torch.full((batch,), min(self.freq_width, mels)),
            self.freq_masks, mels, generator,
        )  # fmt: skip
        widest = (frames * self.time_share).long()
        times = self._masks(frames, widest, self.time_masks, length, generator)
        masked = (bands[:, :, None] | times[:, None]).to(features.device)
        fill = features.new_zeros(batch, 1, 1)
        if self.fill_mean:
            valid = torch.arange(length) < frames[:, None]
            total = (features * valid[:, None].to(features)).sum((1, 2))
            fill = (total / (frames * mels).to(features))[:, None, None]
        return torch.where(masked, fill, features)

    @staticmethod
    def _masks(
        sizes: torch.Tensor, widest: torch.Tensor, count: int, length: int, g: torch.Generator
    ) -> torch.Tensor:
        """True where one of ``count`` intervals of each example lies, bool [B, length]."""
        shape = (len(sizes), count)
        width = (torch.rand(shape, generator=g) * (widest[:, None] + 1)).long()
        start = (torch.rand(shape, generator=g) * (sizes[:, None] - width + 1)).long()
        place = torch.arange(length)
        inside = (place >= start[..., None]) & (place < (start + width)[..., None])
        return inside.any(1)
