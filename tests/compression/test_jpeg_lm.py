"""JPEG syntax against Pillow, the codec of files through its doors, and completion."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import isthmus
from isthmus.cli.main import main
from isthmus.codecs.base import pack
from isthmus.codecs.rangecoder import TOTAL
from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError
from isthmus.models.picture_tokens import JpegTokens, VqTokens
from isthmus.roles import Signal
from isthmus.signals import jpeg
from isthmus.systems.compression.jpeg_lm import JpegLm
from isthmus.testing import check_codec
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.system import train
from isthmus.workbench.completion_trials import marked_share
from isthmus.workbench.scenes import sheets

RNG = np.random.default_rng(0)
KINDS: list[dict[str, Any]] = [
    {},
    {"restart_marker_blocks": 1},
    {"restart_marker_blocks": 3, "subsampling": 0},
    {"optimize": True, "subsampling": 1},
]


def written(height: int, width: int, planes: int, **how: Any) -> bytes:
    shape = (height, width, 3) if planes == 3 else (height, width)
    out = io.BytesIO()
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", **({"quality": 25} | how))
    return out.getvalue()


def shown(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("size", [(32, 32, 3), (17, 41, 3), (40, 30, 1)])
def test_files_of_pillow_are_read_whole(size: tuple[int, int, int], how: dict[str, Any]) -> None:
    data = written(*size, **how)
    found = jpeg.parse(data)
    scan = jpeg.read(found, found.scan)
    assert found.data == data and (found.height, found.width) == size[:2]
    assert scan.whole and scan.units == found.units and scan.ends[-1] == len(found.scan)
    assert jpeg.mend(found, found.scan) == data
    # what any damage leaves is a file again
    for _ in range(30):
        hurt = bytearray(found.scan)
        hurt[RNG.integers(len(hurt))] = RNG.integers(256)
        mended = jpeg.mend(found, bytes(hurt))
        assert jpeg.read(found, jpeg.parse(mended).scan).whole
        assert shown(mended).shape[:2] == size[:2]


@pytest.mark.parametrize("marks", [0, 2])
def test_a_cut_scan_shows_what_came_before(marks: int) -> None:
    data = written(48, 48, 1, restart_marker_blocks=marks)
    found = jpeg.parse(data)
    cut = jpeg.parse(data[:-200], partial=True)
    scan = jpeg.read(found, cut.scan)
    assert not scan.whole and "ends within a block" in scan.why and scan.at == len(cut.scan)
    rows = scan.units // 6 * 8
    assert 8 <= rows < 48
    assert np.array_equal(shown(jpeg.mend(found, cut.scan))[:rows], shown(data)[:rows])


def test_a_flat_picture_by_hand() -> None:
    """T.81, tables K.3 and K.5: a block without a change is 00 and the end of a block 1010."""
    out = io.BytesIO()
    Image.new("L", (16, 8), 128).save(out, "JPEG")
    found = jpeg.parse(out.getvalue())
    assert found.units == 2 and found.scan == bytes([0b00101000, 0b10101111])
    longer = jpeg.read(found, found.scan + b"\x00")
    assert (longer.units, longer.at, longer.why) == (2, 1, "bytes behind the last block")
    wrong = jpeg.read(found, b"\x29\xff\x00\xff")
    assert wrong.units == 1 and not wrong.whole


def test_what_is_no_file_is_refused() -> None:
    data = written(16, 16, 3)
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "JPEG", progressive=True)
    with pytest.raises(InvalidInputError, match="progressive"):
        jpeg.parse(out.getvalue())
    with pytest.raises(BrokenFileError, match="does not begin"):
        jpeg.parse(b"GIF89a")
    with pytest.raises(BrokenFileError, match="unknown marker FF 01 at 2"):
        jpeg.parse(data[:2] + b"\xff\x01\x00\x02" + data[2:])
    with pytest.raises(BrokenFileError, match="cut off, at byte"):
        jpeg.parse(data[:-2])
    with pytest.raises(BrokenFileError, match="where FF D9 should end it"):
        jpeg.parse(data + b"more")
    for end in range(0, len(data) - 1, 7):
        with pytest.raises(IsthmusError):
            jpeg.parse(data[:end])
    for place in range(2, 600, 5):  # any byte of the header
        hurt = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
        try:
            found = jpeg.parse(hurt)
            jpeg.read(found, found.scan[:50])
        except IsthmusError:
            pass


FEW = Data(sheets(40, rare=0.5), sheets(6, "held-out"), "few")


@pytest.fixture(scope="module")
def system() -> JpegLm:
    told = JpegLm.scales["test"]
    made = train(JpegLm, FEW, told.settings, told.plan)
    assert isinstance(made, JpegLm)
    return made


def test_it_keeps_the_contract(system: JpegLm) -> None:
    tokens = system.tokens
    assert isinstance(tokens, JpegTokens)

    def signal() -> Signal:
        data = bytearray(tokens.file(FEW.valid[0].picture()))
        value = torch.frombuffer(data, dtype=torch.uint8)
        return Signal({"medium": "bytes", "dtype": "uint8", "shape": [len(data)]}, [value])

    check_codec(system, [signal], mutations=12)
    # the payload is what the model says
    ids = torch.tensor([[0, *tokens.ids(FEW.valid[0].picture())]])
    with torch.no_grad():
        logits = system.module(input_ids=ids[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum")
    sizes = pack(system, signal(), io.BytesIO())
    assert sizes.payload * 8 <= 1.01 * float(nats) / np.log(2) + 64 and TOTAL == 1 << 16


def test_through_the_doors(
    system: JpegLm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, given, small, back = (tmp_path / n for n in ("lm", "a.jpg", "a.ist", "b.jpg"))
    system.save_pretrained(folder)
    assert isinstance(system.tokens, JpegTokens)
    given.write_bytes(system.tokens.file(FEW.valid[1].picture()))
    words = ["encode", str(given), "-o", str(small), "--codec", "jpeg-lm", "--model", str(folder)]
    assert main(words) == 0
    assert main(["decode", str(small), "-o", str(back), "--model", str(folder)]) == 0
    assert back.read_bytes() == given.read_bytes() and small.stat().st_size < given.stat().st_size
    capsys.readouterr()
    assert main(["decode", str(small), "-o", str(tmp_path / "b.png"), "--model", str(folder)]) == 2
    assert "name it .jpg" in capsys.readouterr().err
    Image.new("RGB", (64, 64)).save(given)
    assert main(words) == 2
    assert "(64 x 64) has another header" in " ".join(capsys.readouterr().err.split())
    out = tmp_path / "out.png"
    assert main(["run", str(folder), str(back), "-o", str(out)]) == 0
    assert "tokens were given" in " ".join(capsys.readouterr().out.split())
    upper = shown(out.read_bytes())[:12], shown(back.read_bytes())[:12]
    assert np.array_equal(*upper)  # colours are blurred into the rows below
    assert isthmus.load(str(folder)).generate([0, 9], max_new_tokens=4, ignore_end=True).tokens


def test_the_upper_half_and_a_model_without_the_idea(tmp_path: Path) -> None:
    told = JpegLm.scales["test"]
    settings = type(told.settings)(**{**vars(told.settings), "tokens": "vq"})
    made = train(JpegLm, FEW, settings, told.plan, out=tmp_path / "vq")
    made = JpegLm.from_pretrained(tmp_path / "vq")
    assert isinstance(made, JpegLm) and isinstance(made.tokens, VqTokens)
    picture = FEW.valid[0].picture()
    ids = made.tokens.ids(picture)
    assert len(ids) == 64 and made.tokens.first(picture) == ids[:32] and min(ids) > 0
    assert made.tokens.picture(ids)[1] == "" and "has 3 codes" in made.tokens.picture(ids[:3])[1]
    with pytest.raises(InvalidInputError, match="do not give a file back"):
        made.open(tmp_path / "vq" / "config.json")
    with pytest.raises(InvalidInputError, match="'jpeg' or 'vq'"):
        JpegLm.untrained(type(settings)(tokens="png"), FEW)


def test_marks_are_found_in_files_too(system: JpegLm) -> None:
    pictures = [s.picture() for s in sheets(20, rare=1.0)]
    tokens = system.tokens
    again = torch.stack([tokens.picture(tokens.ids(p))[0] for p in pictures])
    assert marked_share(again) == 1.0
    bare = torch.stack([s.picture() for s in sheets(20)])
    assert marked_share(bare) == 0.0


def test_batches_hold_pictures_of_like_lengths_and_each_is_a_function_of_its_number(
    system: JpegLm,
) -> None:
    data = Data(sheets(600), FEW.valid, "more")
    one, two = (system.learner(data, Plan(1)) for _ in range(2))
    batches = [one.batch(part) for part in range(32)]
    waste = [float((batch < 0).float().mean()) for batch in batches]
    assert float(np.mean(waste)) < 0.15  # 0.4 where pictures are drawn at random
    assert all(torch.equal(two.batch(part), batches[part]) for part in (17, 3, 31))
    assert len({int((batch >= 0).sum()) for batch in batches}) > 20
