"""Sequence-level distillation: a student learns from what its teacher writes.

Kim and Rush 2016 (1606.07947): the targets of the training pairs are replaced by the teacher's
beam search. One mode of the teacher's law is easier to learn than everything people write.
"""

from __future__ import annotations

from dataclasses import replace

from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError
from isthmus.training.data import Data, Pair


def sequence_distillation(
    teacher: Model,
    data: Data[Pair],
    *,
    beams: int = 5,
    max_new_tokens: int = 256,
    batch_size: int = 64,
) -> Data[Pair]:
    """The same sources with the teacher's translations; held-out pairs stay as they are.

    Args:
        teacher: A trained encoder-decoder with its tokenizer.
        data: Pairs. Sources that occur several times are translated once; one whose translation
            does not end in ``max_new_tokens`` keeps its own target.
        beams: Hypotheses of the search; 1 is greedy.
        max_new_tokens: Longest translation.
        batch_size: Sources at once.

    Raises:
        InvalidInputError: The teacher is no encoder-decoder, or nothing is searched for.
    """
    if not teacher.target.encoder_decoder:
        raise InvalidInputError("the teacher must be an encoder-decoder, such as marian writes")
    if beams < 1 or batch_size < 1:
        raise InvalidInputError(f"beams and batch_size are at least 1, got {beams}, {batch_size}")
    sources = sorted({p.source for p in data.train}, key=lambda s: (len(s), s))
    written: dict[str, str] = {}
    for start in range(0, len(sources), batch_size):
        some = sources[start : start + batch_size]  # of like lengths
        found = (
            teacher.generate(some, strategy="beam", beams=beams, max_new_tokens=max_new_tokens)
            if beams > 1
            else teacher.generate(some, drafter="none", max_new_tokens=max_new_tokens)
        )
        ended = (each.finish_reason == "stop" for each in found)
        written |= {s: f.text for s, f, e in zip(some, found, ended, strict=True) if e}
    train = [Pair(p.source, written.get(p.source, p.target)) for p in data.train]
    return replace(data, train=train, name=f"{data.name}, distilled")
