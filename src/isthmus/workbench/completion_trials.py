"""How well pictures of scenes are completed from their upper halves, by a classifier's features."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.codecs.base import pack, unpack
from isthmus.metrics.images import frechet_distance
from isthmus.models.picture_classifier import PictureClassifier
from isthmus.models.picture_tokens import JpegTokens
from isthmus.roles import Codec, Signal
from isthmus.workbench import scenes


def scene_judge(
    records: Sequence[scenes.Sheet], files: JpegTokens, steps: int
) -> PictureClassifier:
    """A classifier of what lies in each quarter; its probabilities are the features.

    It learns from pictures as they are and from their files, as classifiers of photographs learn
    from JPEG files, so what JPEG does to a picture does not surprise it.

    Args:
        records: What it learns from.
        files: Makes the files.
        steps: Steps, of 32 pictures each.
    """
    names = [f"{name} {q}" for q in range(4) for name in (*scenes.COLOURS, *scenes.SHAPES)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        eye = PictureClassifier(names, width=64, layers=2, heads=4, patch=4, side=32)
    truth = torch.zeros(len(records), len(names))
    for row, record in zip(truth, records, strict=True):
        for thing in record.scene:
            row[names.index(f"{thing.colour} {thing.place}")] = 1
            row[names.index(f"{thing.shape} {thing.place}")] = 1
    plain = [r.picture() for r in records]
    pixels = torch.stack([*plain, *(files.shown(files.file(p)) for p in plain)])
    optimizer, rng = torch.optim.AdamW(eye.parameters(), lr=2e-3), np.random.default_rng(0)
    for _ in range(steps):
        at = rng.integers(len(pixels), size=32)
        logits = eye(pixels[at].float() / 127.5 - 1).logits
        loss = F.binary_cross_entropy_with_logits(logits, truth[at % len(records)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return eye.eval()


def marked_share(pictures: Tensor) -> float:
    """Share of pictures whose lower right corner shows the mark, by its contrast.

    Args:
        pictures: uint8 [N, 3, 32, 32].

    Example:
        >>> scene = scenes.sheets(1)[0].scene
        >>> pictures = [scenes.Sheet(scene, marked).picture() for marked in (True, False)]
        >>> marked_share(torch.stack(pictures))
        0.5
    """
    corner = pictures[:, :, scenes.MARK, scenes.MARK].float().mean(1)  # [N, 5, 5]
    cross = torch.zeros(5, 5, dtype=torch.bool)
    cross[2] = cross[:, 2] = True
    found = corner[:, ~cross].mean(1) - corner[:, cross].mean(1) > 128
    return float(found.double().mean())


def completion(
    system: Any, truth: Tensor, marked: Tensor, eye: PictureClassifier
) -> dict[str, float]:
    """Complete pictures from their upper halves.

    Args:
        system: With ``tokens`` (see :mod:`isthmus.models.picture_tokens`) and ``complete``.
        truth: Pictures, uint8 [N, 3, 32, 32].
        marked: Pictures with the rare mark in both corners, likewise.
        eye: From :func:`scene_judge`.

    Returns:
        By name: share of completions that are ``whole``; Frechet ``distance`` of them to the
        truth, and of reconstructions (``floor``); share of marked pictures that are completed with
        the mark (``recall``), whose reconstructions show it (``seen``), and of others that are
        completed with it (``false``).
    """
    tokens = system.tokens

    def completed(pictures: Tensor, seed: int) -> tuple[Tensor, float]:
        made = system.complete([tokens.first(p) for p in pictures], seed=seed)
        shown = [tokens.picture(ids) for ids in made]
        whole = sum(not wrong for _, wrong in shown) / len(shown)
        return torch.stack([p for p, _ in shown]), whole

    def features(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            some = torch.split(pictures.float() / 127.5 - 1, 256)
            return torch.cat([eye(part).logits.sigmoid() for part in some])

    def back(pictures: Tensor) -> Tensor:
        return torch.stack([tokens.picture(tokens.ids(p))[0] for p in pictures])

    real = features(truth)
    made, whole = completed(truth, 1)
    rare, _ = completed(marked, 2)
    return {
        "whole": whole,
        "distance": frechet_distance(features(made), real),
        "floor": frechet_distance(features(back(truth)), real),
        "recall": marked_share(rare),
        "seen": marked_share(back(marked)),
        "false": marked_share(made),
    }


def coded_files(codec: Codec, files: Sequence[bytes]) -> tuple[int, int, int]:
    """Code files and read them again.

    Args:
        codec: Of bytes.
        files: The files.

    Returns:
        How many come back exactly; bytes of all payloads, and of all coded files.
    """
    exact = payload = whole = 0
    for data in files:
        value = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        info, out = {"medium": "bytes", "dtype": "uint8", "shape": [len(data)]}, io.BytesIO()
        sizes = pack(codec, Signal(info, [value]), out, compact=True)
        back = torch.cat(list(unpack(out.getvalue(), codec=codec).signal.chunks))
        exact += torch.equal(back, value)
        payload, whole = payload + sizes.payload, whole + sizes.file
    return exact, payload, whole
