"""Eight voices of known names, each with its own pitch, and a small net that tells them apart.

Codecs that part a voice from what it says learn from recordings of one voice each, and are judged
by a net that has heard the true voices and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.mel_codec import ReferenceEncoder
from isthmus.signals.audio import Recording
from isthmus.signals.mel import MelSpectrum
from isthmus.training.data import Data, Spoken
from isthmus.workbench.speech import RATE, Split, Utterance, lines, say

VOICES = (
    ("en-us+m1", 40),
    ("en-us+m3", 55),
    ("en-us+m4", 45),
    ("en-us+m7", 60),
    ("en-us+f1", 45),
    ("en-us+f2", 60),
    ("en-us+f4", 50),
    ("en-us+klatt2", 50),
)
"""Names and pitches of espeak-ng."""


def said(split: Split, each: int, *, seed: int = 0) -> list[list[Utterance]]:
    """Sentences of every voice; no text of ``held-out`` is in ``train``.

    Args:
        split: See :mod:`isthmus.workbench.speech`.
        each: Sentences of a voice.
        seed: Other seeds draw others.

    Returns:
        For each voice its utterances, with texts of their own.
    """
    wanted = lines("sentences", split, each * len(VOICES), seed=seed + 1000)
    wanted = [
        replace(line, voice=VOICES[i // each][0], pitch=VOICES[i // each][1])
        for i, line in enumerate(wanted)
    ]
    heard = say(wanted)
    return [heard[i : i + each] for i in range(0, len(heard), each)]


def data(each: int = 100, held_out: int = 2, joined: int = 4) -> Data[Spoken]:
    """Recordings of one voice each, of several sentences with short pauses; held-out ones of one.

    Args:
        each: Sentences of a voice to learn from.
        held_out: Held-out sentences of a voice.
        joined: Sentences of a recording.
    """
    pause, learn = torch.zeros(RATE // 8), []
    for own in said("train", each):
        for start in range(0, len(own), joined):
            part = own[start : start + joined]
            sound = torch.cat([x for u in part for x in (u.samples, pause)])
            text = " ".join(u.line.target for u in part)
            learn.append(Spoken(Recording(samples=sound), text))
    kept = [u for own in said("held-out", held_out, seed=1) for u in own]
    return Data(learn, [Spoken(Recording(samples=u.samples), u.line.target) for u in kept])


class Judge(nn.Module):
    """Which of the voices a spectrum is of; frozen once it is trained.

    Args:
        spectrum: What spectra it reads.
        width: Channels.
        count: Voices.
    """

    def __init__(self, spectrum: MelSpectrum, width: int = 48, count: int = len(VOICES)) -> None:
        super().__init__()
        self.spectrum = spectrum
        self.net = ReferenceEncoder(spectrum.n_mels, width, width)
        self.head = nn.Linear(width, count)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-probabilities [B, V] of spectra [B, M, F]."""
        found: Tensor = self.head(self.net(mel)).log_softmax(-1)
        return found


def judge(
    spectrum: MelSpectrum,
    sounds: Sequence[Sequence[Tensor]],
    *,
    steps: int = 400,
    frames: int = 128,
    seed: int = 0,
) -> Judge:
    """Train a judge on windows of true sounds, at levels of their own.

    Args:
        spectrum: What spectra it reads.
        sounds: For every voice its sounds [N].
        steps: Batches of four windows of each voice.
        frames: Of a window.
        seed: Of weights and windows.

    Returns:
        The judge, frozen.
    """
    draw, window = torch.Generator().manual_seed(seed), frames * spectrum.hop
    joined = [torch.cat([*own, torch.zeros(window)]) for own in sounds]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Judge(spectrum, count=len(joined))
    adam = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    wanted = torch.arange(len(joined)).repeat_interleave(4)
    for _ in range(steps):
        starts = torch.rand(len(wanted), generator=draw).tolist()
        gains = 10 ** (torch.empty(len(wanted), 1).uniform_(-6, 0, generator=draw) / 20)
        cuts = []
        for voice, start in zip(wanted.tolist(), starts, strict=True):
            at = int(start * (len(joined[voice]) - window))
            cuts.append(joined[voice][at : at + window])
        loss = F.nll_loss(net(spectrum(torch.stack(cuts) * gains)), wanted)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return net.eval().requires_grad_(False)
