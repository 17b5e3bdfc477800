"""Streams through caches: what comes out is what the whole gives, and nothing grows."""

import pytest
import torch

from isthmus.errors import InvalidInputError
from isthmus.nn.cached_conformer import CachedConformer
from isthmus.nn.conformer import Conformer, limited_mask, valid_mask
from isthmus.signals.features import LogMel
from isthmus.testing import check_streaming


def encoder(factor: int = 4, depth: int = 3) -> Conformer:
    torch.manual_seed(0)
    made = Conformer(8, 16, depth, 2, kernel=5, factor=factor, channels=4, causal=True)
    return made.eval()


def sound(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))


MEL = LogMel("nemo", 8, normalise="fixed")


@pytest.mark.parametrize("right", [0, 1, 3, 7])
@pytest.mark.parametrize("factor", [4, 8])
@torch.no_grad()
def test_a_stream_gives_what_the_whole_gives(right: int, factor: int) -> None:
    net, wave = encoder(factor), sound(2, 30_000)
    offline, _ = net(*MEL(wave, torch.tensor([30_000] * 2)), limits=(8, right))
    check_streaming(CachedConformer(net, MEL, 8, right), wave, offline.transpose(1, 2))


@pytest.mark.parametrize("length", [1, 159, 160, 200, 640, 641, 5119, 5121])
@torch.no_grad()
def test_short_sounds(length: int) -> None:
    net, wave = encoder(), sound(1, length)
    offline, _ = net(*MEL(wave, torch.tensor([length])), limits=(8, 3))
    check_streaming(CachedConformer(net, MEL, 8, 3), wave, offline.transpose(1, 2))


@pytest.mark.parametrize("right", [0, 3])
@torch.no_grad()
def test_rows_may_end_before_others(right: int) -> None:
    net, lengths = encoder(), torch.tensor([20_000, 7777, 160, 12_345])
    wave = sound(4, 20_000)
    offline, valid = net(*MEL(wave, lengths), limits=(8, right))
    offline = offline * valid_mask(valid, offline.shape[1])[..., None]
    stream = CachedConformer(net, MEL, 8, right)
    for packet in (700, 1600, 20_000):
        state, out = stream.init_state(4), []
        for start in range(0, 20_000, packet):
            part = wave[:, start : start + packet]
            given = (lengths - start).clamp(0, part.shape[1])
            states, state = stream.step(part, state, given)
            out.append(states)
        last, state = stream.finish(state)
        found = torch.cat([*out, last], 2).transpose(1, 2)
        assert stream.lengths(state).tolist() == valid.tolist()
        assert float((found - offline).abs().max()) < 1e-5
    with pytest.raises(InvalidInputError, match="begin a new stream"):
        stream.step(wave[:, :160], state)


@torch.no_grad()
def test_what_is_kept_does_not_grow() -> None:
    stream, kept = CachedConformer(encoder(), MEL, 8, 3), []
    state = stream.init_state(1)
    for _ in range(40):
        _, state = stream.step(sound(1, 2560), state)
        kept.append(state.kept)
    assert kept[-1] == kept[5] < 3000


@torch.no_grad()
def test_blocks_add_up_look_ahead_only_where_limits_are_regular() -> None:
    net = encoder(4, 3)
    features = torch.randn(1, 8, 80)
    other = features.clone()
    other[:, :, 45:] += 1.0  # frame 12 and later see it
    for regular, first in ((False, 12), (True, 9)):  # 3 blocks of 1 frame each
        a, b = (net(f, torch.tensor([80]), limits=(8, 1), regular=regular)[0]
                for f in (features, other))  # fmt: skip
        changed = (a - b).abs().amax((0, 2)) > 1e-7
        assert int(changed.int().argmax()) == first


def test_limits_have_to_fit() -> None:
    with pytest.raises(InvalidInputError, match="multiple of the chunk, got 9"):
        CachedConformer(encoder(), MEL, 9, 3)
    with pytest.raises(InvalidInputError, match="multiple"):
        limited_mask(torch.arange(2), torch.arange(2), 2, -1)
    with pytest.raises(InvalidInputError, match="causal"):
        CachedConformer(Conformer(8, 16, 1, 2, channels=4), MEL, 8, 3)
    with pytest.raises(InvalidInputError, match="normalised over the whole"):
        CachedConformer(encoder(), LogMel("nemo", 8), 8, 3)
    block = Conformer(8, 16, 1, 2, kernel=5, channels=4)
    assert block.layers[0].conv.before == 0  # type: ignore[union-attr]
