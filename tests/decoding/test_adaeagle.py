"""AdaEAGLE: planned lengths, labels at every place, and the policy in the loop."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trained_checks as checks

from isthmus.decoding.feature_drafter import relative_cost
from isthmus.decoding.policy import Fixed
from isthmus.decoding.survey import survey
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.roles import Shape
from isthmus.systems.speculative.adaeagle import Adaeagle, Settings
from isthmus.systems.speculative.eagle import Eagle
from isthmus.systems.speculative.eagle import Settings as Settings_
from isthmus.testing import check_policy
from isthmus.training.drafting import read

PROMPTS = torch.stack([torch.arange(3 + i, 11 + i) * 5 % 60 + 3 for i in range(6)])


@pytest.fixture(scope="module")
def drafter() -> Any:
    """A drafter that is often right, though not always: it learned these very answers."""
    drafter = checks.make(Eagle, Settings_(noise=0.0))
    results = tiny.facade("Llama", "float64").generate(
        list(PROMPTS), max_new_tokens=32, drafter="none", ignore_end=True
    )
    ids = torch.stack(
        [torch.cat([p, torch.tensor(r.tokens)]) for p, r in zip(PROMPTS, results, strict=True)]
    )
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    for _ in range(40):
        batch = read(drafter, ids[:4], torch.Generator().manual_seed(0))
        drafter.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter.eval()


def policy_of(drafter: Any, **settings: Any) -> Adaeagle:
    torch.manual_seed(3)
    return Adaeagle(drafter, Settings(longest=4, **settings))


def test_plan_by_hand(drafter: Any) -> None:
    chances = torch.tensor([[0.9, 0.6, 0.5, 0.4], [0.2, 0.1, 0.1, 0.0], [1.0, 1.0, 1.0, 1.0]])
    # c = 0.4: 1.9/1.4, 2.5/1.8, 3.0/2.2, 3.4/2.6; then 1.2/1.4 is the best of a bad lot
    assert policy_of(drafter, cost=0.4).plan(chances).tolist() == [2, 1, 4]
    assert policy_of(drafter, cost=0.0).plan(chances[[0, 2]]).tolist() == [4, 4], "drafts are free"
    assert policy_of(drafter, cost=0.4, cost_aware=False).plan(chances).tolist() == [2, 1, 4]
    assert policy_of(drafter, adaptive=False).plan(chances).tolist() == [4, 4, 4]
    falls = policy_of(drafter).chances(torch.randn(9, 64).double())
    assert bool((falls.diff(dim=-1) <= 0).all())


def test_a_perfect_predictor_is_the_oracle(drafter: Any) -> None:
    rounds = survey(drafter, PROMPTS, 10, 4)
    perfect = (rounds.accepted[..., None] >= torch.arange(1, 5)).double()
    plan = policy_of(drafter, cost=0.3).plan(perfect)
    assert torch.equal(plan, rounds.accepted.clamp(min=1))

    def speed(lengths: torch.Tensor) -> float:
        tokens, forwards, drafted = rounds.count(lengths)
        return tokens / (forwards + 0.3 * drafted)

    fixed = [speed(torch.full_like(plan, k)) for k in range(1, 5)]
    assert speed(plan) >= max(fixed)


def test_the_survey_is_what_decoding_does(drafter: Any) -> None:
    """Following the counted places gives the rounds of real decoding."""
    rounds = survey(drafter, PROMPTS, 12, 4)
    assert rounds.inputs.shape == (6, 12, 64) and rounds.chance.shape == (6, 12, 4)
    assert len(rounds.accepted.unique()) > 2, "labels of one kind would prove nothing"
    assert bool((rounds.chance.diff(dim=-1) <= 0).all())
    model = tiny.facade("Llama", "float64")
    for k in (2, 4):
        options = {"drafter": Fixed(drafter, Shape(k, k, 1)), "ignore_end": True}
        for row in range(0, 6, 2):
            result = model.generate(PROMPTS[row], max_new_tokens=30, **options)
            place, steps = 0, []
            for trace in result.rounds:
                if place < 12:
                    steps.append(trace.accepted)
                    assert trace.accepted == min(k, int(rounds.accepted[row, place]))
                    place += trace.emitted
        tokens, forwards, drafted = rounds.count(torch.full_like(rounds.accepted, k))
        assert drafted == k * forwards and tokens >= 6 * 12


def test_it_learns_who_stands(drafter: Any) -> None:
    rounds = survey(drafter, PROMPTS, 12, 4)
    policy = policy_of(drafter).learn(rounds, steps=200)
    with torch.no_grad():
        chances = policy.chances(rounds.inputs)
    truth = (rounds.accepted[..., None] >= torch.arange(1, 5)).double()
    assert float((chances - truth).square().mean()) < 0.5 * float(truth.flatten(0, 1).var(0).mean())
    one, two = (policy_of(drafter).learn(rounds, steps=5) for _ in range(2))
    assert torch.equal(one.predictor[0].weight, two.predictor[0].weight)


def test_in_the_loop(drafter: Any) -> None:
    """Output is plain, chains have the planned lengths, a threshold shortens them."""
    plain = [r.tokens for r in tiny.generate("Llama", "float64", "none", 12, [0, 1, 2])]
    drafted = {}
    for name, settings in (
        ("on", {}),
        ("off", {"adaptive": False}),
        ("unsure", {"adaptive": False, "threshold": 0.99}),
    ):
        policy = policy_of(drafter, **settings)
        results = tiny.generate("Llama", "float64", policy, 12, [0, 1, 2])
        assert [r.tokens for r in results] == plain
        drafted[name] = [t.nodes for t in results[0].rounds]
    assert drafted["off"][0] == 4 and max(drafted["unsure"]) == 1
    policy = policy_of(drafter, cost=0.3)
    (alone,) = tiny.generate("Llama", "float64", policy, 12, [1])
    rounds = survey(drafter, tiny.prompts()[1][None], 12, 4)
    with torch.no_grad():
        planned = policy.plan(policy.chances(rounds.inputs))[0]
    place = 0
    for trace in alone.rounds:
        assert trace.nodes == min(int(planned[place]), 12 - place - 1)
        place += trace.emitted


def test_contract(drafter: Any) -> None:
    check_policy(policy_of(drafter, cost=0.3), target=drafter.target, tokens=12)


def test_cost_by_hand(drafter: Any) -> None:
    own = sum(p.numel() for p in drafter.parameters()) + 64 * 32
    whole = sum(p.numel() for p in drafter.target.model.parameters()) - 64 * 32
    assert relative_cost(drafter) == own / whole
    with pytest.raises(InvalidInputError, match="longest"):
        Adaeagle(drafter, Settings(longest=0))
    with pytest.raises(InvalidInputError, match="train"):
        Adaeagle.for_model(None)


def test_files(drafter: Any, tmp_path: Path) -> None:
    policy, folder = policy_of(drafter, cost=0.3), tmp_path / "ada"
    policy.save_pretrained(folder)
    policy.save_pretrained(folder)  # a newer one takes its place
    again = Adaeagle.from_pretrained(folder, drafter.target)
    assert again.settings == policy.settings and again.drafter.settings == drafter.settings
    x = torch.randn(5, 64).double()
    assert torch.equal(again.chances(x), policy.chances(x))
    with pytest.raises(MismatchError):
        Adaeagle.from_pretrained(folder / "drafter", drafter.target)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BrokenFileError, match="altered"):
        Adaeagle.from_pretrained(folder, drafter.target)
