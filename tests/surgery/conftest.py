"""Tests of this folder draw from torch's own generator: the same numbers at every run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
