import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_learner import Toy

from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError, UnknownNameError
from isthmus.roles import Learner
from isthmus.training.loop import Plan, Trainer
from isthmus.training.optimizers import AdamWScale, optimizer
from isthmus.training.schedules import SCHEDULES, schedule

PLAN = Plan(steps=12, validate_every=5, save_every=3, log_every=1, ema=0.9, learning_rate=1e-2)


def weights(learner):
    return {k: v.clone() for k, v in learner.module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, atol=1e-6):
    return all(torch.allclose(a[k], b[k], atol=atol) for k in a)


def train(plan=PLAN, report=None, learner=None, **options):
    learner = learner or Toy()
    state = Trainer(learner, plan, **options).run(report)
    return weights(learner), state


def test_the_toy_is_a_learner():
    assert isinstance(Toy(), Learner)


def test_training_learns_and_validates_on_the_way():
    _, state = train(dataclasses.replace(PLAN, steps=300, validate_every=100, ema=0))
    errors = [entry["error"] for entry in state.curve]
    assert [entry["step"] for entry in state.curve] == [100, 200, 300]
    assert errors[-1] < 0.6 * errors[0] and errors[-1] < 0.1


def without_clocks(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_an_interrupted_run_goes_on_with_the_same_numbers(tmp_path):
    straight, whole = train(metrics=tmp_path / "a.jsonl")

    def interrupt(now):
        if now.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"state": tmp_path / "run.safetensors", "metrics": tmp_path / "b.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        train(report=interrupt, **options)
    assert options["state"].exists()
    steps = []
    resumed, state = train(report=lambda now: steps.append(now.step), **options)
    assert steps[0] == 5
    assert same(straight, resumed)
    assert state.curve == whole.curve and not options["state"].exists()
    assert without_clocks(tmp_path / "a.jsonl") == without_clocks(tmp_path / "b.jsonl")


def program(told, *before):
    here = Path(__file__).with_name("toy_learner.py")
    return subprocess.run(
        [sys.executable, *before, str(here), json.dumps(told)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_run_ends_in_the_same_weights(tmp_path):
    straight, _ = train()
    told = {
        "plan": dataclasses.asdict(PLAN),
        "state": str(tmp_path / "run.safetensors"),
        "metrics": str(tmp_path / "m.jsonl"),
        "out": str(tmp_path / "out.json"),
    }
    assert program({**told, "die_at": 8}).returncode == -9
    done = program(told)
    assert done.returncode == 0, done.stderr
    got = {k: torch.tensor(v) for k, v in json.loads((tmp_path / "out.json").read_text()).items()}
    assert same(straight, got)
    steps = [json.loads(s)["step"] for s in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert sorted({*steps}) == list(range(1, 13)) and steps == sorted(steps)


def test_accumulation_changes_nothing():
    plan = dataclasses.replace(PLAN, ema=0)
    one, _ = train(plan, learner=Toy(1, dropout=0))
    four, _ = train(dataclasses.replace(plan, accumulate=4), learner=Toy(4, dropout=0))
    assert close(one, four)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(tmp_path, strategy):
    one, _ = train(learner=Toy(1, dropout=0), metrics=tmp_path / "one.jsonl")
    told = {
        "plan": dataclasses.asdict(PLAN),
        "split": 2,
        "dropout": 0,
        "state": str(tmp_path / "run.safetensors"),
        "metrics": str(tmp_path / "two.jsonl"),
        "out": str(tmp_path / "out.json"),
        "options": {"devices": 2, "strategy": strategy},
    }
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    died = program({**told, "die_at": 8}, *launcher)
    assert died.returncode != 0 and (tmp_path / "run.safetensors").exists()
    done = program(told, *launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    got = {k: torch.tensor(v) for k, v in json.loads((tmp_path / "out.json").read_text()).items()}
    assert close(one, got, 1e-5)
    curves = [
        [line["loss"] for line in without_clocks(tmp_path / name) if "loss" in line]
        for name in ("one.jsonl", "two.jsonl")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was(tmp_path):
    state = tmp_path / "run.safetensors"
    with pytest.raises(InvalidInputError, match=r"step 8 is not finite.*keeps the run"):
        train(learner=Toy(poison=7), state=state)
    before = state.read_bytes()
    learner = Toy(poison=7)
    with pytest.raises(InvalidInputError, match="not finite"):
        train(learner=learner, state=state)
    assert state.read_bytes() == before
    assert all(v.isfinite().all() for v in weights(learner).values())


def test_the_best_weights_are_kept_and_patience_ends_a_run():
    plan = Plan(steps=60, validate_every=2, learning_rate=3e-2, schedule="constant")
    learner = Toy()
    values = iter([3.0, 2.0, 1.0, 4.0, 5.0, 6.0])
    seen = []

    def validate():
        seen.append(weights(learner))
        return {"error": next(values)}

    learner.validate = validate
    _, state = train(dataclasses.replace(plan, patience=2), learner=learner)
    assert state.step == 10 and state.best == 1.0 and state.best_step == 6
    kept = {k.removeprefix("_forward_module."): v for k, v in seen[2].items()}
    assert same(kept, weights(learner))


def test_another_plan_is_refused_and_so_is_a_damaged_file(tmp_path):
    state = tmp_path / "run.safetensors"

    def stop(now):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(report=stop, state=state)
    with pytest.raises(MismatchError, match="another plan; repeat the command"):
        Trainer(Toy(), dataclasses.replace(PLAN, learning_rate=0.5), state=state)
    with pytest.raises(MismatchError, match="another learner"):
        Trainer(Toy(dropout=0.5), PLAN, state=state)
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(BrokenFileError, match="damaged; delete"):
        Trainer(Toy(), PLAN, state=state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"ema": 1.0}, "ema must be"),
        ({"learning_rate": -1}, "must be positive"),
        ({"precision": "16-mixed"}, "precision must be"),
    ],
)
def test_a_plan_refuses(change, words):
    with pytest.raises(InvalidInputError, match=words):
        dataclasses.replace(PLAN, **change)


def test_schedules_end_where_they_say():
    ends = {name: f(99, 10, 100) for name, f in SCHEDULES.items()}
    starts = {name: f(0, 10, 100) for name, f in SCHEDULES.items()}
    assert starts.pop("cosine-from-half") == 0.5
    assert all(start == pytest.approx(0.1) for start in starts.values())
    assert ends["constant"] == 1 and ends["linear"] < 0.02 and ends["plateau"] < 0.04
    assert ends["inverse-sqrt"] == pytest.approx((10 / 100) ** 0.5)
    with pytest.raises(UnknownNameError, match="cosine"):
        schedule("cosinus")


def test_adamw_scale_is_adam_where_the_size_is_one():
    torch.manual_seed(0)
    signs = torch.randn(5, 7).sign()  # RMS 1
    a, b = nn.Parameter(signs.clone()), nn.Parameter(signs.clone())
    ours, adam = AdamWScale([a], lr=1e-3), torch.optim.Adam([b], lr=1e-3, eps=1e-12)
    a.grad = b.grad = torch.randn(5, 7)
    ours.step()
    adam.step()
    assert torch.allclose(a, b, atol=1e-6)


def test_adamw_scale_by_hand():
    p = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))  # RMS 2.5
    zero = nn.Parameter(torch.zeros(2, 2))
    p.grad, zero.grad = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.ones(2, 2)
    AdamWScale([p, zero], lr=0.1, eps=0.0001, weight_decay=0.5).step()
    # m = 0.1 g, v = 0.001 g^2; a = 0.1 sqrt(0.001) / 0.1 2.5; decay last: times 0.95
    a = 0.1 * 0.001**0.5 / 0.1 * 2.5
    g = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    want = torch.tensor([[3.0, 4.0], [0.0, 0.0]]) - a * 0.1 * g / (0.001**0.5 * g.abs() + 1e-4)
    assert torch.allclose(p, want * 0.95, atol=1e-6)
    floor = 0.1 * 0.001**0.5 / 0.1 * 1e-3 * 0.1 / (0.001**0.5 + 1e-4)
    assert torch.allclose(zero, torch.full((2, 2), -floor * 0.95), rtol=1e-4)


def test_decay_spares_vectors():
    model = nn.Linear(3, 2)
    groups = optimizer("adamw", model.parameters(), lr=0.1, weight_decay=0.3).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.3), (1, 0.0)]
