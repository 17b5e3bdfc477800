"""Speech with known text and phonemes, spoken by espeak-ng, and noise to put it in.

::

    lines("dates", "train", 500) ─▶ text, voice, speed, pitch ─▶ espeak-ng, a process a shard
        ─▶ 22,050 Hz ─▶ 16,000 Hz ─▶ cache ─▶ utterances

The sets: ``numbers`` (0 to 9999 in words), ``dates`` (spoken; what is to be written is
``2021-03-04``), ``docs`` (first lines of docstrings), ``sentences`` (a closed vocabulary of 36
words) and ``multi`` (weekday, day and month in German, English or Spanish; to be written in
English and in this order). No text of ``held-out`` is ever in ``train``; ``accent`` is held-out
text in voices of accents that are not in ``train``.

espeak-ng is GPL-3 and stays outside this process: either the wheel ``espeakng-loader`` or the
command ``espeak-ng``. Only the wheel tells when each phoneme begins.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import BrokenFileError, InvalidInputError, MissingExtraError, UnknownNameError
from isthmus.folders import kept, published
from isthmus.signals.audio import resample
from isthmus.signals.augment import mix
from isthmus.workbench import pycode

Split = Literal["train", "held-out", "accent"]
SPLITS: tuple[Split, ...] = ("train", "held-out", "accent")

RATE = 16_000
SHARD = 500
"""Lines that one process speaks; a shard is cached as a whole."""

VOICES = tuple(
    f"{accent}+{timbre}"
    for accent in ("en-us", "gmw/en", "gmw/en-GB-x-rp")
    for timbre in ("m1", "m3", "m4", "m7", "f1", "f2", "f4", "klatt2")
)
ACCENTS = ("gmw/en-GB-scotland+m2", "gmw/en-029+f3", "gmw/en-US-nyc+m5", "gmw/en-GB-x-gbclan+f5")
FOREIGN = {"de": "de", "es": "es"}
"""Voices of the languages of ``multi`` besides English, to which a timbre is added."""


@dataclass(frozen=True)
class Line:
    """What is to be said, and how.

    Attributes:
        text: The words.
        target: What a system should write on hearing it.
        voice: espeak-ng's name of the voice.
        speed: Words a minute.
        pitch: 0 to 100.
        language: Of the text.
    """

    text: str
    target: str
    voice: str = "en-us"
    speed: int = 175
    pitch: int = 50
    language: str = "en"


@dataclass(frozen=True)
class Utterance:
    """A line as it was spoken.

    Attributes:
        line: What was to be said.
        samples: float32 [N] at 16 kHz.
        phonemes: In IPA, in order, stress marks included.
        starts_s: When each begins; empty where espeak-ng did not tell.
    """

    line: Line
    samples: torch.Tensor
    phonemes: tuple[str, ...]
    starts_s: tuple[float, ...]


def corpus(kind: str, split: Split, count: int, *, seed: int = 0) -> list[Utterance]:
    """Lines of a set, spoken; see :func:`lines` and :func:`say`."""
    return say(lines(kind, split, count, seed=seed))


def say(
    wanted: Sequence[Line], *, report: Callable[[int, int], None] | None = None
) -> list[Utterance]:
    """Speak lines, or take them from the cache.

    Args:
        wanted: The lines.
        report: Called with the lines that are done and those that are wanted.

    Raises:
        MissingExtraError: There is no espeak-ng; the message says how to get it.
        InvalidInputError: A voice does not exist, or a line came out without sound.
    """
    found: list[Utterance] = []
    engine = _engine()
    for start in range(0, len(wanted), SHARD):
        shard = list(wanted[start : start + SHARD])
        key = [engine, RATE, [asdict(line) for line in shard]]
        with kept("speech", "espeak", key) as folder:
            if not (folder / "phonemes.json").exists():
                _keep(folder, shard, engine)
            found += _kept(folder, shard)
        if report is not None:
            report(len(found), len(wanted))
    return found


def _engine() -> str:
    """Which espeak-ng there is, with its version."""
    try:
        return f"espeakng-loader {importlib.metadata.version('espeakng-loader')}"
    except importlib.metadata.PackageNotFoundError:
        pass
    command = shutil.which("espeak-ng")
    if command is None:
        raise MissingExtraError(
            "speech needs espeak-ng, which is not here; run: pip install 'isthmus[speech]', or: "
            "apt install espeak-ng"
        )
    run = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return f"{command} {run.stdout.split('Data at')[0].strip()}"


def _keep(folder: Path, shard: list[Line], engine: str) -> None:
    speak = _by_library if engine.startswith("espeakng-loader") else _by_command
    rate, waves, phonemes = speak(shard)
    parts = []
    for line, wave in zip(shard, waves, strict=True):
        if not len(wave) or not wave.any():
            raise InvalidInputError(f"espeak-ng said nothing for {line.text!r} in {line.voice!r}")
        floats = torch.from_numpy(wave.astype(np.float32) / 32768)
        parts.append((resample(floats, rate, RATE) * 32768).round().clamp(-32768, 32767).short())
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    with published(folder) as new:
        save_file({"samples": torch.cat(parts), "ends": ends}, new / "speech.safetensors")
        (new / "phonemes.json").write_text(json.dumps(phonemes), encoding="utf-8")


def _kept(folder: Path, shard: list[Line]) -> list[Utterance]:
    try:
        tensors = load_file(folder / "speech.safetensors")
        phonemes = json.loads((folder / "phonemes.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise BrokenFileError(f"{folder} is damaged ({error}); delete it") from error
    ends = tensors["ends"].tolist()
    waves = torch.tensor_split(tensors["samples"].float() / 32768, ends[:-1])
    return [
        Utterance(
            line,
            wave,
            tuple(name for name, _ in said),
            tuple(at / 1000 for _, at in said if at is not None),
        )
        for line, wave, said in zip(shard, waves, phonemes, strict=True)
    ]


_Spoken = tuple[int, list[np.ndarray], list[list[tuple[str, int | None]]]]
"""Rate, samples of every line, phonemes of every line with their start in ms."""


def _by_library(shard: list[Line]) -> _Spoken:
    rows = [json.dumps([x.text, x.voice, x.speed, x.pitch]) + "\n" for x in shard]
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_espeak.py"))],
        input="".join(rows).encode(),
        capture_output=True,
        check=False,
    )
    if run.returncode:
        raise InvalidInputError(run.stderr.decode(errors="replace").strip().splitlines()[-1])
    head, sound = run.stdout.split(b"\n", 1)
    told = json.loads(head)
    cuts = np.cumsum([count for count, _ in told["lines"]])[:-1]
    return told["rate"], np.split(np.frombuffer(sound, "<i2"), cuts), [p for _, p in told["lines"]]


def _by_command(shard: list[Line]) -> _Spoken:
    waves: list[np.ndarray] = []
    phonemes: list[list[tuple[str, int | None]]] = []
    with tempfile.TemporaryDirectory() as name:
        wav, ipa = Path(name) / "a.wav", Path(name) / "a.txt"
        for line in shard:
            options = ["-v", line.voice, "-s", str(line.speed), "-p", str(line.pitch)]
            options += ["--ipa", "--sep=_", f"--phonout={ipa}", "-w", str(wav), "--", line.text]
            run = subprocess.run(["espeak-ng", *options], capture_output=True, check=False)
            if run.returncode:
                raise InvalidInputError(f"{run.stderr.decode().strip()} ({line.voice!r})")
            data = wav.read_bytes()  # a canonical header of 44 bytes
            rate = int.from_bytes(data[24:28], "little")
            waves.append(np.frombuffer(data[44:], "<i2"))
            names = re.split(r"[_\s]+", ipa.read_text(encoding="utf-8"))
            phonemes.append([(name, None) for name in names if name])
    return rate, waves, phonemes


# --- texts --------------------------------------------------------------------------------------

_list = str.split
_ONES = _list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = _list("- - twenty thirty forty fifty sixty seventy eighty ninety")
_MONTHS = _list(
    "january february march april may june july august september october november december"
)
_DAYS = _list("monday tuesday wednesday thursday friday saturday sunday")
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth"}
_ORDINALS |= {"eight": "eighth", "nine": "ninth", "twelve": "twelfth"}


def words(number: int) -> str:
    """A number from 0 to 9999 in English words.

    Example:
        >>> words(9031), words(120)
        ('nine thousand thirty one', 'one hundred twenty')
    """
    parts = []
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if number >= unit:
            parts.append(f"{_ONES[number // unit]} {name}")
            number %= unit
    if number >= 20:
        parts.append(_TENS[number // 10])
        number %= 10
    if number or not parts:
        parts.append(_ONES[number])
    return " ".join(parts)


def ordinal(number: int) -> str:
    """A number in English as it stands in a date.

    Example:
        >>> ordinal(20), ordinal(23)
        ('twentieth', 'twenty third')
    """
    *before, last = words(number).split()
    last = last[:-1] + "ieth" if last.endswith("y") else _ORDINALS.get(last, f"{last}th")
    return " ".join([*before, last])


def _number(draw: random.Random) -> tuple[str, str, str]:
    text = words(int(10 ** draw.uniform(0, 4)))
    return text, text, "en"


def _date(draw: random.Random) -> tuple[str, str, str]:
    year, month, day = draw.randint(1910, 2099), draw.randint(1, 12), draw.randint(1, 28)
    tail = year % 100
    low = words(tail) if tail > 9 else f"oh {_ONES[tail]}" if tail else "hundred"
    said = "two thousand" if year == 2000 else f"{words(year // 100)} {low}"
    text = f"{ordinal(day)} {_MONTHS[month - 1]} {said}"
    return text, f"{year}-{month:02d}-{day:02d}", "en"


_GRAMMAR = (
    "put take move bring",
    "the a that this",
    "red green blue white black yellow",
    "box book cup lamp key ball",
    "under behind above near",
    "the my your our",
    "table window door garden river tower",
    "now today again please",
)


def _sentence(draw: random.Random) -> tuple[str, str, str]:
    chosen = [draw.choice(slot.split()) for slot in _GRAMMAR]
    if draw.random() < 0.5:
        del chosen[2]
    if draw.random() < 0.5:
        del chosen[-1]
    text = " ".join(chosen)
    return text, text, "en"


_GERMAN = _list(
    "erste zweite dritte vierte fünfte sechste siebte achte neunte zehnte elfte zwölfte "
    "dreizehnte vierzehnte fünfzehnte sechzehnte siebzehnte achtzehnte neunzehnte zwanzigste"
)
_GERMAN += [
    f"{one}undzwanzigste" for one in _list("ein zwei drei vier fünf sechs sieben acht neun")
]
_SPANISH = _list(
    "uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
    "dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro "
    "veinticinco veintiséis veintisiete veintiocho veintinueve"
)
_MULTI = {
    "de": (
        "montag dienstag mittwoch donnerstag freitag samstag sonntag",
        "januar februar märz april mai juni juli august september oktober november dezember",
        "{weekday} der {day} {month}",
    ),
    "es": (
        "lunes martes miércoles jueves viernes sábado domingo",
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
        "{weekday} {day} de {month}",
    ),
    "en": (" ".join(_DAYS), " ".join(_MONTHS), "{weekday} the {day} of {month}"),
}


def _multi(draw: random.Random) -> tuple[str, str, str]:
    weekday, month, day = draw.randrange(7), draw.randrange(12), draw.randint(1, 29)
    language = draw.choice(list(_MULTI))
    weekdays, months, form = _MULTI[language]
    said = {"de": _GERMAN[day - 1], "es": _SPANISH[day - 1], "en": ordinal(day)}[language]
    text = form.format(weekday=weekdays.split()[weekday], day=said, month=months.split()[month])
    return text, f"{_DAYS[weekday]} {ordinal(day)} {_MONTHS[month]}", language


def _docs(split: Split) -> list[str]:
    pattern = re.compile(r'"""([A-Z][a-z]+(?: [a-z]+){2,9})\.')
    part: pycode.Split = "train" if split == "train" else "held-out"
    return sorted({m.lower() for text in pycode.texts(part) for m in pattern.findall(text)})


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "numbers": _number,
    "dates": _date,
    "sentences": _sentence,
    "multi": _multi,
}
SETS = (*_MAKERS, "docs")


