"""RASP: programs give what plain Python gives, and need the layers and heads of the paper."""

import random

import pytest

from isthmus.cli.main import main
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.lenses.rasp import (
    aggregate,
    indices,
    layers_heads,
    length,
    select,
    selector_width,
    tokens,
)
from isthmus.systems.lenses.rasp import PROGRAMS, Rasp, Settings
from isthmus.testing import check_lens
from isthmus.training.loop import Plan
from isthmus.workbench.tagging import Tagger


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_what_plain_python_says(name):
    program, rng = PROGRAMS[name], random.Random(1)
    op = program.make()
    for _ in range(150):
        text = rng.choices(program.alphabet, k=rng.randint(1, 14))
        assert op.run(text) == program.oracle(text), text
    needed = layers_heads(op)
    assert (len(needed), max(needed)) == program.size


def test_the_interpreter_by_hand():
    assert (indices + 1).run("abc") == [1, 2, 3]
    assert (10 - indices * 2).run("ab") == [10, 8]
    assert ((tokens == "a") & (indices > 0) | (tokens == "c")).run("aac") == [False, True, True]
    assert (~(tokens == "a")).run("ab") == [False, True]
    assert length.run("abcd") == [4, 4, 4, 4]
    before = select(indices, indices, "<")
    assert aggregate(before, indices, default=-1).run("abcd") == [-1, 0, 0.5, 1]
    assert selector_width(before).run("abc") == [0, 1, 2]
    assert selector_width(~before).run("abc") == [3, 2, 1]
    assert selector_width(select(tokens, "z")).run("ab") == [0, 0]
    assert aggregate(select(indices, 0), tokens).run("xy") == ["x", "x"]
    assert aggregate(select(tokens, "z"), tokens, default=None).run("xy") == [None, None]


def test_layers_and_heads_follow_from_what_depends_on_what():
    before, same = select(indices, indices, "<"), select(tokens, tokens)
    one = aggregate(before, 1) + aggregate(select(indices, indices, "<"), tokens == "a")
    assert layers_heads(one) == [1]  # equal selectors share a head
    assert layers_heads(aggregate(before, 1) + aggregate(same, 1)) == [2]
    assert layers_heads(aggregate(select(aggregate(before, indices), indices), tokens)) == [1, 1]
    assert layers_heads(tokens == "a") == []  # a feed-forward is free


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidInputError, match="have no mean"):
        aggregate(select(1, 1), tokens).run("ab")
    with pytest.raises(InvalidInputError, match="sequence is empty"):
        length.run("")
    with pytest.raises(InvalidInputError, match="cannot compare"):
        select(tokens, indices, "<") and aggregate(select(tokens, indices, "<"), 1).run("ab")
    with pytest.raises(InvalidInputError, match="does not fit its values"):
        (tokens - 1).run("ab")
    with pytest.raises(InvalidInputError, match="only on a sequence"):
        if tokens == "a":
            pass
    with pytest.raises(UnknownNameError, match="comparison"):
        select(tokens, tokens, "=")


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_contract(name):
    lens = Rasp()
    given = {"dyck1": "(())(", "dyck2": "([])("}.get(name, "hello")
    check_lens(lens, lens.open(name), given)


def test_the_explanation_shows_values_and_grids(capsys, tmp_path):
    lens = Rasp()
    found = lens.explain(lens.open("reverse"), "abc")
    grid = found.arrays["layer 2, head 2"]
    assert grid.values.tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert [row["output"] for row in found.tables["values"]] == ["c", "b", "a"]
    assert found.trusted and found.to_dict()["target"] == "reverse needs 2 layers of [1, 1] heads"
    with pytest.raises(InvalidInputError, match=r"reads \( \) only"):
        lens.explain(lens.open("dyck1"), "(x)")
    with pytest.raises(UnknownNameError, match="did you mean 'reverse'"):
        lens.open("revers")
    out = tmp_path / "page.html"
    assert main(["explain", "sort", "cab", "--lens", "rasp", "-o", str(out)]) == 0
    assert "sort needs 2 layers" in capsys.readouterr().out and "<svg" not in out.read_text()
    assert main(["explain", "sort", "cab", "--lens", "rasp", "-o", str(tmp_path / "x.txt")]) == 2
    assert "neither a page nor a picture" in capsys.readouterr().err
    assert main(["explain", "sort", "cab", "--lens", "marian"]) == 2
    assert "is no lens; there are" in capsys.readouterr().err
    assert main(["explain", "sort", "cab", "--lens", "rasp", "--set", "depth=2"]) == 2
    assert "no setting 'depth'" in capsys.readouterr().err
    assert main(["explain", "sort", "cab", "--lens", "rasp", "--json"]) == 0
    assert '"method": "rasp"' in capsys.readouterr().out


def test_a_network_learns_from_examples_of_a_program():
    program = PROGRAMS["histogram"]
    tagger = Tagger(program.alphabet, program.oracle, 1, 1, width=16)
    given, wanted = tagger.draw(4, "x")
    assert given.shape == wanted.shape == (4, 13) and given[:, 0].tolist() == [1] * 4
    assert ((wanted >= 0) == (given > 1)).all()
    plan = Plan(30, learning_rate=3e-3)
    chance = Rasp(Settings(layers=1)).learn(PROGRAMS["histogram"], Plan(1), 16)
    assert Rasp().learn(PROGRAMS["histogram"], plan, 16) > chance + 0.1
