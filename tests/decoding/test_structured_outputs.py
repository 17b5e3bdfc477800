"""The measuring tool, on the official suite and against jsonschema itself."""

import json

import jsonschema
import pytest

import isthmus
from isthmus.claims import Ruler
from isthmus.decoding.constraint import UnsupportedConstraint
from isthmus.decoding.model import Model
from isthmus.errors import BrokenFileError
from isthmus.systems.decoding.structured_outputs import Settings, StructuredOutputs, allowed, claim
from isthmus.workbench import calls, schemas
from isthmus.workbench.json_schema_suite import coverage, suite


@pytest.fixture(scope="module")
def model() -> Model:
    return isthmus.load(dtype="float32", device="cpu")


def test_the_suite_agrees_with_jsonschema() -> None:
    groups = suite()
    assert len(groups) == 155
    for group in groups:
        validator = jsonschema.Draft202012Validator(group["schema"])
        for test in group["tests"]:
            assert validator.is_valid(test["data"]) == test["valid"]


def test_nothing_invalid_is_let_through(model: Model) -> None:
    study = StructuredOutputs(model, Settings(canonical=False))
    found = coverage(suite(), study.engine)
    assert found.under == 0
    assert found.declared >= 110 and found.exact >= 95
    loose = StructuredOutputs(model, Settings(canonical=False, lenient=True))
    wider = coverage(suite(), loose.engine)
    assert wider.declared > found.declared and wider.under > 0


def test_twenty_schemas_are_judged_as_jsonschema_judges_them(model: Model) -> None:
    study, agreed = StructuredOutputs(model, Settings(canonical=False)), 0
    for group in suite():
        try:
            accepts = study.engine(group["schema"])
        except UnsupportedConstraint:
            continue
        texts = [json.dumps(test["data"], ensure_ascii=False) for test in group["tests"]]
        valid = jsonschema.Draft202012Validator(group["schema"]).is_valid
        agreed += all(accepts(text) == valid(json.loads(text)) for text in texts)
    assert agreed >= 20


def test_a_coverage_is_counted_by_hand() -> None:
    groups = [
        {"schema": {"a": 1}, "tests": [{"data": 1, "valid": True}, {"data": 2, "valid": False}]},
        {"schema": {"b": 1}, "tests": [{"data": 1, "valid": False}, {"data": 3, "valid": True}]},
        {"schema": {"c": 1}, "tests": [{"data": 1, "valid": True}]},
    ]

    def engine(schema):
        if "c" in schema:
            raise UnsupportedConstraint("c")
        return lambda text: text == "1"

    found = coverage(groups, engine)
    assert (found.groups, found.declared, found.exact) == (3, 2, 1)
    assert (found.under, found.over, found.compliance) == (1, 1, 0.5)


def test_damaged_suites_are_refused(tmp_path) -> None:
    with pytest.raises(BrokenFileError, match="holds no files"):
        suite(tmp_path)
    (tmp_path / "x.json").write_text('[{"schema": 1}]')
    with pytest.raises(BrokenFileError, match="no JSON Schema Test Suite"):
        suite(tmp_path)


def test_own_schemas_are_schemas_and_compile(model: Model) -> None:
    own = schemas.own()
    assert len(own) == 10 and sum(map(len, own.values())) == 40
    for schema in [s for style in own.values() for s in style] + schemas.generated(100):
        jsonschema.Draft202012Validator.check_schema(schema)
        assert model.compile(schema).exact


def test_calls_are_right_answers_to_their_schemas(model: Model) -> None:
    asked = calls.calls(60)
    study = StructuredOutputs(model)
    for one in asked:
        jsonschema.validate(json.loads(one.answer), one.schema)
        assert model.compile(study.spec(one.schema)).accepts(one.answer)
        assert not model.compile(study.spec(one.schema)).accepts(
            one.answer.replace('"name"', '"x"')
        )
    assert calls.exact(asked, [one.answer for one in asked]) == 1.0
    assert calls.exact(asked[:2], [asked[0].answer, "no"]) == 0.5
    train = {head.name for head in calls.heads("train")}
    held_out = {head.name for head in calls.heads("held-out")}
    assert len(train) > 100 and len(held_out) > 10 and not held_out & train


def test_walks_go_round_after_the_end(model: Model) -> None:
    study = StructuredOutputs(model)
    step = study.walker({"enum": [1, 2]})
    for _ in range(20):
        step()
    assert allowed(model.compile(study.spec({"const": 5})).start()) == model.tokenizer.encode("5")


def test_the_claim_runs_small_on_a_model_that_was_never_tuned() -> None:
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    for name, gate in gates.items():
        if "validate" in name or "forced" in name or "strict" in name:
            assert gate.passed, gate
    assert gates["chi-square of masked sampling, p-value"].passed
