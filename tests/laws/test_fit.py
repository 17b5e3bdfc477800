"""Scaling laws: known ones are found again, with honest intervals; bad tables are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from isthmus.cli.main import main
from isthmus.errors import BrokenFileError, InvalidInputError, UnknownNameError
from isthmus.laws.fit import Runs, fit, held_out, profile_floor, read_runs

N = np.repeat(np.geomspace(1e3, 1e8, 6), 5)
D = np.tile(np.geomspace(1e5, 1e10, 5), 6)


def noisy(loss, seed, scale=0.01):
    return loss * np.exp(scale * np.random.default_rng(seed).normal(size=len(loss)))


def test_both_exponents_and_the_floor_are_found_again_under_one_percent_of_noise():
    truth = 1.7 + 40 * N**-0.34 + 90 * D**-0.38
    law = fit(Runs.of({"n": N, "d": D}, noisy(truth, 0)), "additive", draws=40)
    assert law.values["E"].value == pytest.approx(1.7, rel=0.02)
    assert law.values["alpha:n"].value == pytest.approx(0.34, rel=0.1)
    assert law.values["alpha:d"].value == pytest.approx(0.38, rel=0.1)
    assert all(value.identified for value in law.values.values())
    assert law.agreement > 0.5 and law.r2 > 0.999


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    n = np.geomspace(1e3, 1e8, 30)
    truth, held = 1.7 + 40 * n**-0.34, []
    for seed in range(15):
        law = fit(Runs.of({"n": n}, noisy(truth, seed)), "product", draws=60, seed=seed)
        held += [law.values[k].low <= v <= law.values[k].high for k, v in (("E", 1.7),)]
        held += [law.values["alpha:n"].low <= 0.34 <= law.values["alpha:n"].high]
    assert 0.85 <= np.mean(held) <= 1.0
    widths = [law.values["alpha:n"].high - law.values["alpha:n"].low]
    assert max(widths) < 0.05  # and not by being wide


def test_the_law_tells_the_largest_runs_better_than_simple_guesses_do():
    test = held_out(Runs.of({"n": N, "d": D}, noisy(1.7 + 40 * N**-0.34 * D**-0.05, 1)), "product")
    assert test.runs == 7
    assert test.error < 0.5 * min(test.baselines.values())
    assert test.coverage >= 0.75


def test_the_floor_of_a_law_without_floor_is_not_called_identified():
    n = np.geomspace(1e3, 1e6, 12)
    law = fit(Runs.of({"n": n}, noisy(9 * n**-0.3, 2)), "product", draws=40)
    assert not law.values["E"].identified
    assert "not identified" in str(law.values["E"])


def test_the_profile_of_the_floor_is_least_near_the_truth():
    law = fit(Runs.of({"n": N}, noisy(1.7 + 40 * N**-0.34, 3)), "product", draws=5)
    low, true, high = profile_floor(law, [1.2, 1.7, 2.0])
    assert true < 3.84 < min(low, high)
    with pytest.raises(InvalidInputError, match="no floor"):
        profile_floor(fit(law.runs, "power", draws=0), [1.0])


def test_the_best_split_is_where_a_search_finds_it():
    law = fit(Runs.of({"n": N, "d": D}, 0.5 + 70 * N**-0.3 * D**-0.1), "product", draws=0)
    shares = np.linspace(0.01, 0.99, 981)
    told = law.predict({"n": 1e6 * shares, "d": 1e6 * (1 - shares)})
    best = shares[np.argmin([each.value for each in told])]
    assert law.split(1.0)["n"] == pytest.approx(best, abs=0.005) == pytest.approx(0.75, abs=0.01)


def test_seeds_are_drawn_inside_sizes_where_there_are_enough():
    n = np.repeat(np.geomspace(1e3, 1e6, 5), 3)
    # One size is off: runs drawn freely move with it, seeds drawn inside the sizes do not.
    loss = noisy(np.where(n == n.max(), 1.3, 1.0) * 40 * n**-0.34, 4)
    inside, free = (
        fit(Runs.of({"n": n[some]}, loss[some]), "power", draws=60).values["alpha:n"]
        for some in (slice(None), np.arange(len(n)) % 3 < 2)
    )
    assert inside.high - inside.low < 0.5 * (free.high - free.low)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": [1.0, 2.0, np.nan, 1.0, 1.0, 1.0]}, "run 3: loss is nan"),
        ({"loss": [1.0, 2.0, 0.0, 1.0, 1.0, 1.0]}, "run 3: loss is 0"),
        ({"n": [1.0, 2.0, 3.0, 4.0, 5.0, -6.0]}, "run 6: n is -6"),
        ({"n": [1.0, 2.0, 3.0]}, "3 values for 6 losses"),
        ({"n": [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]}, "needs runs of 5 different sizes; there are 3"),
    ],
)
def test_runs_that_carry_no_law_are_refused(change, says):
    columns = {"n": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "loss": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]} | change
    with pytest.raises(InvalidInputError, match=says):
        fit(Runs.of({"n": columns["n"]}, columns["loss"]), "product", draws=0)


def test_no_prediction_far_from_the_runs_unless_forced():
    n = np.geomspace(1e3, 1e6, 8)
    law = fit(Runs.of({"n": n}, 2 + 40 * n**-0.34), "product", draws=5)
    with pytest.raises(InvalidInputError, match="too far from the runs, 1000 to 1e"):
        law.predict({"n": 2e8})
    assert law.predict({"n": 2e8}, force=True)[0].value == pytest.approx(2.06, abs=0.01)
    with pytest.raises(InvalidInputError, match="over n"):
        law.predict({"m": 1e5})


def table(folder: Path, text: str, name: str = "runs.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_tables_are_read_and_bad_ones_refused_by_row(tmp_path):
    rows = [f"{n:.0f},m,{2 + 40 * n**-0.3},0,wide" for n in np.geomspace(1e3, 1e6, 8)]
    path = table(tmp_path, "\n".join(["n,test_set,loss,seed,shape", *rows]))
    assert read_runs(path).variables == ("n",)
    lines = [json.dumps({"n": 10.0**i, "loss": 1 / i}) for i in range(1, 8)]
    assert len(read_runs(table(tmp_path, "\n".join(lines), "runs.jsonl"))) == 7
    mixed = table(tmp_path, path.read_text() + "\n1000,other,3,0,wide", "mixed.csv")
    with pytest.raises(InvalidInputError, match="mixes test_set m, other"):
        read_runs(mixed)
    assert len(read_runs(mixed, where={"test_set": "m"})) == 8
    with pytest.raises(UnknownNameError, match="did you mean 'loss'"):
        read_runs(path, loss="los")
    with pytest.raises(BrokenFileError, match="run 1: shape is 'wide'"):
        read_runs(path, over=["shape"])
    with pytest.raises(BrokenFileError, match="run 2"):
        read_runs(table(tmp_path, "n,loss\n1,2\n3", "short.csv"))
    for empty in ("", "n,loss\n"):
        with pytest.raises(BrokenFileError, match="holds no runs"):
            read_runs(table(tmp_path, empty, "empty.csv"))
    with pytest.raises(BrokenFileError, match="cannot be read"):
        read_runs(tmp_path / "none.csv")


def test_the_command_fits_predicts_and_draws(tmp_path, capsys):
    losses = noisy(1.7 + 40 * N**-0.34 + 90 * D**-0.38, 5)
    rows = [f"{n:.0f},{d:.0f},{y}" for n, d, y in zip(N, D, losses, strict=True)]
    path = table(tmp_path, "\n".join(["params,tokens,loss", *rows]))
    picture = tmp_path / "law.png"
    ask = ["law", "fit", str(path), "--draws", "10", "--predict", "params=1e9,tokens=1e11"]
    assert main([*ask, "-o", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "additive: loss = 1." in said and "at params = 1e+09, tokens = 1e+11" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*ask, "--form", "power", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["form"] == "power" and len(told["predictions"]) == 1
    for wrong, says in (
        (["--predict", "params"], "give sizes"),
        (["--predict", "params=x"], "give sizes"),
        (["--form", "cubic"], "unknown form of law"),
        (["-o", "law.txt"], "is no picture"),
    ):
        assert main(["law", "fit", str(path), *wrong]) == 2
        assert says in capsys.readouterr().err
    assert main(["law", "fti"]) == 2
    assert "did you mean 'fit'" in capsys.readouterr().err
