import json

import pytest

from isthmus.errors import BrokenFileError, DivergedError, InvalidInputError
from isthmus.laws.fit import read_runs
from isthmus.laws.sweep import Sweep

CONFIGS = [{"n": n, "seed": 0} for n in (8, 2, 4)]


def making(path, fail=()):
    calls = []

    def train(config):
        calls.append(config["n"])
        if config["n"] in fail:
            raise DivergedError("the loss of step 3 is not finite (nan)")
        return {"loss": 1.0 + 1 / config["n"], "compute": 2.0 * config["n"]}

    return Sweep(path, train, cost=lambda c: c["n"]), calls


def test_cheap_runs_come_first_and_each_is_done_once(tmp_path):
    path = tmp_path / "runs.jsonl"
    sweep, calls = making(path)
    sweep.run(CONFIGS[:2])
    runs = sweep.run(CONFIGS)
    assert calls == [2, 8, 4]
    assert [run["n"] for run in runs] == [2, 4, 8]
    assert len(path.read_text().splitlines()) == 3
    assert [run["n"] for run in making(path)[0].run(CONFIGS, budget_s=0.0)] == [2, 4, 8]


def test_a_budget_ends_the_sweep_before_a_run(tmp_path):
    sweep, calls = making(tmp_path / "runs.jsonl")
    assert sweep.run(CONFIGS, budget_s=0.0) == []
    assert calls == []


def test_what_diverged_stays_in_the_file_and_out_of_the_law(tmp_path):
    path = tmp_path / "runs.jsonl"
    sweep, _ = making(path, fail=(4,))
    told = {run["n"]: run["diverged"] for run in sweep.run(CONFIGS)}
    assert told == {2: False, 4: True, 8: False}
    runs = read_runs(path, over=["n"])
    assert runs.x.ravel().tolist() == [2, 8]
    assert runs.compute.tolist() == [4, 16]
    assert read_runs(path).variables == ("n",)


def test_other_errors_of_a_training_are_told(tmp_path):
    def train(config):
        raise InvalidInputError("no such thing")

    with pytest.raises(InvalidInputError, match="no such thing"):
        Sweep(tmp_path / "runs.jsonl", train, cost=lambda c: 1).run(CONFIGS)


@pytest.mark.parametrize("text", ["{", json.dumps({"loss": 1})])
def test_another_file_is_left_alone(tmp_path, text):
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(BrokenFileError, match=r"runs\.jsonl"):
        making(path)[0].run(CONFIGS)
    assert path.read_text() == text
