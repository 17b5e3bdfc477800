"""The contract of a codec: what goes into a file comes out of it, elsewhere too."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from isthmus.codecs.base import lookup, pack, unpack
from isthmus.codecs.container import DATA, RESET
from isthmus.codecs.frames import parts, samples_of, sealed
from isthmus.errors import DesyncError, IsthmusError
from isthmus.roles import Codec, Signal
from isthmus.testing.mutations import digest, fuzz
from isthmus.training.system import TrainedSystem

_ELSEWHERE = """
import sys
from pathlib import Path
from isthmus.testing.mutations import digest
for path in sys.argv[2:]:
    print(digest(Path(path).read_bytes(), folder=sys.argv[1] or None))
"""


def check_codec(
    codec: Codec,
    signals: Sequence[Callable[[], Signal]],
    *,
    rates: Sequence[float | None] = (None,),
    mutations: int = 300,
    limit_s: float = 60.0,
) -> None:
    """Check that a codec keeps the contract of :class:`isthmus.roles.Codec`.

    Files have the length that is reported and are the same on every run; a fresh process that looks
    the codec up by its id decodes the same; lossless codecs give every bit back; one wrong check of
    symbols is a :class:`~isthmus.errors.DesyncError`; mutated files are refused in one line or
    decode, within a time.

    Args:
        codec: The codec; it must be known under its id.
        signals: Each makes a signal anew.
        rates: Rates to try.
        mutations: Mutated files to decode.
        limit_s: Longest time for one of them.

    Raises:
        AssertionError: The contract is broken; the message says where.
    """
    assert isinstance(codec, Codec), "it lacks a part of the role"
    assert lookup(codec.id) is type(codec), f"{codec.id} leads to another class"
    assert len(codec.fingerprint) == 32, "a fingerprint has 32 bytes"
    files = []
    for make, rate in itertools.product(signals, rates):
        told, chunks = make().info, list(make().chunks)
        out, again = io.BytesIO(), io.BytesIO()
        sizes = pack(codec, make(), out, rate=rate)
        data = out.getvalue()
        assert sizes.file == len(data), "the file has another length than is reported"
        assert sizes.payload <= sizes.file
        pack(codec, make(), again, rate=rate)
        assert again.getvalue() == data, "two runs, two files"
        opened = unpack(data, codec=codec)
        assert dict(opened.signal.info) == dict(told), "the signal comes back as another"
        back = list(opened.signal.chunks)
        axis = {"audio": 1, "image": 1}.get(codec.medium, 0)
        first, second = torch.cat(chunks, axis), torch.cat(back, axis)
        assert first.shape == second.shape, f"{list(first.shape)} became {list(second.shape)}"
        assert first.dtype == second.dtype or not codec.lossless, "another type comes out"
        if codec.lossless:
            assert _bits(first) == _bits(second), "a lossless codec lost bits"
        elif second.is_floating_point():
            assert torch.isfinite(second).all(), "what comes out is no number"
        files.append(data)
    truth = [digest(f, codec=codec) for f in files]
    assert truth == _elsewhere(codec, files), "a fresh process decodes something else"
    _check_symbols(codec, files[0])
    found = fuzz(files, mutations, limit_s=limit_s, decode=lambda f: digest(f, codec=codec))
    assert not found.failures, f"mutated files: {found.failures[:3]}"


def _bits(x: torch.Tensor) -> bytes:
    return bytes(x.contiguous().numpy().tobytes())


def _elsewhere(codec: Any, files: Sequence[bytes]) -> list[str]:
    """What files decode to in a fresh process that knows their bytes and the model's folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = ""
        if isinstance(codec, TrainedSystem):
            folder = f"{place}/model"
            codec.save_pretrained(folder)
        paths = [Path(place) / f"{number}.ist" for number in range(len(files))]
        for path, data in zip(paths, files, strict=True):
            path.write_bytes(data)
        words = [sys.executable, "-c", _ELSEWHERE, folder, *map(str, paths)]
        run = subprocess.run(words, capture_output=True, text=True, check=False)
        assert run.returncode == 0, f"a fresh process fails: {run.stderr[-500:]}"
        return run.stdout.split()


def _check_symbols(codec: Codec, data: bytes) -> None:
    """Every data frame's symbols are compared with its check."""
    head, frames, width = parts(data)
    for number, (kind, payload) in enumerate(frames):
        if kind not in (DATA, RESET):
            continue
        wrong = bytes([payload[0] ^ 1]) + payload[1:]
        changed = [*frames[:number], (kind, wrong), *frames[number + 1 :]]
        bad = sealed(head, changed, width, samples_of(data))
        try:
            digest(bad, codec=codec)
        except DesyncError:
            continue
        except IsthmusError as error:
            raise AssertionError(f"a wrong check of frame {number} gives: {error}") from error
        raise AssertionError(f"frame {number} decodes although the check of its symbols is wrong")
