"""Sorted speculation: exits are truncated models, skipped keys are filled, the text is plain."""

import math

import numpy as np
import pytest
import tiny
import torch
import transformers as tf

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stages import StagedTarget
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.target import HubTarget
from isthmus.errors import InvalidInputError
from isthmus.models.nested import (
    check_exits,
    exit_logits,
    exits_of,
    keep_layers,
    set_exits,
    sorted_loss,
)
from isthmus.roles import Shape
from isthmus.systems.speculative.sorted_speculation import (
    Settings,
    SortedSpeculation,
    calibrate,
    predict,
)
from isthmus.testing import check_drafter
from isthmus.workbench.exits import NEVER, Record, forward_cost, record

EXITS = (1, 2, 4)


@pytest.fixture(scope="module")
def nested() -> HubTarget:
    """A random Llama of four layers in float64 that says its exits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**tiny._GROUPED, "num_hidden_layers": 4}))
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(3)
    model.lm_head.weight.data.mul_(8)  # else it is never sure
    set_exits(model, EXITS)
    return HubTarget(model.eval().double())


def texts(rows: int = 3, length: int = 14, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.V, (rows, length), generator=generator)


def test_an_exit_is_the_truncated_model_bit_for_bit(nested: HubTarget) -> None:
    ids = texts()
    with torch.no_grad():
        for exit_at, logits in zip(EXITS, exit_logits(nested.model, ids, EXITS), strict=True):
            cut = keep_layers(nested.model, range(exit_at))
            assert cut.config.num_hidden_layers == exit_at
            assert torch.equal(logits, cut(input_ids=ids, use_cache=False).logits)
    other = keep_layers(nested.model, (3, 0))
    assert torch.equal(
        other.model.layers[0].mlp.up_proj.weight, nested.model.model.layers[3].mlp.up_proj.weight
    )


def test_the_loss_is_the_mean_over_the_exits(nested: HubTarget) -> None:
    ids = texts()
    parts = [
        keep_layers(nested.model, range(e))(input_ids=ids, labels=ids, use_cache=False).loss
        for e in EXITS
    ]
    want, got = torch.stack(parts), sorted_loss(nested.model, ids, EXITS)
    torch.testing.assert_close(got, want.mean().float())
    torch.testing.assert_close(sorted_loss(nested.model, ids, (2,)), want[1].float())


@torch.no_grad()
@pytest.mark.parametrize("equal", [True, False])
def test_keys_of_skipped_layers_are_right_after_the_fill(nested: HubTarget, equal: bool) -> None:
    """Fed in odd pieces, deep now and then, cut back, forked: as one forward without a cache."""
    staged = StagedTarget(nested, EXITS)
    session = staged.session(3)
    generator = torch.Generator().manual_seed(1)
    ids, lengths = texts(3, 120), [0, 0, 0]
    rows, checks = [0, 1, 2], 0
    for step in range(24):
        sizes = torch.randint(1, 4, (len(rows),), generator=generator).tolist()
        sizes = sizes[:1] * len(rows) if equal else sizes
        width = max(sizes)
        block = torch.stack(
            [
                torch.nn.functional.pad(ids[r, n : n + k], (0, width - k))
                for r, n, k in zip(rows, lengths, sizes, strict=True)
            ]
        )
        valid = torch.arange(width) < torch.tensor(sizes)[:, None]
        state = session.feed(block, valid)
        lengths = [n + k for n, k in zip(lengths, sizes, strict=True)]
        assert session.lengths == lengths
        deep = int(torch.randint(0, 3, (1,), generator=generator))
        for stage in range(1, deep + 1):
            state = session.run(stage)
            assert session.waiting[stage] == 0
        if deep < 2:
            assert session.waiting[deep + 1] > 0
        got = staged.logits(state)
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            want = exit_logits(nested.model, ids[row : row + 1, :n], EXITS)[deep][0, -1]
            assert float((got[b] - want).abs().max()) < 1e-9
            checks += 1
        if step % 3 == 2:
            back = [n - (2 if equal else 1 + b) for b, n in enumerate(lengths)]
            session.truncate(back)
            lengths = back
        if step == 17:
            rows, lengths = [rows[2], rows[0]], [lengths[2], lengths[0]]
            session = session.fork([2, 0])
            assert session.waiting == [0, 0, 0]
    assert checks > 60 and staged.calls[0] == 24 and staged.calls[2] < 20


def run(drafter: SortedSpeculation, new: int = 8, law: Law | None = None) -> list[Request]:
    target = tiny.target("Llama")
    requests = [
        Request(p, Stopper(max_new_tokens=new + 3 * i)) for i, p in enumerate(tiny.prompts())
    ]
    rounds = decode(
        target,
        requests,
        policy=Fixed(drafter, drafter.default_shape),
        acceptance=Lossless(),
        law=law or Law(),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in rounds:
        pass
    return requests


@pytest.mark.parametrize("levels", [(0.0,), (0.5, 0.6), (NEVER, 0.5)])
def test_the_text_is_the_plain_one(nested: HubTarget, levels: tuple[float, ...]) -> None:
    want = tiny.reference("Llama", "float64", 20)
    drafter = SortedSpeculation(nested, Settings(thresholds=levels, stop=0.25))
    for row, request in enumerate(run(drafter)):
        assert request.result.tokens == want[row][: 8 + 3 * row]
    if levels == (0.5, 0.6):
        assert min(drafter.answers) > 0, "every exit has answered"
    if levels == (0.0,):
        # only rows that leave the batch make the deeper layers catch up
        assert drafter.answers[1:] == [0, 0] and max(drafter.model.calls[1:]) <= 2


def test_the_target_as_its_own_drafter_is_always_right() -> None:
    twin = tiny.fresh("Llama")
    set_exits(twin, (1, 2))
    drafter = SortedSpeculation(HubTarget(twin), Settings(thresholds=(NEVER,), stop=0.0))
    for request in run(drafter):
        rounds = request.result.rounds[:-1]  # the budget cuts the last one
        assert rounds and all(r.accepted == r.nodes == 6 for r in rounds)


def test_the_switch_asks_the_last_exit_only(nested: HubTarget) -> None:
    off = SortedSpeculation(nested, Settings(thresholds=(0.0,), stop=0.0, adaptive=False))
    on = SortedSpeculation(nested, Settings(thresholds=(0.0,), stop=0.0))
    assert [r.result.tokens for r in run(off)] == [r.result.tokens for r in run(on)]
    assert off.answers[:2] == [0, 0] and off.answers[2] > 0 and on.answers[0] > 0


def test_contract(nested: HubTarget) -> None:
    small = HubTarget(keep_layers(nested.model, (0, 3)).float())
    settings = Settings(exits=(1, 2), thresholds=(0.3,), stop=0.15)
    check_drafter(lambda: SortedSpeculation(small, settings), shapes=(Shape(3, 3, 1),))


def test_an_unsure_token_stays_and_ends_the_draft(nested: HubTarget) -> None:
    every = SortedSpeculation(nested, Settings(thresholds=(NEVER,), stop=0.0))
    never = SortedSpeculation(nested, Settings(thresholds=(NEVER,), stop=1.1))
    sizes = [{r.nodes for q in run(d) for r in q.result.rounds[:-2]} for d in (every, never)]
    assert max(sizes[0]) == 6 and sizes[1] == {1}


def policies(*given: tuple[tuple[float, ...], float, int]) -> list[Settings]:
    return [Settings(None, levels, stop, length) for levels, stop, length in given]


def test_speedup_by_hand() -> None:
    """Two exits, one text of four places; layers cost 1 and 2, the head 1, the target 10."""
    right = np.array([[[True, False, True, True]], [[True, True, True, True]]])
    sure = np.array([[[0.9, 0.4, 0.8, 0.9]], [[0.9, 0.9, 0.9, 0.9]]])
    seen = Record(right, sure, np.array([1.0, 2.0]), 1.0)
    shallow, deep, mixed, short = predict(
        seen,
        10.0,
        policies(((0.0,), 0.0, 8), ((NEVER,), 0.0, 8), ((0.5,), 0.0, 8), ((0.0,), 0.5, 8)),
    )
    # three drafts (one wrong) and then the last two places: 1 of them drafted
    assert shallow == pytest.approx(4 / (2 + (3 + 1) * 2 / 10))
    assert deep == pytest.approx(4 / (1 + 3 * 4 / 10))
    # the second token goes on to the second exit and pays both heads: 2 + 5 + 2
    assert mixed == pytest.approx(4 / (1 + 9 / 10))
    # the unsure second token is drafted, the third one is not
    assert short == pytest.approx(4 / (2 + (2 + 1) * 2 / 10))


def test_calibration_goes_deeper_for_larger_targets() -> None:
    rng = np.random.default_rng(0)
    right = np.stack([rng.random((20, 24)) < 0.55, rng.random((20, 24)) < 0.85])
    seen = Record(right, np.full(right.shape, 0.6), np.array([1.0, 6.0]), 1.0)
    small, large = calibrate(seen, 12.0), calibrate(seen, 300.0)
    assert small.thresholds[0] <= 0.6 and large.thresholds[0] > 0.6
    assert small.num_draft_tokens < large.num_draft_tokens
    assert calibrate(seen, 12.0, adaptive=False).adaptive is False


def test_the_replay_is_what_the_engine_does(nested: HubTarget) -> None:
    """On the target's own text: as many rounds and, where all drafts stand, as much work."""
    target, new = tiny.target("Llama"), 15
    plain = tiny.reference("Llama", "float64", 20)
    prompt = tiny.prompts()[0]
    text = torch.cat([prompt, torch.tensor(plain[0][:new])])[None]
    settings = Settings(thresholds=(0.4, 0.5), stop=0.3, num_draft_tokens=4)
    seen = record(nested, text, len(prompt))
    drafter = SortedSpeculation(nested, settings)
    request = Request(prompt, Stopper(max_new_tokens=new))
    for _ in decode(
        target,
        [request],
        policy=Fixed(drafter, drafter.default_shape),
        acceptance=Lossless(),
        law=Law(),
        generator=torch.Generator().manual_seed(0),
    ):
        pass
    assert request.result.tokens == plain[0][:new]
    rounds = new / float(predict(seen, math.inf, [settings])[0])
    assert request.result.stats.target_forwards == round(rounds)
    assert forward_cost(nested) == 4 * (3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16 + 64) + 64 * 32


def test_bad_input(nested: HubTarget) -> None:
    for wrong in ({"stop": -0.1}, {"thresholds": ()}, {"num_draft_tokens": -1}):
        with pytest.raises(InvalidInputError, match="sorted speculation needs"):
            SortedSpeculation(nested, Settings(**wrong))
    with pytest.raises(InvalidInputError, match="exits must rise"):
        SortedSpeculation(nested, Settings(exits=(1, 3)))
    with pytest.raises(InvalidInputError, match="exits must rise"):
        check_exits((2, 2, 4), 4)
    with pytest.raises(InvalidInputError, match="layers kept"):
        keep_layers(nested.model, (4,))
    assert exits_of(tiny.network("Llama").config) == (2,)
