"""Multi-candidate speculation: its sliced tree, its decision model, and what is not lossless."""

from typing import Any

import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Rejection
from isthmus.decoding.builders import sliced
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.furthest import FurthestRoot
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.multi_candidate import (
    Decision,
    MultiCandidate,
    Settings,
    train,
)
from isthmus.testing import check_drafter, emitted_laws, string_test
from isthmus.testing.acceptances import laws

V, END = 5, 4
TARGET = TableTarget(V, seed=1, sharpness=1.2, end_token=END)
DRAFT = TableTarget(V, seed=2, sharpness=1.0)
HALTING = Decision((4.0, 0.0, 0.0, 0.0, 0.0, 4.0))


def propose(
    choice: Settings, rows: int, shape: Shape | None = None
) -> tuple[MultiCandidate, TokenTree]:
    prompt = torch.tensor([0, 1, 2]).expand(rows, -1).contiguous()
    generator, lengths = torch.Generator().manual_seed(0), [3] * rows
    law = Law(temperature=1.0)
    context = Context(prompt, lengths, list(lengths), law, generator, list(range(rows)))
    drafter = MultiCandidate(DRAFT, choice)
    drafter.begin(context, TARGET)
    return drafter, drafter.propose(context, shape or drafter.default_shape)


@pytest.mark.parametrize("branching", [(4, 2, 1, 1), (2, 3), (1, 1, 1), (3,)])
def test_a_sliced_mask_equals_a_rebuilt_one(branching: tuple[int, ...]) -> None:
    blocks = sliced(branching)
    assert [b.max_depth for b in blocks] == list(range(len(branching) + 1))
    for block in blocks:
        rebuilt = Topology.of(block.parent[0].tolist())
        assert torch.equal(block.ancestors, rebuilt.ancestors)
        assert torch.equal(block.depth, rebuilt.depth)
        assert torch.equal(block.children, rebuilt.children)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_verification_with_replacement_is_exact(k: int) -> None:
    p, q = laws(4, 12, seed=k)
    assert float((emitted_laws(Rejection(), p, q, draw="iid", k=k) - p).abs().max()) < 1e-12


@pytest.mark.parametrize("law", [Law(temperature=1.0), Law(temperature=0.8, top_p=0.7)])
@pytest.mark.parametrize(
    "choice",
    [Settings(branching=(3, 2), decide=False), Settings(branching=(3, 2), decision=HALTING)],
)
def test_joint_law(choice: Settings, law: Law) -> None:
    drafter = MultiCandidate(DRAFT, choice)
    policy = Fixed(drafter, drafter.default_shape)
    result = string_test(policy, target=TARGET, law=law, rows=1500)
    assert result.p > 1e-4 and result.impossible == 0 and result.acceptance_length > 1.2


def test_the_decision_ends_rows_one_by_one() -> None:
    drafter, tree = propose(Settings(branching=(3, 2), decision=HALTING), 200)
    levels = torch.tensor(drafter.levels)
    assert set(drafter.levels) == {1, 2}, "some rows go on, some stop"
    assert tree.drafted() == torch.where(levels == 2, 9, 3).tolist()
    # the chance is that of the model on the figures, which know level 1 only
    chance = HALTING(drafter.figures[0])
    assert torch.equal(chance >= 0.5, levels == 2)


def test_figures_by_hand() -> None:
    drafter, tree = propose(Settings(branching=(2, 1), decide=False), 3)
    q = torch.softmax(DRAFT.logits(DRAFT.state(torch.tensor([[0, 1, 2]]))), -1)[0]
    for b in range(3):
        best = max(float(q[t]) for t in tree.tokens[b, 1:3].tolist())
        top = q.sort(descending=True).values
        want = [best**1.0, float(top[0]), float(top[0] - top[1]), float(-(q * q.log()).sum()), 1.0]
        got = drafter.figures[0][b].tolist()
        assert [2.718281828459045 ** got[0], *got[1:]] == pytest.approx(want, abs=1e-6)


