"""Speculative contrastive decoding: its law, its extra amateur calls, and its two limits."""

import math
from typing import Any

import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Coupled, Lossless
from isthmus.decoding.contrast import Contrastive, contrast
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.generation import Generation
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Shape, Target
from isthmus.systems.speculative.speculative_contrastive import (
    Pair,
    Settings,
    SpeculativeContrastive,
    difference,
    quality,
    walltime_factor,
)
from isthmus.testing import check_drafter, string_test

V, END = 5, 4
EXPERT = TableTarget(V, seed=1, sharpness=1.2, end_token=END)
AMATEUR = TableTarget(V, seed=2, sharpness=1.0)


def test_contrast_by_hand() -> None:
    expert = torch.tensor([0.6, 0.3, 0.08, 0.02, 0.0], dtype=torch.float64).log()
    amateur = torch.tensor([0.5, 0.1, 0.2, 0.1, 0.1], dtype=torch.float64).log()
    p = torch.softmax(contrast(expert, amateur, strength=0.5, plausibility=0.1), -1)
    raw = [0.6**1.5 / 0.5**0.5, 0.3**1.5 / 0.1**0.5, 0.08**1.5 / 0.2**0.5]
    assert p.tolist() == pytest.approx([*(r / sum(raw) for r in raw), 0.0, 0.0])
    p = torch.softmax(contrast(expert, amateur, plausibility=0.4, original=True), -1)
    assert p.tolist() == pytest.approx([1.2 / 4.2, 3.0 / 4.2, 0.0, 0.0, 0.0])
    assert torch.equal(contrast(expert, amateur, strength=0.0, plausibility=0.0), expert)


@pytest.mark.parametrize("plausibility", [0.0, 0.1, 1.0])
def test_the_plausible_set_is_never_empty(plausibility: float) -> None:
    generator = torch.Generator().manual_seed(0)
    expert, amateur = torch.randn(2, 500, 7, generator=generator) * 20
    amateur[:, 3] = -torch.inf  # a token that the amateur does not have
    for original in (False, True):
        scores = contrast(expert, amateur, plausibility=plausibility, original=original)
        kept = scores > -torch.inf
        assert bool(kept.gather(1, expert.argmax(1, keepdim=True)).all())
        assert bool(torch.isfinite(scores[kept]).all())
        assert plausibility < 1.0 or int(kept.sum()) == 500


LAWS = {
    "temperature": Law(temperature=0.8),
    "top-p": Law(temperature=1.0, top_p=0.8),
    "penalty": Law(temperature=0.9, repetition_penalty=1.3),
}


@pytest.mark.parametrize(
    ("law", "choice"),
    [
        ("temperature", Settings(num_draft_tokens=2)),
        ("temperature", Settings(num_draft_tokens=0)),
        ("temperature", Settings(original=True)),
        ("top-p", Settings()),
        ("penalty", Settings()),
    ],
)
def test_joint_law_is_the_contrastive_one(choice: Settings, law: str) -> None:
    drafter = SpeculativeContrastive(AMATEUR, choice)
    result = string_test(
        Fixed(drafter, drafter.default_shape),
        target=Pair(EXPERT, AMATEUR, **drafter.options),
        law=LAWS[law],
        acceptance=drafter.acceptance,
        rows=400 if law == "penalty" else 1200,
    )
    assert result.p > 1e-4 and result.impossible == 0
    assert result.acceptance_length > (1.1 if choice.num_draft_tokens else 0.99)


def test_the_mechanism_matters() -> None:
    """The contrastive law is not the expert's, and switched off the expert's law comes out."""
    off = SpeculativeContrastive(AMATEUR, Settings(contrastive=False))
    assert off.acceptance is None
    options: dict[str, Any] = {"law": Law(temperature=0.8), "rows": 900}
    policy = Fixed(off, off.default_shape)
    assert string_test(policy, target=EXPERT, **options).p > 1e-4
    pair = Pair(EXPERT, AMATEUR, **off.options)
    assert string_test(policy, target=pair, **options).p < 1e-4
    # with nothing to contrast and nothing implausible the two laws are one
    none = SpeculativeContrastive(AMATEUR, Settings(strength=0.0, plausibility=0.0))
    policy = Fixed(none, none.default_shape)
    result = string_test(policy, target=EXPERT, acceptance=none.acceptance, **options)
    assert result.p > 1e-4


