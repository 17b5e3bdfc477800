"""Recognisers that can hear already, for speech systems that start from one.

Attention and translation need an alignment that a small encoder does not find by itself in
minutes; characters by CTC teach it one. All arms of a claim start from the same ear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from isthmus.nn.conformer import Conformer
from isthmus.training.data import Data, Spoken, Translated
from isthmus.training.loop import Plan
from isthmus.workbench.recogniser import Recogniser, Settings
from isthmus.workbench.trained import trained

EAR = Plan(400, learning_rate=2e-3, warmup_steps=45, weight_decay=1e-2, validate_every=200)


def ear(data: Data[Any], settings: Settings, plan: Plan = EAR) -> Recogniser:
    """A recogniser that reads the characters of these records; trained on first use and kept.

    Args:
        data: :class:`~isthmus.training.data.Spoken` or
            :class:`~isthmus.training.data.Translated` records.
        settings: Sizes of the recogniser.
        plan: Its training.
    """

    def heard(records: Sequence[Spoken | Translated]) -> list[Spoken]:
        return [Spoken(record.sound, record.text) for record in records]

    spoken = Data(heard(data.train), heard(data.valid), data.name)
    folder = trained(Recogniser, settings=settings, plan=plan, data=spoken)
    return Recogniser.from_pretrained(folder)


@torch.no_grad()
def lend(heard: Recogniser, encoder: Conformer, head: nn.Linear, tokens: torch.Tensor) -> None:
    """Copy what a recogniser knows into a deeper encoder, and into rows of another head.

    Args:
        heard: The recogniser.
        encoder: Of its width and at least its depth; blocks above stay as they are.
        head: From the same width.
        tokens: The head's token for each of the recogniser's characters; blank is 0 in both.
    """
    own: Any = heard.module
    encoder.load_state_dict(encoder.state_dict() | own.encoder.state_dict())
    rows = F.pad(tokens, (1, 0))
    head.weight[rows], head.bias[rows] = own.head.weight, own.head.bias
