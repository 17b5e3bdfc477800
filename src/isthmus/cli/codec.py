"""``isthmus encode``, ``decode`` and ``inspect``: files made small, and whole again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from isthmus.cli.output import console, print_error, print_json
from isthmus.errors import InvalidInputError

if TYPE_CHECKING:
    from isthmus.workbench.coding_folders import Coded, Job

Out = Annotated[Path, Parameter(name=["--out", "-o"])]
Json = Annotated[bool, Parameter(negative="")]
Engine = Literal["local", "ray"]


def encode(
    given: Path,
    /,
    *,
    out: Out,
    codec: str = "",
    rate: float | None = None,
    quality: float | None = None,
    model: Path | None = None,
    engine: Engine = "local",
    workers: int = 0,
    json: Json = False,
) -> int:
    """Make a file of sound, a picture or a film small: an .ist file. Or all files of a folder.

    Args:
        given: wav, flac, ogg, mp3 ..., png, jpeg, webp ..., mp4, mkv, webm ...; or a folder, of
            which every such file is coded, also in the folders below.
        out: The .ist file to write; an older one there is replaced at the end. Of a folder, the
            folder for the .ist files; those that are there already are kept.
        codec: Name of a codec. Without it sound and pictures lose nothing, and films are coded
            as AV1, with loss; ffv1 codes films without. One that has to be trained is trained at
            the scale small the first time.
        rate: Highest rate wanted: kbit/s of sound and films, bits per pixel of pictures. Without
            a codec, sound and pictures are then coded with loss, by models that come along: one
            for speech, one for photographs.
        quality: Wanted quality, 0 to 100, of a codec that has such a choice; AV1 takes 50.
        model: Folder of a trained codec, made by isthmus train.
        engine: local, or ray: the files of a folder are spread over a Ray cluster, the one at
            RAY_ADDRESS or one on this machine, whose machines see the same folders.
        workers: Workers of that cluster; one for each core when 0.
        json: Print one JSON object and nothing else on standard output.
    """
    from isthmus.workbench.coding import encode as write

    if given.is_dir():
        from isthmus.workbench.coding_folders import encode_folder

        with _progress("training", json) as (_, report):
            job = encode_folder(
                given, out, codec=codec, rate=rate, quality=quality, model=model, report=report
            )
        return _folder(job, out, "encoding", engine, workers, json)
    _one_file(given, engine)
    with _progress("encoding", json) as (heard, report):
        sizes = write(
            given,
            out,
            codec=codec,
            rate=rate,
            quality=quality,
            model=model,
            heard=heard,
            report=report,
        )
    before = given.stat().st_size
    if json:
        print_json({"out": str(out), "given_bytes": before, **asdict(sizes)})
        return 0
    share = f"{sizes.file / before:.1%} of {before:,}"
    console().print(
        f"{out}: {sizes.file:,} bytes ({share}), {sizes.codec}, {sizes.frames} frame(s)"
    )
    for note in sizes.notes:
        console(stderr=True).print(f"{given.name}: {note}")
    if sizes.file > before:
        console(stderr=True).print(
            f"{given.name} is smaller than what comes out: it was lossy, or of a kind that its own "
            "format codes better"
        )
    return 0


def decode(
    given: Path,
    /,
    *,
    out: Out,
    model: Path | None = None,
    partial: Annotated[bool, Parameter(negative="")] = False,
    engine: Engine = "local",
    workers: int = 0,
    json: Json = False,
) -> int:
    """Turn an .ist file into sound, a picture or a film. Or all of a folder.

    Args:
        given: The .ist file, or a folder of them.
        out: The file to write, in the format of its suffix; an older one is replaced at the end.
            Of a folder, the folder for what comes out; files that are there already are kept.
        model: Folder of the trained codec that wrote the file, if it is not known here.
        partial: Of a damaged file, write what comes before the damage; a codec that mends makes up
            for what was lost.
        engine: local, or ray: the files of a folder are spread over a Ray cluster.
        workers: Workers of that cluster; one for each core when 0.
        json: Print one JSON object and nothing else on standard output.
    """
    if given.is_dir():
        from isthmus.workbench.coding_folders import decode_folder

        job = decode_folder(given, out, model=model, partial=partial)
        return _folder(job, out, "decoding", engine, workers, json)
    _one_file(given, engine)
    from isthmus.signals.files import described
    from isthmus.workbench.coding import decode as write

    with _progress("decoding", json) as (heard, _):
        opened = write(given, out, model=model, partial=partial, heard=heard)
    damage = opened.reader.damage
    if json:
        print_json(
            {
                "out": str(out),
                "codec": opened.codec.id,
                "lossless": opened.codec.lossless,
                "signal": dict(opened.signal.info),
                "damage": damage,
            }
        )
        return 0
    exact = "every bit as it was" if opened.codec.lossless else "lossy"
    said = f"{out}: {described(opened.signal.info)}, {exact}"
    mends = getattr(opened.codec, "mends", False)
    partly = "what was lost is made up" if mends else "the part before the damage"
    console().print(said if not damage else f"{out}: {partly}")
    if damage:
        console(stderr=True).print(damage)
    return 0


def inspect(given: Path, /, *, json: Json = False) -> int:
    """Say what is in an .ist file, and check it.

    The checksums of all frames are checked; nothing is decoded. A damaged file gives exit code 2.

    Args:
        given: The .ist file.
        json: Print one JSON object and nothing else on standard output.
    """
    from rich.table import Table

    from isthmus.signals.files import described
    from isthmus.workbench.coding import inspect as look

    found = look(given)
    if json:
        print_json(found)
        return 2 if found["damage"] else 0
    signal = found["signal"]
    rate = ""
    if found["length"] and signal["medium"] == "audio":
        rate = f", {found['bytes'] * 8 * signal['rate_hz'] / found['length'] / 1000:.2f} kbit/s"
    elif found["length"] and signal["medium"] == "video":
        each = Fraction(signal.get("rate", "25/1"))
        seconds = float(found["length"] / each) if each > 0 else math.inf
        rate = f", {found['bytes'] / 125 / seconds:.1f} kbit/s of {seconds:.2f} s"
    elif signal["medium"] == "image":
        rate = (
            f", {found['bytes'] * 8 / (signal['shape'][1] * signal['shape'][2]):.2f} bits a pixel"
        )
    frames = ", ".join(f"{n} {kind}" for kind, n in found["frames"].items()) or "none"
    parameters = ", ".join(f"{k} {v}" for k, v in found["parameters"].items()) or "none"
    rows = {
        "codec": f"{found['codec']}, {'lossless' if found['lossless'] else 'lossy'}",
        "signal": described(signal),
        "size": f"{found['bytes']:,} bytes{rate}; header {found['header_bytes']}, payload "
        f"{found['payload_bytes']:,}",
        "frames": frames,
        "parameters": parameters,
        "entropy model": ", ".join(f"{k} {v}" for k, v in found["entropy"].items()),
        "model": f"{found['fingerprint'][:8]}: {found['model']}",
        "state": found["damage"] or "whole: all checksums fit",
    }
    rows |= {f"text {i + 1}": text for i, text in enumerate(found["texts"])}
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    console().print(table)
    return 2 if found["damage"] else 0


def _one_file(given: Path, engine: str) -> None:
    if engine != "local":
        raise InvalidInputError(f"{given} is one file; --engine {engine} spreads those of a folder")


def _folder(job: Job, out: Path, what: str, engine: Engine, workers: int, json: bool) -> int:
    """Code the files of a folder; 2 where some could not be."""
    done: list[Coded] = []
    with _progress(what, json) as (heard, _):
        for one in job.run(engine, workers=workers):
            done.append(one)
            heard(len(done), len(job.left))
    failed = sorted(one.error for one in done if one.error)
    before, after = (sum(getattr(one, name) for one in done) for name in ("before", "after"))
    if json:
        files = [asdict(one) for one in sorted(done, key=lambda one: one.given)]
        print_json({"out": str(out), "files": files, "kept": job.kept, "others": job.others})
        return 2 if failed else 0
    count = len(done) - len(failed)
    share = f" ({after / before:.1%} of {before:,})" if before else ""
    console().print(f"{out}: {count} file(s), {after:,} bytes{share}")
    screen = console(stderr=True)
    if job.kept:
        screen.print(f"{job.kept} file(s) were there already and are kept")
    if job.others:
        screen.print(f"{job.others} file(s) of other kinds are left out")
    for line in failed:
        print_error(line)
    return 2 if failed else 0


@contextmanager
def _progress(
    what: str, silent: bool
) -> Iterator[tuple[Callable[[int, int | None], None], Callable[[Any], None]]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.progress import Progress

    screen = console(stderr=True)
    with Progress(console=screen, transient=True, disable=silent or not screen.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def heard(done: int, total: int | None) -> None:
            bar.update(task, description=what, completed=done, total=total)

        def report(now: Any) -> None:
            told = f"training, step {now.step} of {now.steps}"
            bar.update(task, description=told, completed=now.step, total=now.steps)

        yield heard, report


def bench(
    *files: Path,
    model: Path | None = None,
    picture: Annotated[Path | None, Parameter(name=["--picture", "-p"])] = None,
    json: Json = False,
) -> int:
    """Compare codecs on your pictures, sounds or films: rate, distortion, time, in one run.

    Ours that are ready (trained ones whose model is in the cache) beside JPEG, WebP, AVIF, PNG,
    JPEG XL where its plug-in is installed; FLAC, Opus, Vorbis, MP3; H.264, H.265, AV1.

    Args:
        files: Pictures only, sounds only, or films only.
        model: Folder of a trained codec to compare as well.
        picture: A .png, .svg or .pdf file to draw the curves into.
        json: Print one JSON object and nothing else on standard output.
    """
    from rich.table import Table

    from isthmus.laws.forwards import check_picture
    from isthmus.laws.rd import draw
    from isthmus.workbench.codec_bench import bench as measure

    if picture is not None:
        check_picture(picture)
    with console(stderr=True).status("") as status:
        found = measure(files, model=model, report=lambda name: status.update(name))
    image = found.medium == "image"
    rate = "bits per pixel" if image else "kbit/s"
    quality = "- log-mel dB" if found.medium == "audio" else "PSNR, dB"
    if picture is not None:
        draw(picture, found.curves, rate=rate, quality=quality)
    if json:
        curves = {
            name: [
                {**asdict(p), "quality": p.quality if math.isfinite(p.quality) else None}
                for p in points
            ]
            for name, points in found.curves.items()
        }
        record = {
            "curves": curves,
            "bd_rate": found.bd,
            "left_out": found.left_out,
            "notes": found.notes,
        }
        print_json({"medium": found.medium, "anchor": found.anchor, **record})
        return 0
    each = "Mpixel" if image else "s"
    table = Table(pad_edge=False)
    more = [found.similarity] * bool(found.similarity)
    heads = ("setting", rate, quality, *more, f"encode s/{each}", f"decode s/{each}")
    for head in ("codec", *heads, f"rate at equal quality, {found.anchor} = 0"):
        table.add_column(head, justify="left" if head == "codec" else "right")
    for name, points in found.curves.items():
        for i, p in enumerate(points):
            said = f"{p.quality:.2f}" if math.isfinite(p.quality) else "exact"
            bd = f"{found.bd[name]:+.1f} %" if i == 0 and name in found.bd else ""
            times = (f"{p.encode_s:.3f}", f"{p.decode_s:.3f}")
            also = [f"{p.more[m]:.4f}" if m in p.more else "" for m in more]
            table.add_row("" if i else name, p.label, f"{p.rate:.3f}", said, *also, *times, bd)
    console().print(table)
    for note in found.notes:
        console(stderr=True).print(note)
    for name, why in found.left_out.items():
        console(stderr=True).print(f"left out: {name}: {why}")
    if picture is not None:
        console().print(f"curves drawn into {picture}")
    return 0