def lines(kind: str, split: Split, count: int, *, seed: int = 0) -> list[Line]:
    """Draw lines of a set.

    Args:
        kind: ``numbers``, ``dates``, ``sentences``, ``multi`` or ``docs``.
        split: ``train``, ``held-out`` (other texts) or ``accent`` (other texts, other accents).
        count: How many; texts may repeat, in other voices.
        seed: Other seeds draw others.

    Raises:
        UnknownNameError: There is no such set or split.

    Example:
        >>> line = lines("dates", "train", 1)[0]
        >>> line.text, line.target
        ('eighteenth august two thousand', '2000-08-18')
    """
    if kind not in SETS:
        raise UnknownNameError("set of speech", kind, SETS)
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    draw = random.Random(f"{kind}/{split}/{seed}")
    documents = _docs(split) if kind == "docs" else []
    found: list[Line] = []
    while len(found) < count:
        if kind == "docs":
            text, target, language = (draw.choice(documents),) * 2 + ("en",)
        else:
            text, target, language = _MAKERS[kind](draw)
            if (zlib.crc32(target.encode()) % 10 == 0) == (split == "train"):
                continue  # a tenth of all answers is held out, in whatever words
        voice = draw.choice(ACCENTS if split == "accent" else VOICES)
        if language in FOREIGN:
            voice = f"{FOREIGN[language]}+{voice.split('+')[1]}"
        speed, pitch = draw.randint(150, 200), draw.randint(30, 70)
        found.append(Line(text, target, voice, speed, pitch, language))
    return found


