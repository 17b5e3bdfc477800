"""CODE against its formula, row by row, and on a model whose two prompts agree."""

from __future__ import annotations

import pytest
import tiny
import torch

from isthmus.claims import Ruler
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError
from isthmus.systems.decoding.code_contrast import CodeContrast, Settings, claim, divergence
from isthmus.workbench import captions


def combined(z_v, z_d, **settings):
    rule = CodeContrast(tiny.target("Llama", "float32"), lambda ids: ids, Settings(**settings))
    return rule.combine(torch.tensor([[z_v]]), [torch.tensor([[z_d]])])[0, 0], rule


def test_the_formula_by_hand():
    z_v, z_d = [2.0, 1.0, -1.0], [0.0, 2.0, 1.0]
    p = torch.tensor(z_v, dtype=torch.float64).softmax(0)
    q = torch.tensor(z_d, dtype=torch.float64).softmax(0)
    for kappa in (0.2, 2.0):
        d = (
            sum(
                float((a + b) * torch.log2((a - b).abs() ** kappa + 1))
                for a, b in zip(p, q, strict=True)
            )
            / 2
        )
        found, rule = combined(z_v, z_d, kappa=kappa)
        assert float(rule.divergences) == pytest.approx(d, rel=1e-5)
        for v in range(3):
            if p[v] >= d * p.max():
                assert float(found[v]) == pytest.approx(
                    (2 - d) * z_v[v] - (1 - d) * z_d[v], rel=1e-4
                )
            else:
                assert float(found[v]) < -1_000


def test_equal_laws_change_nothing_and_opposite_ones_leave_the_best_alone():
    found, rule = combined([2.0, 1.0, -1.0], [2.0, 1.0, -1.0])
    assert found.tolist() == [2.0, 1.0, -1.0] and float(rule.divergences) == 0.0
    found, rule = combined([200.0, 0.0, -100.0], [0.0, 200.0, 0.0])
    assert float(rule.divergences) == pytest.approx(1.0)
    assert float(found[0]) == pytest.approx(200.0) and float(found[1:].max()) < 0
    assert divergence(torch.eye(3)[0], torch.eye(3)[2], 0.01) <= 1


def test_a_token_that_cannot_be_said_stays_so_and_others_are_finite():
    found, _ = combined([2.0, float("-inf"), -1.0], [1.0, 3.0, float("-inf")])
    assert found[1] == float("-inf") and found[[0, 2]].isfinite().all()


def test_rows_describe_once_and_do_not_disturb_each_other():
    target = tiny.target("Llama", "float32")
    model, asked = Model(target), []

    def describe(ids):
        asked.append(ids.tolist())
        return ids.flip(0)

    prompts = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    law = lambda: Law(reshapes=[CodeContrast(target, describe)])  # noqa: E731
    told = {"max_new_tokens": 6, "drafter": "none", "ignore_end": True}
    alone = [model.generate(p, law=law(), **told).tokens for p in prompts]
    assert asked == prompts
    together = model.generate(prompts, law=law(), **told)
    assert [g.tokens for g in together] == alone
    drafted = model.generate(prompts, law=law(), **{**told, "drafter": "prompt-lookup"})
    assert [g.tokens for g in drafted] == alone
    off = CodeContrast(target, describe, Settings(contrast=False))
    plain = model.generate(prompts, **told)
    assert [g.tokens for g in model.generate(prompts, law=Law(reshapes=[off]), **told)] == [
        g.tokens for g in plain
    ]


def test_bad_input_is_one_line():
    target = tiny.target("Llama", "float32")
    with pytest.raises(InvalidInputError, match="kappa must be above 0"):
        CodeContrast(target, lambda ids: ids, Settings(kappa=0.0))
    law = Law(reshapes=[CodeContrast(target, lambda ids: ids[:0])])
    with pytest.raises(InvalidInputError, match="description of prompt 0 is empty"):
        Model(target).generate([3, 4], max_new_tokens=2, law=law, drafter="none")


def test_a_description_is_as_long_as_a_prompt():
    scene = captions.Scene((1, 4), (-1, 4, -1, 1, -1))
    assert len(scene.description) == len(scene.prompt)
    assert captions.described([]) == [2 + captions.OBJECTS] * captions.PATCHES + [1]


def test_the_claim_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    made = claim(Ruler(), "test")
    assert made.slug == "code-contrast" and len(made.rows) == 3
    assert {g.name: g for g in made.gates}["idea off: CHAIR_i as greedy"].passed
