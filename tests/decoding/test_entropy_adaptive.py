"""Entropy adaptive decoding: the switches by hand, both limits, and what catching up costs."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from isthmus.decoding.relay import Relay, choose
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.systems.speculative.entropy_adaptive import (
    LARGE,
    SMALL,
    EntropyAdaptive,
    Settings,
    Switch,
    entropy_bits,
)

SHARP, BLUNT = (TableTarget(11, seed=s, sharpness=sh) for s, sh in ((3, 3.0), (4, 0.7)))
PROMPTS = [torch.tensor(p) for p in ([1, 2, 3], [4], [5, 6])]


def greedy(target: TableTarget, prompt: torch.Tensor, new: int) -> list[int]:
    ids = prompt[None]
    for _ in range(new):
        token = target.logits(target.state(ids)).argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
    return ids[0, len(prompt) :].tolist()


def test_entropy_is_in_bits_and_of_the_raw_law() -> None:
    assert entropy_bits(torch.zeros(3, 16)).tolist() == [4.0, 4.0, 4.0]
    law = torch.tensor([0.5, 0.25, 0.25])
    assert entropy_bits(law.log()).item() == pytest.approx(1.5)
    assert entropy_bits(torch.tensor([0.0, -math.inf])).item() == 0.0


def test_the_switches_are_those_worked_out_by_hand() -> None:
    # window 2, threshold 1 bit, a stay of 3 tokens at least
    switch = Switch(Settings(window=2, threshold=1.0, min_stay=3))
    entropies = [0.0, 4.0, 4.0, 0.0, 0.0, 0.0, 4.0, 0.0, 4.0]
    #       means  0    2    4    2    0    0    2    2    2
    want = [0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert [switch.after(h) for h in entropies] == want


def test_the_mean_must_exceed_the_threshold() -> None:
    switch = Switch(Settings(window=1, threshold=1.0, min_stay=1))
    assert [switch.after(h) for h in (1.0, 1.0001, 1.0)] == [SMALL, LARGE, SMALL]


def test_both_limits_are_the_single_models() -> None:
    small = EntropyAdaptive(BLUNT, SHARP, Settings(threshold=math.inf))
    for prompt, got in zip(PROMPTS, small.generate_batch(PROMPTS, max_new_tokens=12), strict=True):
        assert got.tokens == greedy(BLUNT, prompt, 12) and not got.lossless
        assert got.stats.target_forwards == 0
    # with threshold 0 every law is uncertain: the small model writes its first stay only
    both = EntropyAdaptive(BLUNT, SHARP, Settings(threshold=0.0, min_stay=2))
    for prompt, got in zip(PROMPTS, both.generate_batch(PROMPTS, max_new_tokens=12), strict=True):
        head = greedy(BLUNT, prompt, 2)
        start = torch.cat([prompt, torch.tensor(head)])
        assert got.tokens == head + greedy(SHARP, start, 10)
        assert [r.drafter for r in got.rounds] == ["small"] * 2 + ["large"] * 10
    assert both.read == (3 * 2 - 3 + 6, 6 + 3 * 2 + 3 * 9), "each token is read once at most"


def test_rows_of_a_batch_switch_for_themselves() -> None:
    settings = Settings(window=2, threshold=2.4, min_stay=2)
    first, second = (TableTarget(11, seed=s, sharpness=1.7) for s in (5, 6))
    strategy = EntropyAdaptive(first, second, settings)
    together = strategy.generate_batch(PROMPTS, max_new_tokens=25, temperature=1.0, seed=5)
    writers = [[r.drafter for r in g.rounds] for g in together]
    assert len({tuple(w) for w in writers}) == 3, "or the test sees nothing"
    for row, prompt in enumerate(PROMPTS):
        alone = strategy.generate(prompt, max_new_tokens=25, temperature=1.0, seed=5 + row)
        assert alone.tokens == together[row].tokens


def test_off_switches_by_chance_with_the_share_asked_for() -> None:
    settings = Settings(min_stay=1, random_share=0.3)
    off = EntropyAdaptive(BLUNT, SHARP, settings).generate(PROMPTS[0], max_new_tokens=150, seed=0)
    assert off.stats.target_forwards / 150 == pytest.approx(0.3, abs=0.12)


def test_catching_up_equals_having_read_everything() -> None:
    """Two tiny transformers take turns on ragged rows; every law is that of a full forward."""
    models = [tiny.target("Llama"), tiny.target("Llama", noise=0.3)]
    relay = Relay(models, tiny.prompts())
    generator = torch.Generator().manual_seed(0)
    for turn in range(14):
        model = turn % 3 % 2
        rows = [b for b in range(3) if (turn + b) % 4] or [0]
        logits = relay.logits(model, rows)
        for row, law in zip(rows, logits, strict=True):
            want = models[model].forward(torch.tensor([relay.texts[row]])).logits[0, -1]
            assert torch.allclose(law, want, atol=1e-8)
            relay.append(row, int(torch.randint(3, tiny.V, (1,), generator=generator)))
        if turn % 5 == 4:
            relay.take_back(1, len(relay.texts[1]) - 2)
            relay.append(1, 7)
    assert relay.read[0] < sum(map(len, relay.texts)) + 20


def test_choose_is_argmax_or_the_law() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0]]).expand(2, -1)
    draws = [torch.Generator().manual_seed(s) for s in (0, 1)]
    assert choose(logits, 0.0, draws) == [1, 1]
    counts = torch.bincount(
        torch.tensor([t for _ in range(400) for t in choose(logits, 1.0, draws)])
    )
    want = torch.softmax(logits[0].double(), 0) * 800
    assert torch.allclose(counts.double(), want, atol=4 * 15)


def test_an_end_token_ends_a_row() -> None:
    first = greedy(BLUNT, PROMPTS[0], 3)
    strategy = EntropyAdaptive(BLUNT, SHARP, Settings(threshold=math.inf), end=first[2])
    got = strategy.generate(PROMPTS[0], max_new_tokens=9)
    assert got.tokens == first[: first.index(first[2]) + 1] and got.finish_reason == "stop"


def test_bad_input_is_refused_in_one_line() -> None:
    for bad in ({"window": 0}, {"min_stay": 0}, {"threshold": -1.0}, {"random_share": 2.0}):
        with pytest.raises(InvalidInputError, match=r"entropy-adaptive|random_share"):
            Settings(**bad)  # type: ignore[arg-type]
    strategy = EntropyAdaptive(BLUNT, SHARP)
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        strategy.generate(PROMPTS[0], max_new_tokens=0)
    with pytest.raises(InvalidInputError, match="at least one token"):
        strategy.generate(torch.tensor([], dtype=torch.int64), max_new_tokens=2)
    with pytest.raises(MismatchError, match="share one vocabulary"):
        EntropyAdaptive(TableTarget(900), SHARP).generate(PROMPTS[0], max_new_tokens=2)
    alone = SimpleNamespace(target=SHARP, draft_model=None, tokenizer=None)
    with pytest.raises(InvalidInputError, match="--draft-model"):
        EntropyAdaptive.for_model(alone)
    encoder = SimpleNamespace(target=tiny.target("Bart"), draft_model=SHARP, tokenizer=None)
    with pytest.raises(UnsupportedModelError, match="without an encoder"):
        EntropyAdaptive.for_model(encoder)
