"""How well speech was recognised or cleaned: error rates, distortion, perceived quality."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.errors import InvalidInputError, require


def normalise(text: str) -> str:
    """Text as both sides are compared: composed, lower case, no punctuation, single spaces.

    Example:
        >>> normalise("  Don't PANIC,   please! ")
        "don't panic please"
    """
    text = unicodedata.normalize("NFC", text).lower()
    return " ".join(re.sub(r"[^\w\s']|_", " ", text).split())


@dataclass(frozen=True)
class ErrorRate:
    """Edits over references, pooled over all texts.

    Attributes:
        rate: Edits divided by the length of the references.
        edits: Substitutions, deletions and insertions.
        length: Words or characters of the references.
        empty: References without a word; what was heard there counts as insertions.
    """

    rate: float
    edits: int
    length: int
    empty: int


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Words wrong, by jiwer, after :func:`normalise` on both sides.

    Raises:
        InvalidInputError: The lists differ in length, or no reference has a word.
        MissingExtraError: ``jiwer`` is not installed.

    Example:
        >>> word_error_rate(["A cat sat.", ""], ["a hat", "oh"])
        ErrorRate(rate=1.0, edits=3, length=3, empty=1)
    """
    return _error_rate(references, hypotheses, "process_words", str.split)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Characters wrong, spaces included; see :func:`word_error_rate`.

    Example:
        >>> character_error_rate(["cat"], ["cart"]).edits
        1
    """
    return _error_rate(references, hypotheses, "process_characters", list)


def _error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    function: str,
    units: Callable[[str], Sequence[str]],
) -> ErrorRate:
    jiwer: Any = require("jiwer", "speech")
    if len(references) != len(hypotheses):
        raise InvalidInputError(
            f"each reference needs one hypothesis, got {len(references)} and {len(hypotheses)}"
        )
    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    full = [(r, h) for r, h in pairs if r]
    if not full:
        raise InvalidInputError("no reference has a word; an error rate needs some")
    found = getattr(jiwer, function)([r for r, _ in full], [h for _, h in full])
    edits = found.substitutions + found.deletions + found.insertions
    edits += sum(len(units(h)) for r, h in pairs if not r)  # jiwer gives up on these
    length = sum(len(units(r)) for r, _ in full)
    return ErrorRate(edits / length, edits, length, len(pairs) - len(full))


def si_sdr(estimate: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Scale-invariant ratio of signal to distortion in decibels, both sides of mean zero.

    ``10 log10(||a s||^2 / ||a s - s'||^2)`` with ``a = <s', s> / ||s||^2``.

    Args:
        estimate: [..., N].
        truth: [..., N], not silent.

    Returns:
        [...].

    Raises:
        InvalidInputError: The shapes differ, or a truth is silent.

    Example:
        >>> s = torch.tensor([1.0, -1.0, 1.0, -1.0])
        >>> si_sdr(3 * s + 0.3 * torch.tensor([1.0, 1.0, -1.0, -1.0]), s)
        tensor(20.0000)
    """
    if estimate.shape != truth.shape:
        raise InvalidInputError(
            f"both sounds have one shape, got {list(estimate.shape)} and {list(truth.shape)}"
        )
    estimate = estimate - estimate.mean(-1, keepdim=True)
    truth = truth - truth.mean(-1, keepdim=True)
    power = truth.square().sum(-1, keepdim=True)
    if not (power > 0).all():
        raise InvalidInputError("a silent truth has no ratio of signal to distortion; leave it out")
    part = (estimate * truth).sum(-1, keepdim=True) / power * truth
    rest = (part - estimate).square().sum(-1)
    return 10 * torch.log10(part.square().sum(-1) / rest.clamp(min=1e-30))


@dataclass(frozen=True)
class Quality:
    """Mean over the sounds that could be judged.

    Attributes:
        mean: The mean; not a number where none could.
        judged: How many could.
        failed: How many could not: silent, too short, not finite.
    """

    mean: float
    judged: int
    failed: int


def pesq(estimates: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> Quality:
    """Perceived quality (ITU-T P.862.2, wide band) at 16 kHz, 1 to 4.64.

    Args:
        estimates: Sounds [N].
        truths: The clean ones.

    Raises:
        MissingExtraError: ``pesq`` is not installed: it is built from source, so no other extra
            brings it.
    """
    package: Any = require("pesq", "pesq")

    def score(estimate: Any, truth: Any) -> float:
        return float(package.pesq(16000, truth, estimate, "wb"))

    return _quality(score, estimates, truths)


def stoi(estimates: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> Quality:
    """Short-time objective intelligibility at 16 kHz, 0 to 1; see :func:`pesq`."""
    package: Any = require("pystoi", "speech")

    def score(estimate: Any, truth: Any) -> float:
        return float(package.stoi(truth, estimate, 16000))

    return _quality(score, estimates, truths)


def _quality(
    score: Callable[[Any, Any], float],
    estimates: Sequence[torch.Tensor],
    truths: Sequence[torch.Tensor],
) -> Quality:
    scores, failed = [], 0
    for estimate, truth in zip(estimates, truths, strict=True):
        if not torch.isfinite(estimate).all() or not estimate.any() or not truth.any():
            failed += 1
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # pystoi's "not enough frames"
                scores.append(score(estimate.numpy(), truth.numpy()))
        except Exception:  # the packages raise classes of their own, and ValueError
            failed += 1
    mean = sum(scores) / len(scores) if scores else float("nan")
    return Quality(mean, len(scores), failed)
