"""The circuit against brute force, EM against closed forms, and the codec on people's pictures."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import nn

from isthmus.cli.main import main
from isthmus.codecs.base import pack, unpack
from isthmus.errors import InvalidInputError
from isthmus.models.circuit import Circuit, Walker, chow_liu, mutual_information
from isthmus.roles import Signal
from isthmus.systems.compression.probabilistic_circuits import (
    ProbabilisticCircuits,
    Settings,
)
from isthmus.testing import check_codec
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.optimizers import Em
from isthmus.training.system import train
from isthmus.workbench.digits import records, whole

PARENTS = [-1, 0, 0, 1, 1, 2, 5, 5, 7, 7]
ALL = torch.tensor(list(itertools.product(range(2), repeat=10)))


@pytest.fixture
def circuit() -> Circuit:
    torch.manual_seed(0)
    made = Circuit(PARENTS, 3, 2)
    made.reset(1.0)
    return made.double()


@torch.no_grad()
def test_it_sums_to_one_and_marginals_are_sums(circuit: Circuit) -> None:
    """All 2^10 records, one by one."""
    law = circuit(ALL)
    assert float(law.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    generator = torch.Generator().manual_seed(1)
    for row in range(0, 1024, 100):
        known = torch.rand(1, 10, generator=generator) < 0.5
        same = (ALL[:, known[0]] == ALL[row, known[0]]).all(1)
        found = circuit(ALL[row : row + 1], known)
        assert float(found) == pytest.approx(float(law[same].exp().sum().log()), abs=1e-6)


@torch.no_grad()
def test_it_is_the_sum_over_hidden_states_by_hand() -> None:
    """Two variables: sum over h, g of p(h) p(x | h) p(g | h) p(y | g)."""
    torch.manual_seed(0)
    c = Circuit([-1, 0], 2, 3)
    root, step, leaf = (p.exp() for p in (c.log_root, c.log_transition, c.log_emission))
    for x, y in itertools.product(range(3), repeat=2):
        by_hand = sum(
            float(root[h] * leaf[0, h, x] * step[1, h, g] * leaf[1, g, y])
            for h in range(2)
            for g in range(2)
        )
        assert float(c(torch.tensor([[x, y]])).exp()) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("schedule", ["fast", "naive"])
def test_conditionals_multiply_to_the_whole(circuit: Circuit, schedule: str) -> None:
    walker, logs, laws = Walker(circuit), np.zeros(1024), []

    def choose(node: int, law: Any) -> Any:
        law = law / law.sum(-1, keepdims=True)
        laws.append((node, law))
        logs[:] += np.log(law[np.arange(1024), ALL[:, node].numpy()])
        return ALL[:, node].numpy()

    getattr(walker, schedule)(1024, choose)
    assert np.allclose(logs, circuit(ALL).detach().numpy(), atol=1e-5)
    assert [n for n, _ in laws] == circuit.order() and walker.edges >= 18
    if schedule == "fast":
        assert walker.edges == 2 * (10 - 1)


def test_trees_are_heaviest_and_rooted_in_the_middle() -> None:
    generator = torch.Generator().manual_seed(3)
    for size in (1, 2, 5, 12):
        weights = torch.rand(size, size, generator=generator)
        weights = weights + weights.T + 0.1
        parents = chow_liu(weights)
        total = sum(float(weights[i, p]) for i, p in enumerate(parents) if p >= 0)
        graph = -np.triu(weights.numpy(), 1)
        assert total == pytest.approx(-minimum_spanning_tree(graph).sum(), rel=1e-6)
        assert parents.count(-1) == 1
    line = torch.zeros(9, 9)
    line[range(8), range(1, 9)] = line[range(1, 9), range(8)] = 1.0
    assert chow_liu(line).index(-1) == 4


def test_information_is_that_of_the_definition() -> None:
    values = torch.randint(0, 4, (300, 3), generator=torch.Generator().manual_seed(0))
    values[:, 1] = (values[:, 0] + (values[:, 2] == 0)) % 4
    found = mutual_information(values, 4)
    joint = np.zeros((4, 4))
    for a, b in zip(values[:, 0].tolist(), values[:, 1].tolist(), strict=True):
        joint[a, b] += 1 / 300
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    by_hand = (joint[joint > 0] * np.log(joint[joint > 0] / apart[joint > 0])).sum()
    assert float(found[0, 1]) == pytest.approx(by_hand, rel=1e-9)
    assert torch.allclose(found, found.T)


def test_em_of_independent_variables_is_counting() -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 3, (50, 2))
    c = Circuit([-1, 0], 1, 3).double()
    em = Em(c.parameters(), lr=1.0)
    (-c(values).sum() / 50).backward()  # type: ignore[no-untyped-call]
    em.step()
    for node in range(2):
        share = values[:, node].bincount(minlength=3) / 50
        assert torch.allclose(c.log_emission[node, 0].exp(), share.double(), atol=1e-6)


def test_em_never_loses_likelihood(circuit: Circuit) -> None:
    torch.manual_seed(1)
    values = ALL[torch.randint(0, 1024, (200,))] * ALL[torch.randint(0, 1024, (200,))]
    em, last = Em(circuit.parameters(), lr=1.0), -1e9
    for _ in range(15):
        found = circuit(values).sum()
        assert found.item() > last - 1e-6
        last = found.item()
        em.zero_grad()
        (-found / 200).backward()  # type: ignore[no-untyped-call]
        em.step()
        for p in circuit.parameters():
            assert torch.allclose(p.exp().sum(-1), torch.ones(p.shape[:-1]).double(), atol=1e-6)
    with pytest.raises(InvalidInputError, match="above 0 and up to 1"):
        Em([nn.Parameter(torch.zeros(2))], lr=1.5)


@pytest.fixture(scope="module")
def codec() -> ProbabilisticCircuits:
    few = Data(records("learn")[:300], records("stop")[:50], "few")
    settings = Settings(4, 8, batch_size=300, levels=17)
    plan = Plan(20, "em", 1.0, "constant", clip_norm=0.0, weight_decay=3e-3, validate_every=20)
    made = train(ProbabilisticCircuits, few, settings, plan)
    assert isinstance(made, ProbabilisticCircuits)
    return made


def picture(rows: int, columns: int) -> Signal:
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randint(0, 17, (1, rows, columns), generator=generator, dtype=torch.uint8)
    return Signal({"medium": "image", "dtype": "uint8", "shape": [1, rows, columns]}, [pixels])


def test_it_keeps_the_contract(codec: ProbabilisticCircuits) -> None:
    check_codec(codec, [lambda: picture(8, 24), lambda: picture(11, 3)], mutations=150)


def test_bytes_are_those_of_the_model_and_of_either_schedule(codec: ProbabilisticCircuits) -> None:
    digits = whole("stop")[:40]
    strip = digits.permute(1, 0, 2).reshape(1, 8, -1)
    info = {"medium": "image", "dtype": "uint8", "shape": list(strip.shape)}
    slow = ProbabilisticCircuits(replace(codec.settings, fast=False), codec.module, 1)
    files = []
    for each in (codec, slow):
        out = io.BytesIO()
        sizes = pack(each, Signal(info, [strip]), out)
        files.append(out.getvalue())
    assert files[0] == files[1]
    with torch.no_grad():
        bits = float(-codec.module(digits.flatten(1).long()).sum()) / np.log(2)
    assert sizes.payload * 8 <= 1.01 * bits + 64 < 40 * 64 * np.log2(17)
    back = torch.cat(list(unpack(files[0], codec=codec).signal.chunks), 1)
    assert torch.equal(back, strip)


def test_what_it_does_not_code(codec: ProbabilisticCircuits) -> None:
    out = io.BytesIO()
    high = Signal(picture(8, 8).info, [torch.full((1, 8, 8), 200, dtype=torch.uint8)])
    with pytest.raises(InvalidInputError, match="has the value 200"):
        pack(codec, high, out)
    info = {"medium": "image", "dtype": "uint8", "shape": [3, 8, 8]}
    with pytest.raises(InvalidInputError, match=r"1 plane\(s\), not of 3"):
        pack(codec, Signal(info, [torch.zeros(3, 8, 8, dtype=torch.uint8)]), out)
    with pytest.raises(InvalidInputError, match="--set side=8"):
        ProbabilisticCircuits.untrained(Settings(2, 28), Data(records("stop"), []))
    for parents in ([0, 1], [-1, -1], [1, 0, -1], [-1, 5]):
        with pytest.raises(InvalidInputError, match="one tree"):
            Circuit(parents, 2, 2)


def test_ones_own_small_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of coloured icons: train, encode, decode, and a decoder without the model."""
    rng = np.random.default_rng(0)
    folder, model = tmp_path / "icons", tmp_path / "model"
    folder.mkdir()
    for number in range(24):
        icon = np.zeros((9, 13, 3), np.uint8)
        icon[:, : rng.integers(3, 10)] = rng.integers(0, 2, 3) * 90
        Image.fromarray(icon).save(folder / f"{number}.png")
    words = ["train", "probabilistic-circuits", "--data", str(folder), "-o", str(model)]
    words += ["--set", "side=4", "--set", "states=4", "--set", "levels=91", "--steps", "12"]
    assert main(words) == 0
    given, small, out = folder / "3.png", tmp_path / "x.ist", tmp_path / "y.png"
    # the folder says which codec it is
    assert main(["encode", str(given), "-o", str(small), "--model", str(model)]) == 0
    assert main(["decode", str(small), "-o", str(out), "--model", str(model)]) == 0
    assert np.array_equal(np.asarray(Image.open(given)), np.asarray(Image.open(out)))
    assert small.stat().st_size < 110 < given.stat().st_size + 60
    capsys.readouterr()
    assert main(["decode", str(small), "-o", str(out)]) == 2
    assert "give the folder of that model with --model" in capsys.readouterr().err
    assert main(["run", str(model), str(given)]) == 0
    assert "bytes" in capsys.readouterr().out
