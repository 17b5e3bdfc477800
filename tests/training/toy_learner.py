"""A small learner with dropout, and its run as a program for tests of several processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus.roles import Loss
from isthmus.training.loop import Plan, Progress, Trainer


class Toy:
    """Regression to the sum of the inputs; rows of one step are the same however they are split."""

    lower_is_better = True

    def __init__(self, split: int = 1, dropout: float = 0.1, poison: int = -1) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module: Any = nn.Sequential(
                nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1)
            )
        self.split, self.poison = split, poison
        self.identity = {"toy": dropout}

    def batch(self, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        step, piece = divmod(part, self.split)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator)
        x = x[piece :: self.split]
        if step == self.poison:
            x = x * float("nan")
        return x, x.sum(1, keepdim=True)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> Loss:
        x, y = batch
        error = (self.module(x) - y).abs()
        return Loss(error.square().sum(), len(x), {"absolute": error.detach().sum()})

    def validate(self) -> dict[str, float]:
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(99))
        y = self.module(x)
        return {"error": float((y - x.sum(1, keepdim=True)).square().mean())}


def main() -> None:
    """Train as told by a JSON object: plan, trainer options, a step to die at, where to write."""
    told = json.loads(sys.argv[1])
    learner = Toy(told.get("split", 1), told.get("dropout", 0.1))
    paths = {k: Path(told[k]) for k in ("state", "metrics") if k in told}
    trainer = Trainer(learner, Plan(**told["plan"]), **paths, **told.get("options", {}))

    def report(now: Progress) -> None:
        if now.step == told.get("die_at"):
            os.kill(os.getpid(), 9)

    trainer.run(report)
    weights = {k: v.tolist() for k, v in trainer.weights().items()}
    if trainer.fabric.is_global_zero:
        Path(told["out"]).write_text(json.dumps(weights))


if __name__ == "__main__":
    main()
