from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from serving_start import Running, end, start

from isthmus.serving.server import Limits


@pytest.fixture(scope="session")
def served() -> Iterator[Running]:
    running = start(limits=Limits(batch_size=4, queue=16, max_tokens=256, max_body_bytes=50_000))
    yield running
    end(running)


@pytest.fixture
def serve() -> Iterator[Any]:
    made: list[Running] = []

    def one(**options: Any) -> Running:
        made.append(start(**options))
        return made[-1]

    yield one
    for running in made:
        end(running)