def run(
    gamma: int, law: Law, rule: Any = None, rows: int = 6, amateur: Target = AMATEUR
) -> tuple[SpeculativeContrastive, list[Generation]]:
    drafter = SpeculativeContrastive(amateur, Settings(num_draft_tokens=gamma))
    requests = [
        Request(torch.tensor([0, 1, b % V]), Stopper(max_new_tokens=30 + b)) for b in range(rows)
    ]
    rounds = decode(
        EXPERT,
        requests,
        policy=Fixed(drafter, drafter.default_shape),
        acceptance=Contrastive(drafter, rule, **drafter.options),
        law=law,
        generator=torch.Generator().manual_seed(0),
    )
    for _ in rounds:
        pass
    return drafter, [r.result for r in requests]


@pytest.mark.parametrize("gamma", [1, 3])
@pytest.mark.parametrize("law", [Law(), Law(temperature=0.7)], ids=["greedy", "coupled"])
def test_answers_are_those_of_plain_contrastive_decoding(law: Law, gamma: int) -> None:
    rule = Lossless() if law.greedy else Coupled(3)
    _, plain = run(0, law, rule)
    _, ours = run(gamma, law, Lossless() if law.greedy else Coupled(3))
    assert [r.tokens for r in ours] == [r.tokens for r in plain]
    assert sum(r.stats.accepted for r in ours) > 0
    assert not any(r.lossless for r in ours)


def test_greedy_answers_by_a_slow_reference() -> None:
    _, results = run(2, Law())
    mixed = Pair(EXPERT, AMATEUR, strength=0.5, plausibility=0.1).mixed
    for b, result in enumerate(results):
        ids = [0, 1, b % V]
        for token in result.tokens:
            scores = mixed.logits(mixed.state(torch.tensor([ids])))[0]
            assert token == int(scores.argmax())
            ids.append(token)


def test_amateur_calls_are_counted_as_in_the_formula() -> None:
    """gamma calls a round, and one more after every fully accepted draft."""
    drafter, (result,) = run(2, Law(temperature=1.0), rows=1)
    full = sum(r.nodes == 2 and r.accepted == 2 for r in result.rounds[:-1])
    cut = [r.nodes for r in result.rounds]
    assert drafter.calls == sum(cut)
    extra = sum(r.nodes == r.accepted for r in result.rounds)
    assert full > 2 and drafter.extra == extra
    assert walltime_factor(1.0, 4, 0.0) == 5.0
    assert walltime_factor(0.5, 2, 0.1) == pytest.approx(1.75 / (1 + 0.2 + 0.025))


def test_contract_with_and_without_the_contrast() -> None:
    model = TableTarget(11, seed=4, sharpness=1.5, order=2)
    shapes = (Shape(3, 3, 1),)
    check_drafter(lambda: SpeculativeContrastive(model), shapes=shapes)


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_a_network_decodes_as_plain_contrastive_decoding(name: str) -> None:
    def answers(gamma: int) -> list[list[int]]:
        drafter = SpeculativeContrastive(
            tiny.target(name, "float64", noise=0.3), Settings(num_draft_tokens=gamma)
        )
        model, options = tiny.facade(name, "float64"), {"max_new_tokens": 10, "ignore_end": True}
        policy = Fixed(drafter, drafter.default_shape)
        return [r.tokens for r in model.generate(tiny.prompts(), drafter=policy, **options)]

    plain = answers(0)
    assert answers(3) == plain
    assert plain != [tiny.reference(name, "float64", 10)[row] for row in range(3)]


def test_quality_by_hand() -> None:
    valid, repeats = quality(["x\na = 1\nb c\nfor i in y:\nq", "no line", "p q r p q r"])
    assert valid == [pytest.approx(2 / 3)]
    assert repeats[-1] == pytest.approx(1 / 4)
    mean, low = difference([1.0] * 50, [0.0] * 25 + [1.0] * 25)
    assert mean == 0.5 and 0.3 < low < 0.5
    assert not math.isnan(low)


def test_what_is_refused() -> None:
    for bad in ({"num_draft_tokens": -1}, {"strength": -0.1}, {"plausibility": 1.5}):
        with pytest.raises(InvalidInputError, match="plausibility is a share"):
            SpeculativeContrastive(AMATEUR, Settings(**bad))
    drafter = SpeculativeContrastive(AMATEUR)
    assert drafter.acceptance is not None
    with pytest.raises(InvalidInputError, match="chains only"):
        tree = TokenTree.from_paths(0, [[1], [2]])
        drafter.acceptance.accept(tree, torch.zeros(1, 3, V), None)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="as long a context"):
        run(2, Law(), amateur=TableTarget(V, max_length=8))
