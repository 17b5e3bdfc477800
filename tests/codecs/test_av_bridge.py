"""Classical video codecs: exact planes, exact bytes, and one line where something does not go."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from isthmus.codecs.av_bridge import CODERS, Coded, Coder, decode, encode, missing
from isthmus.errors import BrokenFileError, InvalidInputError, UnknownNameError


def noise(*shape: int, bits: int = 8) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits))


def moving(frames: int = 6, height: int = 40, width: int = 60) -> torch.Tensor:
    """A ramp that moves, so that every codec has something to predict."""
    t, y, x = (torch.arange(n) for n in (frames, height, width))
    return (3 * t[:, None, None] + y[:, None] + 2 * x) % 200


@pytest.mark.parametrize(
    ("coder", "layout", "bits"),
    [
        ("h265", "gray", 12),
        ("h265", "rgb", 8),
        ("h265", "420", 10),
        ("h264", "gray", 8),  # which H.264 decodes as colour
        ("h264", "444", 10),
    ],
)
def test_planes_of_any_size_come_back_exactly(coder: str, layout: str, bits: int) -> None:
    for height, width, intra in ((7, 9, True), (17, 33, False)):
        half = (3, -(-height // 2), -(-width // 2))
        sizes = {"gray": [], "420": [half] * 2}.get(layout, [(3, height, width)] * 2)
        planes = [noise(*s, bits=bits) for s in [(3, height, width), *sizes]]
        told = {"layout": layout, "bits": bits, "intra": intra}
        coded = encode(planes, coder, **told)  # type: ignore[arg-type]
        back = decode(coded.pack(), coder, (3, height, width), **told)  # type: ignore[arg-type]
        assert all(torch.equal(a, b.long()) for a, b in zip(planes, back, strict=True))
        assert encode(planes, coder, **told) == coded  # type: ignore[arg-type]


@pytest.mark.parametrize("coder", list(CODERS))
def test_coarser_is_smaller_and_worse(coder: str) -> None:
    picture = moving()
    found = []
    for crf in (50, 20):
        coded = encode([picture], coder, crf=crf)
        back = decode(coded.pack(), coder, (6, 40, 60))[0]
        found.append((coded.size, float((back - picture.float()).abs().mean())))
    assert found[0][0] < found[1][0] and found[0][1] > found[1][1]
    # a settings message alone would be larger
    assert found[0][0] < 600


def test_bytes_are_those_of_the_packets() -> None:
    coded = encode([moving()], "h265", qp=30, intra=True)
    assert len(coded.packets) == 6
    assert coded.size == sum(map(len, coded.packets)) + len(coded.private)
    assert len(coded.pack()) == coded.size + 1 + 6  # a length each, all below 128
    assert Coded.unpack(coded.pack()) == coded
    assert b"x265" not in coded.pack()
    assert b"x264" not in encode([moving()], "h264", crf=30).pack()


def test_finer_than_eight_bits_allow() -> None:
    deep = moving() * 16 + 3
    back = [
        decode(
            encode([deep], bits=12, qp=qp, intra=True).pack(),
            "h265",
            (6, 40, 60),
            bits=12,
            intra=True,
        )[0]
        for qp in (0, 30)
    ]
    errors = [float((b - deep).double().square().mean()) for b in back]
    assert errors[0] < min(3.0, errors[1] / 20)  # below 1/12 of a step of 8 bits, 16^2 / 12


def test_it_says_what_does_not_go(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = moving()
    for planes, told, match in (
        ([picture], {"coder": "vvc"}, "vvc"),
        ([picture], {"coder": "av1"}, "give a crf"),
        ([picture], {"coder": "av1", "layout": "444"}, "not 444 of 8 bits"),
        ([picture], {"qp": 1, "crf": 2}, "not both"),
        ([picture], {"qp": -1}, "0 to 51"),
        ([picture], {"preset": "best"}, "best"),
        ([picture + 100], {}, "from 0 to 255"),
        ([picture.float()], {}, "whole numbers"),
        ([picture, picture], {}, "in planes of"),
        ([picture[0]], {}, r"\[T, H, W\]"),
        ([], {}, "give planes"),
    ):
        with pytest.raises((InvalidInputError, UnknownNameError), match=match):
            encode(planes, **told)  # type: ignore[arg-type]
    lacking = Coder("H.266", "libvvenc", "vvc", CODERS["h265"].formats, 16, 16, 2, (30,))
    monkeypatch.setitem(CODERS, "vvc", lacking)
    assert missing("h264") == ""
    with pytest.raises(InvalidInputError, match="lacks libvvenc; install the wheel"):
        encode([picture], "vvc")


def test_damaged_streams_are_refused() -> None:
    data = encode([moving()], "h265", qp=30).pack()
    for bad, shape in (
        (data[:50], (6, 40, 60)),
        (b"", (6, 40, 60)),
        (bytes(len(data)), (6, 40, 60)),
        (data, (7, 40, 60)),
        (data, (5, 40, 60)),
        (data, (6, 400, 60)),
    ):
        with pytest.raises(BrokenFileError):
            decode(bad, "h265", shape)
    with pytest.raises(BrokenFileError, match="other bits"):
        decode(data, "h265", (6, 40, 60), bits=10)
    with pytest.raises(BrokenFileError, match="other planes"):
        decode(data, "h265", (6, 40, 60), layout="420")


def test_encoders_are_silent() -> None:
    words = (
        "import torch; from isthmus.codecs.av_bridge import *\n"
        "for c in CODERS: encode([torch.zeros(2, 16, 16).long()], c, crf=30)"
    )
    run = subprocess.run([sys.executable, "-c", words], capture_output=True, check=True, text=True)
    assert run.stdout == run.stderr == ""
