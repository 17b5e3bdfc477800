"""Trials that codecs of speech are put to where what stays of a voice is sent apart from its codes.

A frozen recogniser reads the sound that phases make of decoded spectra, a frozen judge tells whose
voice the spectra have, and vectors are given to sentences of other voices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from isthmus.metrics.sound import mel_cepstral_distance
from isthmus.metrics.speech import character_error_rate, stoi
from isthmus.signals.mel import MelSpectrum
from isthmus.workbench.recogniser import Recogniser
from isthmus.workbench.speech import Utterance
from isthmus.workbench.voices import Judge


class Sent(NamedTuple):
    """A sentence, and what a codec sends of it.

    Attributes:
        mel: Its spectrum [1, M, F].
        numbers: Of the vector, [1, G].
        codes: [1, T].
    """

    mel: Tensor
    numbers: Tensor
    codes: Tensor


class Sends(Protocol):
    """What decodes: :class:`~isthmus.training.mel_codec.MelCodec`, for one."""

    def spectra(self, numbers: Tensor, codes: Tensor) -> Tensor: ...  # noqa: D102


def inside(numbers: Tensor, each: int) -> float:
    """Share of the variance of vectors that lies within voices.

    Args:
        numbers: [V each, G], voice after voice.
        each: Vectors of a voice.

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [9.0], [11.0]])
        >>> round(inside(x, 2), 4)  # 1 of 1 + 4.5^2
        0.0471
    """
    g = numbers.double()
    own = g.view(-1, each, g.shape[1])
    within = (own - own.mean(1, keepdim=True)).square().mean()
    return float(within / (g - g.mean(0)).square().mean().clamp(min=1e-12))


def swaps(count: int, each: int) -> list[tuple[int, int]]:
    """For every ordered pair of voices a sentence of the first and another place in the second.

    Example:
        >>> swaps(2, 2)
        [(1, 2), (3, 0)]
    """
    pairs = itertools.permutations(range(count), 2)
    return [(a * each + (a + b) % each, b * each + (a + b + 1) % each) for a, b in pairs]


class Panel:
    """Frozen listeners and the sentences that they hear.

    Args:
        listener: The recogniser.
        teller: The judge of voices.
        spectrum: Of the spectra that are compared.
        spoken: For each voice as many sentences.
    """

    def __init__(
        self,
        listener: Recogniser,
        teller: Judge,
        spectrum: MelSpectrum,
        spoken: Sequence[Sequence[Utterance]],
    ) -> None:
        self.listener, self.teller, self.spectrum = listener, teller, spectrum
        self.count, self.each = len(spoken), len(spoken[0])
        self.sounds = [u.samples for own in spoken for u in own]
        self.texts = [u.line.target for own in spoken for u in own]
        self.whose = torch.arange(self.count).repeat_interleave(self.each)

    def misread(self, sounds: Iterable[Tensor], texts: Sequence[str]) -> float:
        """Rate of wrong characters in what the recogniser hears."""
        heard = [self.listener.transcribe([x])[0] for x in sounds]
        read = [self.listener.letters.decode(t.tokens) for t in heard]
        return character_error_rate(texts, read).rate

    def scores(self, mels: Iterable[Tensor]) -> Tensor:
        """Log-probabilities [N, V] of the voices of spectra [1, M, F]."""
        return torch.cat([self.teller(mel) for mel in mels])

    def quality(
        self, module: Sends, sent: Sequence[Sent], sounds: Sequence[Tensor]
    ) -> dict[str, float]:
        """How near decoded sentences are.

        Args:
            module: What decodes.
            sent: All sentences.
            sounds: What came back of them through files.

        Returns:
            ``mcd_db`` (of spectra, before phases), ``cer``, ``stoi``, ``voice`` (share whose voice
            is told right) and ``codes`` (how many different ones occur).
        """
        back = [module.spectra(x.numbers, x.codes) for x in sent]
        natural = self.spectrum.natural
        apart = [
            mel_cepstral_distance(natural(y[0]), natural(x.mel[0]))
            for x, y in zip(sent, back, strict=True)
        ]
        return {
            "mcd_db": sum(apart) / len(apart),
            "cer": self.misread(sounds, self.texts),
            "stoi": stoi(sounds, self.sounds).mean,
            "voice": float((self.scores(back).argmax(1) == self.whose).float().mean()),
            "codes": float(len(set(torch.cat([x.codes[0] for x in sent]).tolist()))),
        }

    def ceiling(self, mels: Sequence[Tensor]) -> dict[str, float]:
        """The same of spectra that nobody coded, through the same phases."""
        pairs = zip(mels, self.sounds, strict=True)
        sounds = [self.spectrum.sound(mel)[0, : len(x)] for mel, x in pairs]
        return {
            "mcd_db": 0.0,
            "cer": self.misread(sounds, self.texts),
            "stoi": stoi(sounds, self.sounds).mean,
            "voice": float((self.scores(mels).argmax(1) == self.whose).float().mean()),
        }

    def swapped(self, module: Sends, sent: Sequence[Sent]) -> dict[str, float]:
        """What becomes of sentences under the vectors of other voices.

        Returns:
            ``told``: share of pairs told as the target's voice; ``nearer``: share scored above the
            source's; ``own`` and ``other``: characters misheard with either vector.
        """
        pairs = swaps(self.count, self.each)
        kept = [module.spectra(sent[i].numbers, sent[i].codes) for i, _ in pairs]
        moved = [module.spectra(sent[j].numbers, sent[i].codes) for i, j in pairs]
        score, row = self.scores(moved), torch.arange(len(pairs))
        source, target = (self.whose[[pair[k] for pair in pairs]] for k in (0, 1))
        texts = [self.texts[i] for i, _ in pairs]
        own, other = (
            self.misread([self.spectrum.sound(y)[0] for y in ys], texts) for ys in (kept, moved)
        )
        return {
            "told": float((score.argmax(1) == target).float().mean()),
            "nearer": float((score[row, target] > score[row, source]).float().mean()),
            "own": own,
            "other": other,
        }
