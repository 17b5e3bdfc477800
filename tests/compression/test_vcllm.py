"""Tensors as pictures: exact tilings, the contract, bits as asked for, planted structure."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch

from isthmus.codecs import weights
from isthmus.codecs.base import pack, unpack
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Signal
from isthmus.systems.compression.vcllm import Settings, Vcllm, _tiles, bits_at, error
from isthmus.testing import check_codec


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def signal(value: torch.Tensor) -> Signal:
    kind = str(value.dtype).removeprefix("torch.")
    return Signal({"medium": "tensor", "dtype": kind, "shape": list(value.shape)}, [value])


def test_it_keeps_the_contract() -> None:
    makers = [lambda: signal(drawn(40, 24)), lambda: signal(drawn(3, 5, 7).half())]
    check_codec(Vcllm(), makers, mutations=20)


def test_tiles_by_hand() -> None:
    """Five rows of three in tiles of at most two (sizes that even out): edges are repeated."""
    tiles = _tiles(torch.arange(15.0).view(5, 3), 2)
    assert tiles.shape == (6, 2, 2)
    assert tiles[0].tolist() == [[0, 1], [3, 4]] and tiles[1].tolist() == [[2, 2], [5, 5]]
    assert tiles[5].tolist() == [[14, 14], [14, 14]]


@pytest.mark.parametrize("settings", [Settings("", bits=12), Settings(bits=12, qp=0)])
def test_fine_steps_leave_little_error(settings: Settings) -> None:
    for shape in ((20, 30), (4, 9, 50), (7,), ()):
        x = drawn(*shape)
        codec = Vcllm(settings)
        assert error(x, codec.restored(codec.tensor(x), shape)) < 1e-4


def test_the_rate_is_kept_and_used() -> None:
    x = drawn(128, 128)
    for rate in (2.5, 4.0):
        out = io.BytesIO()
        sizes = pack(Vcllm(), signal(x), out, rate=rate)
        assert 0.85 * rate < 8 * sizes.payload / x.numel() <= rate
        back = torch.cat(list(unpack(out.getvalue()).signal.chunks))
        assert error(x, back) < 0.15
    with pytest.raises(InvalidInputError, match="too few"):
        pack(Vcllm(), signal(x), io.BytesIO(), rate=0.01)


def test_layers_serve_fine_tensors() -> None:
    """At the error of 8 bits in groups they are chosen, and take fewer bits than that, and than one
    picture at no smaller error; at the error of 4 bits one picture is kept."""
    x = drawn(256, 256)
    rounded, spent = weights.by_groups(x, 8)
    codec = Vcllm(Settings(bits=12, preset="veryfast"))
    data = codec.tensor(x, rate=8.4)
    assert data[4] > 0 and 8.3 < 8 * len(data) / x.numel() <= 8.4 < spent
    assert error(x, codec.restored(data, x.shape)) < error(x, rounded)
    alone = Vcllm(Settings(bits=12, preset="veryfast", qp=2))
    one = alone.tensor(x)
    assert one[4] == 0 and len(one) > 1.05 * len(data)
    assert error(x, alone.restored(one, x.shape)) > error(x, codec.restored(data, x.shape))
    assert codec.tensor(x, rate=4.0)[4] == 0


def test_files_of_layers() -> None:
    """Another process reads the same numbers from them; damaged ones are refused in one line."""
    x, out = drawn(96, 128), io.BytesIO()
    pack(Vcllm(Settings(tile=64)), signal(x), out, rate=10.0)
    back = torch.cat(list(unpack(out.getvalue()).signal.chunks))
    assert error(x, back) < 3e-5
    code = (
        "import sys, torch; from isthmus.codecs.base import unpack\n"
        "x = torch.cat(list(unpack(sys.stdin.buffer.read()).signal.chunks))\n"
        "sys.stdout.buffer.write(x.numpy().tobytes())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=out.getvalue(), capture_output=True, check=True
    )
    assert run.stdout == back.numpy().tobytes()
    codec = Vcllm(Settings(tile=64))
    data = codec.tensor(x, rate=10.0)
    assert data[16] > 0  # four tiles have four lows and four scales
    other = bytes([data[16] + 1])
    for bad in (data[:16], data[:16] + other + data[17:], data[:16] + b"\6" + data[17:], data[:-9]):
        with pytest.raises(BrokenFileError, match=r"cut off|pictures|layers|decoded"):
            codec.restored(bad, x.shape)
    file = bytearray(out.getvalue())
    for at in range(len(file) // 3, len(file), 997):
        file[at] ^= 16
        with pytest.raises(BrokenFileError):
            list(unpack(bytes(file)).signal.chunks)
        file[at] ^= 16


def test_structure_is_found() -> None:
    """Rows that are alike cost far less in place than in random order, at no larger error."""
    x = (torch.arange(64.0) / 9).sin()[:, None] * torch.ones(64) + 0.01 * drawn(64, 64)
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    mixed = x.flatten()[order].view(64, 64)
    codec = Vcllm(Settings(qp=28))
    data, other = codec.tensor(x), codec.tensor(mixed)
    assert len(data) < 0.5 * len(other)
    assert error(x, codec.restored(data, (64, 64))) < 2e-3


def test_what_is_refused() -> None:
    for bad in (torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan]), torch.zeros(0)):
        with pytest.raises(InvalidInputError, match="finite"):
            Vcllm().tensor(bad)
    with pytest.raises(InvalidInputError, match="codes floats, not int32"):
        pack(Vcllm(), signal(torch.zeros(3, dtype=torch.int32)), io.BytesIO())
    for settings in (Settings("vp8"), Settings(bits=9), Settings(tile=8)):
        with pytest.raises(InvalidInputError, match="give a coder"):
            Vcllm(settings)
    with pytest.raises(InvalidInputError, match="does not enclose"):
        bits_at([(2.0, 0.1), (3.0, 0.01)], 0.5)
