"""Films through classical codecs in our container: exact where promised, refused in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from make_corpus import CORPUS, FILMS

import isthmus
from isthmus.cli.main import main
from isthmus.codecs.av_bridge import missing
from isthmus.codecs.base import pack, unpack
from isthmus.codecs.container import Frame, Header
from isthmus.codecs.films import Av1, Ffv1, LosslessH264, _Payloads
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Signal
from isthmus.signals.video import open_film, open_video
from isthmus.testing import check_codec
from isthmus.testing.mutations import fuzz

pytestmark = pytest.mark.skipif(bool(missing("av1")), reason="this build of FFmpeg lacks AV1")


def pixels(count: int, high: int, wide: int) -> torch.Tensor:
    """A slope that moves, with noise, uint8 [T, 3, H, W]."""
    t, y, x = (torch.arange(n) for n in (count, high, wide))
    grey = 60 + 3 * t[:, None, None] + y[:, None] + x
    noise = torch.randint(0, 5, (count, 3, high, wide), generator=torch.Generator().manual_seed(0))
    return (torch.stack([grey, 250 - grey, grey // 2], 1) + noise).clamp(0, 255).to(torch.uint8)


def film(
    path: Path,
    form: str = "yuv420p",
    size: tuple[int, int] = (32, 48),
    *,
    coder: str = "ffv1",
    count: int = 6,
    steps: tuple[int, ...] = (20,),
    sound: bool = False,
) -> Path:
    """A file of moving pictures; times in 600ths of a second."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(coder, rate=30)
        stream.height, stream.width, stream.pix_fmt = *size, form
        stream.codec_context.time_base = Fraction(1, 600)
        tone: Any = file.add_stream("aac", rate=48_000, layout="mono") if sound else None
        time = 0
        for number, values in enumerate(pixels(count, *size).permute(0, 2, 3, 1).numpy()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), "rgb24")
            frame = frame.reformat(format=form)
            frame.pts, frame.time_base = time, Fraction(1, 600)
            time += steps[number % len(steps)]
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if tone is not None:
            wave = np.sin(np.arange(1024 * 9, dtype=np.float32) / 20)[None] * 0.3
            for at in range(0, wave.shape[1], 1024):
                piece = np.ascontiguousarray(wave[:, at : at + 1024])
                part = av.AudioFrame.from_ndarray(piece, "fltp", "mono")
                part.sample_rate, part.pts = 48_000, at
                file.mux(tone.encode(part))
            file.mux(tone.encode(None))
    return path


def whole(path: Path) -> torch.Tensor:
    return torch.cat(list(open_film(path).chunks))


def heard(path: Path) -> list[bytes]:
    """Coded sound, packet by packet."""
    with av.open(str(path)) as file:
        streams = file.streams.audio
        return [bytes(p) for p in file.demux(streams) if p.dts is not None] if streams else []


def times(path: Path) -> list[float]:
    with av.open(str(path)) as file:
        return [float(f.time or 0) for f in file.decode(video=0)]


@pytest.mark.parametrize("codec", ["ffv1", "lossless-h264"])
@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("yuv420p", (32, 48)),
        ("yuv420p", (35, 51)),
        ("yuv422p", (32, 49)),
        ("yuv444p", (33, 48)),
        ("gray", (31, 49)),
        ("bgr0", (32, 47)),
        ("yuv420p10le", (32, 48)),
        ("gray12le", (32, 48)),
    ],
)
def test_planes_come_back_exactly(
    tmp_path: Path, form: str, size: tuple[int, int], codec: str
) -> None:
    given, small, out = film(tmp_path / "a.mkv", form, size), tmp_path / "x.ist", tmp_path / "b.mkv"
    if codec == "lossless-h264" and ("12" in form or (form[:5] == "yuv42" and size[1] % 2)):
        with pytest.raises(InvalidInputError, match="give --codec ffv1"):
            isthmus.encode(given, small, codec=codec)
        return
    sizes = isthmus.encode(given, small, codec=codec)
    assert sizes.codec == f"parts/{codec}" and sizes.samples == 6 and not sizes.notes
    isthmus.decode(small, out)
    with av.open(str(out)) as file:
        assert abs(file.streams.video[0].average_rate - 30) < 0.5  # times are whole milliseconds
    if codec == "lossless-h264":
        assert torch.equal(whole(given), whole(out)[:, : 1 if form == "gray" else 3])
        return
    assert torch.equal(whole(given), whole(out))
    # what a program sees that knows nothing of this library
    with av.open(str(given)) as one, av.open(str(out)) as two:
        for a, b in zip(one.decode(video=0), two.decode(video=0), strict=True):
            assert a.format.name == b.format.name
            assert all(
                bytes(p) == bytes(q) for p, q in zip(a.planes, b.planes, strict=True)
            ) or torch.equal(whole(given), whole(out))


