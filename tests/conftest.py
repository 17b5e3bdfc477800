"""Fixtures that more than one test file uses."""

import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from making import MakeSystem

# No test may depend on a network; a forgotten download fails at once instead of hanging.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A job in the background of a shell ignores interrupts, and commands under test inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tiny models gain nothing from threads, and lose much when another program holds a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="module")
def _shared_networks_stay() -> Iterator[None]:
    """A file that trains or prunes a network of all tests would fail another file's tests."""
    yield
    if "tiny" in sys.modules:
        names = sys.modules["tiny"].changed()
        assert not names, f"this file changed {names}; use copy.deepcopy(tiny.network(...))"


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads of torch, and of the kernel."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SYSTEM = '''\
"""{title}.

Any words in between.

Paper: A. Writer and B. Reader, "A Made-up Method of 1999", {year}, arXiv:{arxiv}
Idea: {idea}
Differs: left out the part that
    nobody can reproduce.
{extra}"""

from dataclasses import dataclass

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge


@dataclass(frozen=True)
class {name}Settings:
    """Settings."""

    width: int = 4
    enabled: bool = True


class {name}:
    """The system."""


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure."""
    print("a library that talks")
    {before}
    gates = (Gate("speed-up", 2.0, ">=", 1.5),)
    return Claim(
        slug="{slug}",
        statement="Twice as fast.",
        paper_figure="2x (Table 1)",
        rows=(Row("speed-up", "x", 1.0, 2.0, 1.0),),
        scale=scale,
        device="cpu",
        status=judge(gates),
        gates=gates,
        seeds=(0,),
    )
'''


@pytest.fixture
def systems_root(tmp_path: Path) -> Path:
    """An empty folder for families of systems."""
    root = tmp_path / "systems"
    root.mkdir()
    return root


@pytest.fixture
def make_system(systems_root: Path) -> MakeSystem:
    """Write a small complete system and give its path."""

    def make(
        slug: str = "made-up",
        family: str = "speculative",
        *,
        extra: str = "",
        before: str = "pass",
        **words: object,
    ) -> Path:
        folder = systems_root / family
        folder.mkdir(exist_ok=True)
        path = folder / f"{slug.replace('-', '_')}.py"
        name = "".join(part.capitalize() for part in slug.split("-"))
        values = {"title": "A made-up method", "year": 2024, "arxiv": "2401.01234v2"}
        values |= {"idea": "guess, then look.", "slug": slug, "name": name} | words
        before = textwrap.indent(textwrap.dedent(before), "    ").strip()
        extra = f"{extra}\n" if extra else ""
        path.write_text(SYSTEM.format(extra=extra, before=before, **values), encoding="utf-8")
        return path

    return make
