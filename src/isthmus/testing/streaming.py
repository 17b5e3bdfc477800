"""The contract of what streams."""

from __future__ import annotations

import random

import torch

from isthmus.roles import Streaming


def check_streaming(
    part: Streaming,
    sound: torch.Tensor,
    whole: torch.Tensor | None = None,
    *,
    tolerance: float = 1e-5,
    rounds: int = 3,
) -> None:
    """Feed packets of random sizes and compare with one packet, and with what offline gives.

    Args:
        part: What streams.
        sound: [B, N].
        whole: What ``part`` gives offline for it, with time as the last dimension; None compares
            with one packet only.
        tolerance: Largest difference.
        rounds: Cuts into packets that are tried.

    Raises:
        AssertionError: The contract is broken; the message says where.
    """
    assert isinstance(part, Streaming), f"{type(part).__name__} lacks a member of Streaming"
    first, state = part.step(sound, part.init_state(len(sound)))
    once = torch.cat([first, part.flush(state)], -1)
    if whole is None:
        whole = once
    assert once.shape == whole.shape, (
        f"one packet gives {list(once.shape)}, offline gives {list(whole.shape)}"
    )
    worst = float((once - whole).abs().max())
    assert worst <= tolerance, f"one packet differs from offline by {worst:.3g}"
    if once.shape[-1] == sound.shape[-1]:  # sample by sample: nothing may be held back
        late = sound.shape[-1] - first.shape[-1]
        assert late <= part.lookahead, f"{late} samples late, lookahead is {part.lookahead}"
    for seed in range(rounds):
        draw, state, out, place = random.Random(seed), part.init_state(len(sound)), [], 0
        while place < sound.shape[-1]:
            size = draw.choice((0, 1, 7, 160, 1024, draw.randint(1, sound.shape[-1])))
            y, state = part.step(sound[:, place : place + size], state)
            out.append(y)
            place += size
        found = torch.cat([*out, part.flush(state)], -1)
        assert found.shape == whole.shape, (
            f"packets give {list(found.shape)}, the whole {list(whole.shape)}"
        )
        worst = float((found - whole).abs().max())
        assert worst <= tolerance, f"packets (seed {seed}) differ from the whole by {worst:.3g}"