def test_a_phone_film_keeps_its_times_and_its_sound(tmp_path: Path) -> None:
    steps = (20, 13, 33)
    given = film(tmp_path / "a.mp4", coder="libx264", steps=steps, sound=True)
    small, exact = tmp_path / "x.ist", tmp_path / "y.ist"
    assert isthmus.encode(given, small).codec == "parts/av1"
    isthmus.encode(given, exact, codec="ffv1")
    truth = times(given)
    assert np.diff(truth).max() > 2 * np.diff(truth).min()
    for source, name in ((small, "b.mkv"), (small, "b.mp4"), (exact, "c.mkv"), (exact, "c.mp4")):
        out = tmp_path / name
        isthmus.decode(source, out)
        found = np.array(times(out))  # a container may begin with the sound, which comes sooner
        assert np.allclose(found - found[0], truth, atol=0.002) and found[0] < 0.03, name
        assert heard(out) == heard(given) and len(heard(out)) >= 9
        off = (whole(out).float() - whole(given).float()).abs().mean()
        assert off == 0 if source == exact else 0 < off < 6
    with av.open(str(tmp_path / "b.mp4")) as file:
        assert "av1" in file.streams.video[0].codec_context.name


def test_grey_stays_as_bright_as_it_is(tmp_path: Path) -> None:
    given = film(tmp_path / "a.mkv", "gray")
    isthmus.encode(given, tmp_path / "x.ist", quality=100)
    back = torch.cat(list(unpack(tmp_path / "x.ist").signal.chunks))
    assert back.shape[1] == 1 and (back.float() - whole(given).float()).abs().mean() < 2


def test_a_codec_of_plain_pictures_gets_rgb(tmp_path: Path) -> None:
    """As codecs that learn do: no planes, no sound, which is said."""

    class Plain(Ffv1):
        open = None  # type: ignore[assignment]

    given = film(tmp_path / "a.mp4", coder="libx264", sound=True)
    sizes = isthmus.encode(given, tmp_path / "x.ist", codec=Plain())
    assert sizes.notes == ("its sound is left out",) and sizes.samples == 6
    opened = isthmus.decode(tmp_path / "x.ist", tmp_path / "b.mkv")
    assert "layout" not in opened.signal.info and heard(tmp_path / "b.mkv") == []
    truth = torch.cat(list(open_video(given).chunks))
    assert torch.equal(torch.cat(list(open_video(tmp_path / "b.mkv").chunks)), truth)
    with pytest.raises(InvalidInputError, match="has its quality already"):
        isthmus.encode(given, tmp_path / "x.ist", codec=Plain(), quality=3)