# --- noise --------------------------------------------------------------------------------------

NOISES = ("white", "pink", "brown", "hum", "clicks")


def noise(kind: str, length: int, generator: torch.Generator) -> torch.Tensor:
    """Noise of power 1 at 16 kHz.

    Args:
        kind: ``white``, ``pink`` (power as 1 / f), ``brown`` (1 / f²), ``hum`` (a mains tone of 45
            to 65 Hz and its overtones) or ``clicks`` (some 20 decaying ones a second).
        length: Samples N.
        generator: Source of the draws.

    Returns:
        float32 [N].

    Raises:
        UnknownNameError: There is no such noise.
    """
    if kind not in NOISES:
        raise UnknownNameError("noise", kind, NOISES)
    if kind == "hum":
        t = torch.arange(length) / RATE
        tone = 45 + 20 * torch.rand(1, generator=generator)
        order = torch.arange(1, 9)
        gains = torch.rand(8, generator=generator) / order
        turns = torch.rand(8, generator=generator)
        phase = tone * order[:, None] * t + turns[:, None]
        found = (gains[:, None] * torch.sin(2 * torch.pi * phase)).sum(0)
    elif kind == "clicks":
        at = torch.rand(length, generator=generator) < 20 / RATE
        at[torch.randint(length, (1,), generator=generator)] = True
        size = torch.randn(length, generator=generator) * at
        decay = torch.exp(-torch.arange(64) / 12.0) * torch.cos(torch.arange(64) * 1.1)
        padded = torch.nn.functional.pad(size, (63, 0))[None, None]
        found = torch.nn.functional.conv1d(padded, decay.flip(0)[None, None])[0, 0]
    else:
        slope = {"white": 0.0, "pink": 0.5, "brown": 1.0}[kind]
        flat = torch.randn(length, generator=generator)
        frequency = torch.fft.rfftfreq(length, 1 / RATE).clamp(min=20.0)
        found = torch.fft.irfft(torch.fft.rfft(flat) * frequency**-slope, length)
    return found / found.square().mean().sqrt().clamp(min=1e-12)


