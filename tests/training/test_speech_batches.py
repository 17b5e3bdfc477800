"""Batches of spoken records, and the model that reads them."""

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.models.ctc import CTCModel
from isthmus.nn.conformer import Conformer
from isthmus.nn.spec_augment import SpecAugment
from isthmus.signals.audio import Recording
from isthmus.signals.features import LogMel
from isthmus.training.data import Spoken
from isthmus.training.speech import Characters, SpokenBatches


def records(count: int = 23) -> list[Spoken]:
    generator = torch.Generator().manual_seed(0)
    return [
        Spoken(Recording(samples=torch.randn(800 + 300 * n, generator=generator)), "ab"[n % 2] * 3)
        for n in range(count)
    ]


def test_batches_are_of_like_lengths_and_follow_from_their_number() -> None:
    letters = Characters.of(["ab"])
    plain = SpokenBatches(records(), letters, LogMel("nemo", 16), 4)
    masked = SpokenBatches(
        records(), letters, LogMel("nemo", 16), 4, augment=SpecAugment(2, 8, 2, 0.2)
    )
    seen: list[int] = []
    gone = 0
    for part in range(plain.sampler.parts):
        batch, again = plain.batch(part), plain.batch(part)
        assert torch.equal(batch.features, again.features)
        assert (batch.frames.max() - batch.frames.min()) < 25
        seen += batch.rows
        hidden = masked.batch(part)
        assert hidden.rows == batch.rows
        gone += int((hidden.features == 0).sum() - (batch.features == 0).sum())
    assert sorted(seen) == list(range(23)) and plain.profile.inputs < 0.25 and gone > 1000
    once = [row for batch in plain.once() for row in batch.rows]
    assert once == list(range(23))
    assert letters.decode(plain.of([1]).targets[0].tolist()) == "bbb"


def test_training_sounds_are_altered_and_masked_as_the_seed_and_the_number_say() -> None:
    letters, mel = Characters.of(["ab"]), LogMel("nemo", 16, normalise="fixed")

    def longer(sound: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        return torch.cat([torch.randn(1600, generator=draw), sound])

    plain = SpokenBatches(records(), letters, mel, 23, parts=1)
    altered = SpokenBatches(records(), letters, mel, 23, parts=1, alter=longer)
    batch, found = plain.batch(0), altered.batch(0)
    assert torch.equal(found.frames, batch.frames + 10) and found.rows == batch.rows
    assert torch.equal(altered.batch(0).features, found.features)
    assert torch.equal(altered.of([1]).features, plain.of([1]).features)  # not in validation
    # the batch that has all records has others' noise under another number or seed
    other = SpokenBatches(records(), letters, mel, 23, parts=1, alter=longer, seed=1)
    heads = {
        tuple(b.features[b.rows.index(5), :, 4].tolist())
        for b in (found, altered.batch(1), other.batch(0))
    }
    assert len(heads) == 3
    masks = []
    for seed in (0, 1):
        augment = SpecAugment(2, 8, 2, 0.2)
        made = SpokenBatches(records(), letters, mel, 23, parts=1, seed=seed, augment=augment)
        masks.append(made.batch(0).features[made.batch(0).rows.index(22)] == 0)
    assert masks[0].any() and not torch.equal(*masks)


def test_an_unknown_character_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="has 'c'"):
        Characters("ab").encode("abc")


def test_conditioning_tells_the_blocks_above_and_only_those() -> None:
    torch.manual_seed(0)
    encoder = Conformer(16, 24, 3, 4, kernel=5, factor=4, channels=4).eval()
    told = CTCModel(encoder, 5, inner=[1, 2]).eval()
    plain = CTCModel(encoder, 5, inner=[1, 2], condition=False).eval()
    plain.head.load_state_dict(told.head.state_dict())
    assert told.tell is not None and plain.tell is None
    x, frames = torch.randn(2, 16, 60), torch.tensor([60, 33])
    with torch.no_grad():
        ours, lengths = told(x, frames)
        off, _ = plain(x, frames)
        assert lengths.tolist() == [15, 9] and [p.shape for p in ours] == [(2, 15, 5)] * 3
        assert torch.equal(ours[0], off[0]) and not torch.equal(ours[1], off[1])
        told.tell.weight.zero_(), told.tell.bias.zero_()
        torch.testing.assert_close(told(x, frames)[0][2], off[2])  # plain CTC
        torch.testing.assert_close(off[2], plain.head(encoder(x, frames)[0]).log_softmax(-1))
    with pytest.raises(InvalidInputError, match="from 1 to 2"):
        CTCModel(encoder, 5, inner=[3])
