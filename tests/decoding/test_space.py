"""SPACE: masks that see what they must, guesses read off them, an unchanged output."""

from functools import lru_cache
from typing import Any

import pytest
import tiny
import torch

from isthmus import testing
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape, Step, Verdict
from isthmus.systems.speculative.space import Settings, Space, layout, plan
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import add_placeholder, label_loss, logits_of, next_tokens, tune

TEXT = (torch.arange(32)[:, None] + torch.arange(32)) % 32 + 3  # one round of tokens


@lru_cache(maxsize=4)
def learned(name: str, fill: bool) -> Model:
    """A tiny model that has learned to count, with its masks trained or not."""
    model = tiny.fresh(name, "float32")
    steps = 60 if name == "Llama" else 10  # learned positions take longer, so only it learns
    recipe = Recipe(steps=steps, batch_size=4, sequence_length=32, learning_rate=1e-2)
    tune(model, TEXT, Space.fine_tuning(model, Settings(fill=fill)), recipe)
    return Model(model)


@lru_cache(maxsize=4)
def masked(name: str) -> Model:
    """A random model with a mask token, in float64."""
    model = tiny.fresh(name)
    add_placeholder(model)
    return Model(model)


def answers(model: Model, drafter: Any, shape: Shape, new: int = 14) -> list[Any]:
    starts = [TEXT[0, :4].clone(), TEXT[0, 2:9].clone(), torch.tensor([9])]
    policy = Fixed(drafter, shape) if drafter is not None else Fixed()
    result: list[Any] = model.generate(starts, max_new_tokens=new, drafter=policy, ignore_end=True)
    return result


def length(results: list[Any]) -> float:
    return sum(len(r.tokens) for r in results) / sum(r.stats.target_forwards for r in results)


def test_plan_and_layout() -> None:
    count, sizes = plan(5, 5, Shape(35, 10, 2))
    assert count == 5 and sizes == (5,) * 6
    topology = layout(sizes)
    assert topology.nodes == 36 and topology.max_depth == 10
    for nodes in range(1, 40):
        for depth in range(1, 11):
            count, sizes = plan(5, 5, Shape(nodes, depth, 2))
            assert count + sum(sizes) <= nodes and sum(sizes) > 0
            assert layout(sizes).max_depth <= depth
    # a guess never sees a mask, a mask sees its own node's path and its own group only
    seen = layout((1, 2, 1)).ancestors[0].int().tolist()
    assert seen[2] == [1, 1, 1, 0, 0, 0, 0], "second guess"
    assert seen[5] == [1, 1, 0, 0, 1, 1, 0], "second mask behind the first guess"


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_masks_do_not_alter_real_logits_and_stand_where_they_should(name: str) -> None:
    model = masked(name)
    prompt, guesses = tiny.prompts()[0], torch.tensor([5, 6])
    session = model.target.session(1)
    session.prefill([prompt[:-1]])
    tokens = torch.tensor([[int(prompt[-1]), 5, 6, 64, 64, 64, 64, 64]])
    got = session.score(TokenTree(tokens, layout((1, 2, 2)))).logits[0]
    text = torch.cat([prompt, guesses])
    want = model.target.forward(text[None]).logits[0, -3:]
    assert torch.allclose(got[:3], want, atol=1e-9)
    behind = torch.cat([prompt, guesses[:1], torch.tensor([64, 64])])
    want = model.target.forward(behind[None]).logits[0, -2:]
    assert torch.allclose(got[4:6], want, atol=1e-9), "masks behind the first guess"
    assert bool((got[:, 64] == -torch.inf).all()), "the mask is never emitted"


def test_guesses_come_from_the_group_of_the_last_accepted_token() -> None:
    drafter = Space(Settings(masks=2), mask_token=9)
    ids = torch.tensor([[1, 2]])
    context = Context(ids, [2], [2], Law(), torch.Generator(), [0])
    drafter.begin(context, TableTarget(12))
    first = drafter.propose(context, drafter.default_shape)
    assert first.tokens.tolist() == [[2, 9, 9]], "nothing to check yet"
    drafter._guesses = torch.tensor([[4, 5]])
    tree = drafter.propose(context, drafter.default_shape)
    assert tree.tokens.tolist() == [[2, 4, 5, 9, 9, 9, 9, 9, 9]]
    logits = torch.zeros(1, 9, 12)
    logits[..., 9] = 99.0  # whatever the mask's own logit is, it is no guess
    for node in range(9):
        logits[0, node, node] = 1.0
    drafter.observe(
        Step(
            tree,
            logits,
            Verdict(torch.tensor([[0, 1]]), torch.tensor([7])),
            [1],
            context,
            drafter.default_shape,
        )
    )
    # nodes 5 and 6 are the masks behind node 1
    assert drafter._guesses.tolist() == [[5, 6]]


def test_loss_has_both_parts_and_falls() -> None:
    model = tiny.fresh("Llama", "float32")
    ids = torch.randint(3, tiny.V, (4, 16), generator=torch.Generator().manual_seed(1))
    plain = label_loss(logits_of(model, ids), next_tokens(ids))
    off = Space.fine_tuning(tiny.fresh("Llama", "float32"), Settings(fill=False))
    none = Space.fine_tuning(tiny.fresh("Llama", "float32"), Settings(mask_weight=0.0))
    both = Space.fine_tuning(tiny.fresh("Llama", "float32"), Settings())
    seeded = [f(ids, torch.Generator().manual_seed(0)) for f in (off, none, both)]
    assert torch.allclose(seeded[0], plain, atol=1e-5)
    assert torch.allclose(seeded[1], plain, atol=1e-5) and seeded[2] > plain + 0.5


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_trained_masks_draft_and_the_output_stays(name: str) -> None:
    model = learned(name, True)
    drafter = Space.for_model(model)
    plain = answers(model, None, drafter.default_shape)
    for shape in (drafter.default_shape, Shape(12, 4, 2), Shape(6, 6, 1)):
        got = answers(model, drafter, shape)
        assert [r.tokens for r in got] == [r.tokens for r in plain]
        assert all(64 not in r.tokens for r in got)
    if name == "Llama":
        assert length(answers(model, drafter, drafter.default_shape)) > 2.5


def test_the_mechanism_matters() -> None:
    model = learned("Llama", False)
    drafter = Space.for_model(model)
    assert length(answers(model, drafter, drafter.default_shape)) < 1.3


def test_contract_and_sampled_law() -> None:
    shapes = (Shape(4, 4, 1), Shape(6, 2, 3), Shape(30, 4, 4))
    testing.check_drafter(lambda: Space(Settings(masks=2)), shapes=shapes)
    target = TableTarget(5, seed=2, sharpness=1.5, order=1)
    drafter = Space(Settings(masks=2))
    result = testing.string_test(
        Fixed(drafter, drafter.default_shape), target=target, law=Law(temperature=1.0)
    )
    assert result.p > 1e-4 and result.impossible == 0 and result.acceptance_length > 1.05


def test_a_model_without_mask_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="tuned to fill masks"):
        Space.for_model(tiny.facade("Llama"))
    with pytest.raises(InvalidInputError):
        Settings(masks=0)