def surrounded(
    samples: torch.Tensor,
    generator: torch.Generator,
    *,
    longest_s: float,
    share: float = 0.5,
    snr_db: tuple[float, float] = (-5.0, 35.0),
) -> torch.Tensor:
    """Speech somewhere in a longer recording, as real ones have it: silence or noise around it.

    Args:
        samples: Speech [N] at 16 kHz.
        generator: Source of the draws.
        longest_s: Most seconds that are added, before and after together; drawn evenly from 0.
        share: How often anything is added.
        snr_db: Range of the ratio of the speech to the noise, in decibels, drawn evenly.

    Returns:
        float32 [N and what was added]; the speech within is as it was.
    """
    chance, length, place, ratio = torch.rand(4, generator=generator).tolist()
    kind = ("silence", *NOISES)[int(torch.randint(1 + len(NOISES), (), generator=generator))]
    size = int(length * longest_s * RATE)
    if chance >= share or not size:
        return samples
    hiss = torch.zeros(size)
    if kind != "silence":
        low, high = snr_db
        level = samples.square().mean().sqrt() * 10 ** -((low + (high - low) * ratio) / 20)
        hiss = level * noise(kind, size, generator)
    start = int(place * (size + 1))
    return torch.cat([hiss[:start], samples, hiss[start:]])


def babble(voices: Sequence[Utterance], length: int, generator: torch.Generator) -> torch.Tensor:
    """Six voices at once, each repeated from a random place, of power 1, float32 [N]."""
    total = torch.zeros(length)
    for index in torch.randint(len(voices), (6,), generator=generator).tolist():
        samples = voices[index].samples
        start = int(torch.randint(len(samples), (1,), generator=generator))
        total += samples.roll(-start).repeat(-(-length // len(samples)))[:length]
    return total / total.square().mean().sqrt().clamp(min=1e-12)


def noisy(
    kind: str,
    split: Split,
    count: int,
    *,
    noises: Sequence[str] = ("white", "pink", "brown", "hum"),
    snr_db: tuple[float, float] = (-5.0, 20.0),
    seed: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Utterances of a set in noise of their own, at a ratio of signal to noise drawn evenly.

    Returns:
        Noisy and clean samples [N] of each.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}/{split}/{seed}".encode()))
    found = []
    for index, utterance in enumerate(say(lines(kind, split, count, seed=seed))):
        clean = utterance.samples
        hiss = noise(noises[index % len(noises)], len(clean), generator)
        low, high = snr_db
        ratio = low + (high - low) * torch.rand((), generator=generator)
        found.append((clean + mix(clean, hiss, ratio), clean))
    return found
