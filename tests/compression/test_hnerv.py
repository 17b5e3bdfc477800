"""HNeRV: a file that is a network, decoded from itself alone."""

import io
import math
from dataclasses import replace

import pytest
import torch

from isthmus.claims import Ruler, Status
from isthmus.codecs.base import pack, unpack
from isthmus.codecs.container import Frame, Header, leb
from isthmus.codecs.weights import pack as pack_weights
from isthmus.codecs.weights import quantise
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.metrics.images import psnr
from isthmus.models.fields import size, strides_for
from isthmus.roles import Signal
from isthmus.systems.compression import hnerv
from isthmus.systems.compression.hnerv import Hnerv, Settings
from isthmus.testing import check_codec
from isthmus.training.field import Learner, between, field, fitted, padded, padded_size, rendered
from isthmus.workbench.codec_bench import _ours
from isthmus.workbench.coding import ready
from isthmus.workbench.drifting import drifting

SMALL = Settings(
    rate_bpp=130.0, embedding=4, encoder=8, hidden=16, epochs=6, learning_rate=1e-2, segment=4
)
TOTAL = 32_000
CLIP = drifting(8, 19, 26, digits=1)


def signal(clip=CLIP, count=True):
    shape = [len(clip) if count else None, *clip.shape[1:]]
    info = {"medium": "video", "dtype": "uint8", "shape": shape, "rate": "25/1"}
    return Signal(info, [clip[:1], clip[1:]])


def written(codec, clip=CLIP, **how):
    out = io.BytesIO()
    sizes = pack(codec, signal(clip), out, **how)
    return out.getvalue(), sizes


@pytest.mark.parametrize("content", [True, False])
def test_contract(content):
    codec = Hnerv(replace(SMALL, content=content, epochs=1))
    makes = [signal, lambda: signal(count=False)]
    if content:  # a decoder is built from the file, whatever its own settings say
        check_codec(codec, makes[:1], mutations=60)
    data, sizes = written(codec)
    assert sizes.frames == 2 and sizes.samples == 8
    back = torch.cat(list(unpack(data).signal.chunks))
    again = torch.cat(list(unpack(data, codec=Hnerv()).signal.chunks))
    assert back.shape == CLIP.shape and torch.equal(back, again)


def test_what_comes_back_is_what_was_fitted_and_rounded():
    settings = replace(SMALL, bits=12, embedding_bits=12, segment=9)
    made, _ = fitted(padded(CLIP), settings, TOTAL)
    data = hnerv.frame(made, settings)
    header = Header(
        "compression/hnerv", bytes(32), signal().info, Hnerv(settings).parameters(signal().info)
    )
    back = torch.cat(list(Hnerv(settings).decode(header, [data])))
    want = (255 * rendered(made, torch.arange(8))[:, :, :19, :26]).round()
    assert (back.float() - want).abs().max() <= 2


def test_fitting_helps_and_a_larger_rate_makes_a_larger_file():
    clip = padded(CLIP)
    before, _ = fitted(clip, replace(SMALL, epochs=1), TOTAL)
    after, curve = fitted(clip, replace(SMALL, epochs=25), TOTAL)
    every = torch.arange(len(clip))
    better = psnr(rendered(after, every), clip, 1.0) - psnr(rendered(before, every), clip, 1.0)
    assert better.mean() > 3
    assert curve[-1][0] == 100 and abs(size(after.field) + 4 * 8 * 12 - TOTAL) < 0.06 * TOTAL
    small, large = (len(written(Hnerv(SMALL), rate=r)[0]) for r in (100.0, 250.0))
    assert 1.5 < large / small < 4


def test_pictures_between_come_from_neighbours():
    made, _ = fitted(padded(CLIP), SMALL, TOTAL)
    with torch.no_grad():
        middle = made.field((made.inputs(torch.tensor([0])) + made.inputs(torch.tensor([2]))) / 2)
    assert torch.equal(between(made, torch.tensor([1])), middle)
    learner = Learner(made, SMALL)
    seen = torch.cat([learner.batch(i) for i in range(4)])
    assert sorted(seen.tolist()) == list(range(8)), "each picture once an epoch"


def test_any_size_is_padded_to_what_its_own_strides_divide():
    for height in range(2, 70):
        for width in (2, 5, 36, 67):
            high, wide = padded_size(height, width)
            scale = math.prod(strides_for(high, wide))
            assert high >= height and wide >= width and not high % scale and not wide % scale
    odd = drifting(2, 31, 36, digits=1)
    data, _ = written(Hnerv(replace(SMALL, rate_bpp=400.0, epochs=1)), odd)
    assert torch.cat(list(unpack(data).signal.chunks)).shape == odd.shape


def test_bad_input_is_refused():
    info = signal().info
    with pytest.raises(InvalidInputError, match="colour of 8 bits"):
        Hnerv().parameters({**info, "shape": [6, 1, 19, 26]})
    with pytest.raises(InvalidInputError, match=r"0\.001 bits"):
        Hnerv().parameters(info, 0.0)
    with pytest.raises(InvalidInputError, match="raise rate_bpp, or lower embedding"):
        written(Hnerv(SMALL), rate=0.1)
    with pytest.raises(InvalidInputError, match="lower the rate, or segment"):
        written(Hnerv(SMALL), rate=1e6)
    for bad in ({"bits": 13}, {"segment": 0}, {"epochs": 0}, {"rate_bpp": 0.0}):
        with pytest.raises(InvalidInputError):
            Settings(**bad)


def test_a_file_cannot_ask_for_much_memory():
    codec = Hnerv(SMALL)
    header = Header(codec.id, bytes(32), signal().info, codec.parameters(signal().info))
    tiny = pack_weights({"a": quantise(torch.rand(4), 8)})
    for count, width in ((6, 1000), (70_000, 4), (6, 0), (0, 4)):
        frame = Frame.of([0], leb(count) + leb(width) + tiny, samples=6, reset=True)
        big = replace(header, signal={**header.signal, "shape": [None, 3, 2000, 2000]})
        with pytest.raises(BrokenFileError, match="names a network"):
            list(codec.decode(big, [frame]))
    names = {**header.parameters, "embedding": 5000}
    with pytest.raises(BrokenFileError, match="never has"):
        list(codec.decode(replace(header, parameters=names), []))
    with torch.device("meta"):
        assert size(field(SMALL, 12, 32, 32)) > 0


def test_whoever_waits_is_told_of_every_step():
    steps = []
    codec = ready("hnerv", report=steps.append)
    codec.settings = replace(SMALL, epochs=1)
    written(codec)
    assert [now.step for now in steps] == 2 * [*range(1, steps[0].steps + 1)]


def test_a_bench_of_films_does_not_wait_for_it():
    names = [peer.name for peer in _ours("video", None)]
    assert names and not any("hnerv" in name for name in names)


def test_the_claim_runs():
    claim = hnerv.claim(Ruler(), "test")
    assert claim.status in Status and len(claim.rows) == 6
    assert claim.gates[1].value <= 1.2