def test_a_film_that_was_cut_off_says_so(tmp_path: Path) -> None:
    given = film(tmp_path / "a.mkv", size=(64, 96), count=120, steps=(20,))
    assert isthmus.encode(given, tmp_path / "x.ist").notes == ()
    given.write_bytes(given.read_bytes()[: given.stat().st_size // 2])
    (note,) = isthmus.encode(given, tmp_path / "x.ist").notes
    assert "of 4.0 s; the file may be cut off" in note


def test_quality_and_rate_are_kept(tmp_path: Path) -> None:
    given = film(tmp_path / "a.mkv", size=(64, 96), count=60)
    sizes = {q: isthmus.encode(given, tmp_path / "x.ist", quality=q).file for q in (10, 50, 90)}
    assert sizes[10] < sizes[50] < sizes[90]
    for rate in (40, 160):
        found = isthmus.encode(given, tmp_path / "x.ist", rate=rate)
        assert 0.5 * rate < found.payload * 8 / 2000 < 1.5 * rate  # of 2 s


def test_a_film_that_is_to_be_turned_comes_out_upright(tmp_path: Path) -> None:
    given = film(tmp_path / "a.mp4", size=(32, 48), coder="libx264")
    upright = whole(given)
    data = bytearray(given.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 8  # the matrix of ISO 14496-12, 8.3.2
    quarter = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in quarter)
    given.write_bytes(data)
    turned = torch.rot90(upright, -1, (2, 3))  # (x, y) goes to (-y, x): clockwise
    assert open_video(given).info["shape"] == [None, 3, 48, 32]
    assert torch.equal(whole(given), turned)
    isthmus.encode(given, tmp_path / "x.ist", codec="ffv1")
    isthmus.decode(tmp_path / "x.ist", tmp_path / "b.mkv")
    assert torch.equal(whole(tmp_path / "b.mkv"), turned)


@pytest.mark.parametrize("make", [Av1, Ffv1, LosslessH264])
def test_the_contract(make: Callable[[], Any]) -> None:
    def colours(high: int = 20, wide: int = 24) -> Signal:
        info = {"medium": "video", "dtype": "uint8", "shape": [4, 3, high, wide], "rate": "25/1"}
        values = pixels(4, high, wide)
        return Signal(info, [values[:3], values[3:]])

    def grey() -> Signal:
        info = {"medium": "video", "dtype": "uint8", "shape": [None, 1, 18, 34], "rate": "30/1"}
        return Signal(info, [pixels(3, 18, 34)[:, :1]])

    check_codec(make(), [colours, grey], mutations=150, limit_s=20)


def test_the_corpus_of_films() -> None:
    """A file of an older version that no longer decodes alike would show here."""
    for name, make in FILMS.items():
        stored = torch.cat(
            list(unpack((CORPUS / "films" / f"{name}.ist").read_bytes()).signal.chunks)
        )
        assert stored.shape == torch.cat(list(make().chunks)).shape, name
        if "exact" in name:
            assert torch.equal(stored, torch.cat(list(make().chunks)))


def test_mutated_films_are_refused_or_decoded() -> None:
    files = [(CORPUS / "films" / f"{name}.ist").read_bytes() for name in FILMS]
    found = fuzz(files, 400, seed=2, limit_s=20)
    assert found.failures == []
    assert found.slowest_s < 5 and found.grown < 1 << 29
    assert found.refused["BrokenFileError"] > 250


HEADER = Header(
    Av1().id,
    bytes(32),
    {"medium": "video", "dtype": "uint8", "shape": [4, 3, 18, 21], "rate": "25/1"},
    {"crf": 35},
    {"numerics": "static"},
    lossless=False,
)


def test_one_wrong_frame_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    """PyAV prints errors that come after a first one, instead of raising them."""
    wrong = _Payloads([Frame(b"a"), Frame(b"b")])
    with pytest.raises(BrokenFileError, match="another kind"):
        wrong.read(9)
    assert wrong.read(9) == b""
    with pytest.raises(BrokenFileError, match="another kind"):
        next(iter(Av1().decode(HEADER, [Frame(b"a"), Frame(b"b"), Frame(b"c")])))
    assert "dropped" not in capfd.readouterr().err


def test_hostile_streams_inside_whole_files(tmp_path: Path) -> None:
    """Bytes of the embedded stream are changed under checksums that fit."""
    from isthmus.codecs.frames import parts, samples_of, sealed

    data, rng, refused = (CORPUS / "films" / "film-exact.ist").read_bytes(), random.Random(3), 0
    head, frames, width = parts(data)
    for _ in range(60):
        (kind, payload), changed = frames[0], bytearray(frames[0][1])
        for _ in range(3):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        bad = tmp_path / "bad.ist"
        bad.write_bytes(
            sealed(head, [(kind, bytes(changed)), *frames[1:]], width, samples_of(data))
        )
        try:
            isthmus.decode(bad, tmp_path / "b.mkv")
        except (BrokenFileError, InvalidInputError) as error:
            refused += 1
            assert "\n" not in str(error)
        assert {p.suffix for p in tmp_path.iterdir()} <= {".ist", ".mkv"}
        assert len(payload) == len(changed)
    assert refused > 10


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """The encoder is fed picture by picture and hands on what it has."""
    info = {"medium": "video", "dtype": "uint8", "shape": [None, 3, 240, 320], "rate": "30/1"}
    made = iter(range(200))

    class Counted:
        read = 0

        def chunks(self) -> Any:
            for _ in made:
                self.read += 1
                yield pixels(1, 240, 320)

    counted, first = Counted(), 0
    signal = Signal(info, counted.chunks())

    class Out:
        size = 0

        def write(self, data: bytes) -> int:
            nonlocal first
            self.size += len(data)
            if self.size > 10_000 and not first:
                first = counted.read
            return len(data)

    pack(Ffv1(), signal, Out())  # type: ignore[arg-type]
    assert 0 < first < 100


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["encode", "none.mp4", "-o", "x.ist"], "cannot be read as a video (No such file"),
        (["encode", "empty.mp4", "-o", "x.ist"], "is empty"),
        (["encode", "cut.mp4", "-o", "x.ist"], "cut.mp4"),
        (["encode", "text.mkv", "-o", "x.ist"], "cannot be read as a video"),
        (["encode", "sound.mp4", "-o", "x.ist"], "holds no moving pictures"),
        (["encode", "tiny.mkv", "-o", "x.ist"], "at least 16 x 16"),
        (["encode", "a.mp4", "-o", "x.ist", "--quality", "101"], "from 0 to 100"),
        (["encode", "a.mp4", "-o", "x.ist", "--quality", "9", "--rate", "9"], "not both"),
        (["encode", "a.mp4", "-o", "x.ist", "--codec", "ffv1", "--rate", "9"], "loses nothing"),
        (["encode", "a.mp4", "-o", "x.ist", "--codec", "lossless-image"], "codes image"),
        (["encode", "a.mp4", "-o", "x.ist", "--codec", "lossless-image", "--quality", "9"], "no q"),
        (["encode", "a.png", "-o", "x.ist", "--codec", "av1"], "codes video"),
        (["decode", "good.ist", "-o", "b.wav"], "is no name for that"),
        (["decode", "good.ist", "-o", "b.avi"], "written as .mkv, .mp4, .webm"),
        (["decode", "good.ist", "-o", "b.webm"], "cannot be written"),
        (["decode", "short.ist", "-o", "b.mp4"], "cut off"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    film(Path("a.mp4"), coder="libx264", sound=True)
    Path("empty.mp4").touch()
    Path("cut.mp4").write_bytes(Path("a.mp4").read_bytes()[:700])
    Path("text.mkv").write_text("no film " * 50)
    Path("a.png").write_bytes(b"")
    film(Path("tiny.mkv"), "gray", (8, 8))
    with av.open("sound.mp4", "w") as file, av.open("a.mp4") as given:
        stream = file.add_stream_from_template(given.streams.audio[0], opaque=True)
        for packet in given.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    isthmus.encode("a.mp4", "good.ist")
    Path("short.ist").write_bytes(Path("good.ist").read_bytes()[:-40])
    for name in ("b.mp4", "b.webm", "b.avi", "x.ist"):
        Path(name).write_bytes(b"precious")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert says in " ".join(said.split()) and len(said.strip().splitlines()) == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, small = film(tmp_path / "a.mp4", coder="libx264", sound=True), tmp_path / "x.ist"
    assert main(["encode", str(given), "-o", str(small), "--codec", "ffv1", "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    assert sizes["file"] == small.stat().st_size and sizes["notes"] == []
    assert main(["inspect", str(small)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "48 x 32 pixels, 4:2:0, 8 bits, 30 pictures a second" in said
    assert "kbit/s of 0.20 s" in said and "all checksums fit" in said
    data = small.read_bytes()
    small.write_bytes(data[: len(data) // 2])
    assert main(["inspect", str(small), "--json"]) == 2
    assert "cut off" in json.loads(capsys.readouterr().out)["damage"]