def test_the_mechanism_matters() -> None:
    """Decided drafts are shorter and lose little; switched off, every draft is full."""
    draft = TableTarget(V, seed=1, sharpness=0.7)

    def run(choice: Settings) -> tuple[float, float]:
        calls = []

        class Watched(MultiCandidate):
            def observe(self, step: Any) -> None:
                calls.extend(self.levels)
                if not choice.decide:
                    records.append((torch.stack(self.figures, 1), torch.tensor(step.accepted)))
                super().observe(step)

        requests = [
            Request(torch.tensor([b % V, 1]), Stopper(max_new_tokens=40)) for b in range(40)
        ]
        drafter = Watched(draft, choice)
        rounds = decode(
            TableTarget(V, seed=1, sharpness=1.8),
            requests,
            policy=Fixed(drafter, drafter.default_shape),
            acceptance=Rejection(),
            law=Law(temperature=1.0),
            generator=torch.Generator().manual_seed(0),
        )
        for _ in rounds:
            pass
        forwards = sum(r.result.stats.target_forwards for r in requests)
        return 1600 / forwards, sum(calls) / 1600

    records: list[tuple[torch.Tensor, torch.Tensor]] = []
    tau, calls = run(Settings(branching=(2, 1, 1, 1), decide=False))
    decision, threshold = train(records, 0.05)
    less_tau, less_calls = run(
        Settings(branching=(2, 1, 1, 1), decision=decision, threshold=threshold)
    )
    assert less_calls < 0.93 * calls and less_tau > 0.9 * tau
    assert less_calls / calls < less_tau / tau


def test_fit_recovers_a_planted_model() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 5, generator=generator, dtype=torch.float64)
    planted = Decision((1.0, -0.5, 0.0, 0.25, 0.75, -0.3))
    y = torch.rand(40_000, generator=generator) < planted(x)
    assert Decision.fit(x, y).weights == pytest.approx(planted.weights, abs=0.06)
    sure = Decision.fit(torch.eye(5), torch.ones(5))  # separable, yet finite
    assert max(map(abs, sure.weights)) < 10
    with pytest.raises(InvalidInputError, match="recorded"):
        Decision.fit(torch.zeros(0, 5), torch.zeros(0))


@pytest.mark.parametrize(("candidates", "kept"), [(1, True), (3, False)])
def test_choosing_among_target_roots_changes_the_law(candidates: int, kept: bool) -> None:
    """With one candidate there is nothing to choose: that is the lossless reading."""
    choice = Settings(branching=(candidates, 2), decide=False, target_roots=True)
    drafter = MultiCandidate(TableTarget(3, seed=2), choice)
    assert isinstance(drafter.acceptance, FurthestRoot) and not drafter.acceptance.lossless
    result = string_test(
        Fixed(drafter, drafter.default_shape),
        target=TableTarget(3, seed=1, sharpness=1.2),
        law=Law(temperature=1.0),
        acceptance=drafter.acceptance,
        tokens=5,
        rows=1500,
    )
    assert (result.p > 1e-4) == kept and result.impossible == 0


def test_contract_with_target_roots() -> None:
    model = TableTarget(11, seed=4, sharpness=1.5, order=2)
    choice = Settings(branching=(3, 2), target_roots=True)
    check_drafter(lambda: MultiCandidate(model, choice), shapes=(Shape(6, 2, 3),))


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_greedy_output_of_a_network(name: str) -> None:
    drafter = MultiCandidate(tiny.target(name, "float64", noise=0.3), Settings(threshold=0.1))
    got = tiny.generate(name, "float64", Fixed(drafter, drafter.default_shape), 12, [0, 1, 2])
    for row, result in enumerate(got):
        want = tiny.reference(name, "float64", 12)[row]
        tiny.assert_same(name, "float64", row, result.tokens, want)
    assert sum(r.stats.accepted for r in got) > 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="chance"):
        MultiCandidate(DRAFT, Settings(threshold=1.5))
    with pytest.raises(InvalidInputError, match="positive"):
        MultiCandidate(DRAFT, Settings(branching=(2, 0)))
