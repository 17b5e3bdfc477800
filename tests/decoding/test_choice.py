"""The likeliest token from int8 bounds: always that of the float32 logits, near ties and all."""

import pytest
import torch
from test_fast_pairs import make, sources

from isthmus.decoding.fast import FastTarget
from isthmus.decoding.model import Model
from isthmus.decoding.native import Kernel, library
from isthmus.decoding.program import LOGITS, STREAM, Kind, Program
from isthmus.errors import UnsupportedModelError

K, V = 64, 200
GENERATOR = torch.Generator().manual_seed(5)


@pytest.fixture(autouse=True)
def _int8_products() -> None:
    try:
        if library().isthmus_screens():
            return
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    pytest.skip("no products of int8 on this processor")


def head(weight: torch.Tensor, bias: torch.Tensor | None = None, factor: float = 0.0) -> Kernel:
    program = Program(0, weight.shape[1], 1, 1, 8, 8, len(weight))
    program.add(
        Kind.LINEAR,
        source=STREAM,
        target=LOGITS,
        weight=weight,
        in_width=weight.shape[1],
        out_width=len(weight),
        stride=len(weight),
        factor=factor,
        **({} if bias is None else {"bias": bias}),
    )
    program.lay_out()
    return Kernel(program)


def chosen(kernel: Kernel, states: torch.Tensor) -> torch.Tensor | None:
    kernel.reserve(len(states), 0)
    kernel.call.batch, kernel.call.nodes = 1, len(states)
    kernel.call.buffers[STREAM] = states.data_ptr()
    return kernel._choose(len(states))


def check(kernel: Kernel, states: torch.Tensor) -> None:
    """Every logit lies below its upper bound, and the choice is the first of the largest."""
    kernel.trust = 16
    found, logits = chosen(kernel, states), kernel.head(states)
    width = kernel.room["upper"].numel() // len(states)
    upper = kernel.room["upper"][: len(states) * width].view(len(states), width)[:, :V]
    low = kernel.room["lows"].view(-1, 16)[: len(states), 0]
    assert bool((logits <= upper).all()) and bool((logits.amax(1) >= low).all())
    if found is None:  # bounds that leave too much say so
        assert int((upper >= low[:, None]).sum()) > 16 * len(states)
    else:
        first = (logits == logits.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
        assert torch.equal(found, first)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize("nodes", [1, 2, 5, 6, 7, 13, 40])
@pytest.mark.parametrize("kind", ["plain", "bias", "factor", "bfloat16"])
def test_random_heads(nodes: int, kind: str) -> None:
    weight = normal(V, K)
    if kind == "bfloat16":
        weight = weight.bfloat16()
    kernel = head(weight, normal(V) * 9 if kind == "bias" else None, 0.3 * (kind == "factor"))
    states = normal(nodes, K)
    check(kernel, states)
    assert chosen(kernel, states) is not None


def test_tokens_that_differ_in_the_last_bit_and_not_at_all() -> None:
    weight = normal(V, K) * 0.01
    states = normal(12, K)
    for node, state in enumerate(states):  # of each node eight tokens stand out, all but equal
        same = state / state.norm()
        for j in range(8):
            near = same.clone()
            if j % 2:
                near[j] = torch.nextafter(near[j], torch.tensor(torch.inf if j % 4 == 1 else -1.0))
            weight[(17 * node + 23 * j) % V] = near
    kernel = head(weight)
    check(kernel, states)
    found = chosen(kernel, states)
    assert found is not None
    logits = kernel.head(states)
    top = logits.topk(2, 1).values
    assert bool((top[:, 0] - top[:, 1] < 1e-6).all())  # the ties are as near as they were meant


def test_the_first_of_equal_tokens_is_chosen() -> None:
    weight = normal(V, K)
    states = normal(6, K)
    best = (states @ weight.T).argmax(1)
    for token in best.tolist():
        weight[V - 1 - token] = weight[token]
    found = chosen(head(weight), states)
    assert found is not None
    assert torch.equal(found, torch.minimum(best, V - 1 - best))


def test_rounding_that_is_as_wrong_as_it_can_be() -> None:
    # half way between two steps everywhere, every error with the sign that adds up
    signs = torch.where(normal(V, K) > 0, 1.0, -1.0)
    whole = torch.randint(1, 126, (V, K), generator=GENERATOR)
    weight = signs * (whole + 0.4999)
    weight[:, 0] = 127.0 * signs[:, 0]  # the largest, so that a step is 1
    states = signs[:20] * (torch.randint(0, 126, (20, K), generator=GENERATOR) + 0.5001)
    states[:, 0] = 127.0
    for sign in (1.0, -1.0):
        check(head(sign * weight), states)


@pytest.mark.parametrize("scale", [1e-42, 1e-36, 1e-20, 1e-8, 1e8, 1e15])
def test_small_and_large_numbers(scale: float) -> None:
    check(head(normal(V, K) * scale, normal(V) * scale), normal(7, K))
    check(head(normal(V, K)), normal(7, K) * scale)


def test_states_and_rows_that_stand_out_or_are_zero() -> None:
    weight, states = normal(V, K), normal(9, K)
    weight[3] *= 1e4
    weight[5] = weight[70] = 0.0
    weight[:, 7] *= 50
    states[:, 11] *= 1e3
    states[4] = 0.0
    check(head(weight, normal(V)), states)
    check(head(weight), states)


def test_numbers_out_of_range_are_left_to_the_logits() -> None:
    kernel = head(normal(V, K))
    for bad in (torch.nan, torch.inf, -torch.inf, 3e38):
        states = normal(3, K)
        states[1, 9] = bad
        assert chosen(kernel, states) is None
    assert head(torch.full((V, K), 1e30)).program.screen is None
    assert head(normal(V, K), torch.full((V,), torch.nan)).program.screen is None


def test_bounds_that_leave_everything_are_given_up() -> None:
    kernel = head(normal(1, K).expand(V, K).contiguous())
    assert kernel.trust > 0
    while kernel.trust > 0:
        assert chosen(kernel, normal(2, K)) is None


def test_threads_choose_the_same(two_threads: None) -> None:
    check(head(normal(V, K)), normal(30, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_those_of_logits(dtype: torch.dtype) -> None:
    target = FastTarget(make("Marian", dtype))
    model, prompts = Model(target), sources(7, 3, 11, 5, 9)
    options = {"max_new_tokens": 20, "drafter": "none", "ignore_end": True}
    by_choice = [each.tokens for each in model.generate(prompts, **options)]
    assert target.kernel.room, "nothing was screened"
    target.kernel.trust = 0
    assert [each.tokens for each in model.generate(prompts, **options)] == by_choice
