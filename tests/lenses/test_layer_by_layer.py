"""Layer by layer: padding changes nothing, and the choice is the largest of its measure."""

import pytest
import torch

from isthmus.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from isthmus.lenses import geometry
from isthmus.models.hub import Checkpoint
from isthmus.systems.lenses.layer_by_layer import LayerByLayer, Settings, _planted
from isthmus.testing import check_lens
from isthmus.workbench import labelled

TEXTS = (
    "def add(a, b):\nreturn the value of an attribute\nimport os\nfor name in names: print(name)"
)
LINES = TEXTS.split("\n")


@pytest.fixture(scope="module")
def subject():
    return LayerByLayer().open("")


def test_means_and_paths_are_those_of_one_text_alone(subject):
    lens = LayerByLayer(Settings(tokens=5))
    means, paths = lens.vectors(subject, LINES)
    sites = lens.know(subject.model)
    assert next(iter(sites)) == "embeddings" and list(sites)[-1] == "final norm"
    ids = torch.tensor([subject.tokenizer(LINES[1]).input_ids])
    with torch.no_grad():
        fresh = lens.open("").model  # transformers leaves hooks of its own on what it asks
        states = fresh(ids, output_hidden_states=True).hidden_states
    assert means.shape == (8, 4, 320)
    for i, state in enumerate(states[:-1]):  # transformers puts the last one through the norm
        assert torch.allclose(means[i, 1], state[0].mean(0), atol=1e-4)
    assert torch.allclose(means[-1, 1], states[-1][0].mean(0), atol=1e-4)
    long = [len(subject.tokenizer(t).input_ids) >= 5 for t in LINES]
    assert paths["curvature"].shape == (8, sum(long)) and long[1]
    want = geometry.curvature(states[3][0, :5])
    assert float(paths["curvature"][3, sum(long[:1])]) == pytest.approx(float(want), abs=1e-4) or (
        float((paths["curvature"][3] - want).abs().min()) < 1e-4
    )


def test_the_choice_is_the_largest_of_its_measure_and_off_is_the_last(subject):
    for choose in ("dime", "infonce"):
        found = LayerByLayer(Settings(choose=choose)).measure(subject, LINES)
        assert found.values[choose][found.chosen] == max(found.values[choose])
    assert LayerByLayer(Settings(choose="last")).measure(subject, LINES).chosen == 7


def test_the_contract_and_texts_from_a_file(subject, tmp_path):
    lens = LayerByLayer()
    check_lens(lens, subject, TEXTS)
    (tmp_path / "texts.txt").write_text(TEXTS + "\n\n")
    found = lens.explain(subject, str(tmp_path / "texts.txt"))
    assert found.inputs[0].startswith("4 texts") and len(found.tables["layers"]) == 8
    assert sum(row["taken"] == "yes" for row in found.tables["layers"]) == 1
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match="UTF-8"):
        lens.explain(subject, str(tmp_path / "bad.txt"))


def test_what_cannot_be_measured_is_refused(subject):
    with pytest.raises(InvalidInputError, match="one text a line"):
        LayerByLayer().explain(subject, "alone")
    with pytest.raises(UnknownNameError, match="dime"):
        LayerByLayer(Settings(choose="dame"))
    with pytest.raises(InvalidInputError, match="three tokens"):
        LayerByLayer(Settings(tokens=2))
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        LayerByLayer().explain(Checkpoint(subject.model, None, "x"), TEXTS)
    from test_sites import made

    with pytest.raises(UnsupportedModelError, match="one stack"):
        LayerByLayer().know(made("T5"))


def test_measures_of_planted_clouds():
    assert _planted() < 1e-6


def test_tasks_are_split_by_what_must_not_be_in_two_parts():
    data = labelled.task("language", (30, 15, 15))
    parts = {
        part: {t for t, s in zip(data.texts, data.split, strict=True) if s == part}
        for part in labelled.PARTS
    }
    assert [len(parts[p]) for p in labelled.PARTS] == [30, 15, 15]
    assert not parts["train"] & (parts["test"] | parts["validation"])
    known = {lab for lab, s in zip(data.labels, data.split, strict=True) if s == "train"}
    assert set(data.labels) == known
    assert data == labelled.task("language", (30, 15, 15))
    with pytest.raises(UnknownNameError, match="package"):
        labelled.task("packages")
    assert labelled.noisy("ab", "0") != "ab" and labelled.noisy("a", "0") == "a"
