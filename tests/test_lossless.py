"""The shipped model writes what transformers writes, whoever drafts.

ISTHMUS_PROMPTS=50 runs the whole measurement (minutes); by default a few prompts stand for it.
"""

import os

import pytest
import torch

import isthmus
from isthmus.workbench import pycode

COUNT = int(os.environ.get("ISTHMUS_PROMPTS", "3"))
NEW = 128 if COUNT >= 50 else 64


def test_every_drafter_writes_the_target_text() -> None:
    model = isthmus.load(dtype="float32", device="cpu", draft_model="")
    hub = model.target.model
    different = []
    for prompt in pycode.prompts(COUNT, model.tokenizer, 96, seed=1):
        ids = torch.tensor([prompt])
        want = hub.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, ids.shape[1] :]
        for drafter in ("none", "prompt-lookup", "token-recycling", "auto"):
            got = model.generate(ids[0], max_new_tokens=NEW, drafter=drafter, ignore_end=True)
            if got.tokens != want.tolist():
                different.append((drafter, _gap(model, ids, got.tokens, want.tolist())))
    # a near-tie may fall either way in float32; anything else is a mistake of the engine
    assert all(gap < 1e-4 for _, gap in different), different


@torch.no_grad()
def _gap(model: isthmus.Model, ids: torch.Tensor, got: list[int], want: list[int]) -> float:
    """Share of the logit spread between the two tokens at the first difference."""
    at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
    prefix = torch.cat([ids[0], torch.tensor(want[:at], dtype=torch.int64)])
    logits = model.target.model(prefix[None]).logits[0, -1]
    spread = float(logits.max() - logits.min())
    return float((logits[want[at]] - logits[got[at]]).abs()) / spread


@pytest.mark.parametrize("drafter", ["prompt-lookup", "token-recycling", "auto"])
def test_coupled_sampling_writes_the_same_text_whoever_drafts(drafter: str) -> None:
    from isthmus.decoding.acceptance import Coupled

    model = isthmus.load(dtype="float64", device="cpu")
    prompt = pycode.prompts(1, model.tokenizer, 64, seed=2)[0]

    def draw(name: str) -> list[int]:
        tokens: list[int] = model.generate(
            prompt, max_new_tokens=32, drafter=name, acceptance=Coupled(5), temperature=1.0
        ).tokens
        return tokens

    assert draw(drafter) == draw("none")
