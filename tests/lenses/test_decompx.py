"""DecompX: scores add up to the logits, and say what a model that only adds words must say."""

import pytest
import torch
from test_decompose import model
from test_sites import made

from isthmus.claims import Ruler
from isthmus.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from isthmus.models.hub import Checkpoint, load_classifier
from isthmus.systems.lenses.decompx import Decompx, Settings, claim
from isthmus.testing import check_lens
from isthmus.workbench import topics

IDS = torch.tensor([[1, 9, 33, 7, 12], [1, 9, 9, 40, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


@pytest.mark.parametrize("name", ["Bert", "PreNorm"])
def test_scores_add_up_to_the_logits_in_padded_batches_too(name):
    inside = model(name)
    for settings in (Settings(), Settings(bias="source", activation="tangent")):
        found = Decompx(settings).scores(inside, INPUTS)
        assert max(found.errors) < 1e-12
        assert torch.allclose(found.tokens.sum(1), found.logits)
        assert float(found.tokens[1, 4].abs().max()) == 0.0  # padding adds nothing
    alone = Decompx().scores(inside, {k: v[1:, :4] for k, v in INPUTS.items()})
    both = Decompx().scores(inside, INPUTS)
    assert torch.allclose(both.tokens[1:, :4], alone.tokens, atol=1e-9)


def test_a_token_that_alone_moves_the_logits_gets_them():
    # Attention by an even pattern and everything else linear: a token's score is what the logits
    # lose when its value is taken out, and the class token's own embedding is the rest.
    inside = model("PreNorm")
    with torch.no_grad():
        for name, p in inside.named_parameters():
            if "query" in name or "key" in name or "intermediate" in name or "bias" in name:
                p.zero_()
    found = Decompx().scores(inside, {k: v[:1] for k, v in INPUTS.items()})
    order = IDS[:1, [0, 3, 1, 4, 2]]
    moved = Decompx().scores(inside, {"input_ids": order, "attention_mask": order * 0 + 1})
    assert max(found.errors) < 1e-12 and max(moved.errors) < 1e-12
    assert found.layers.shape == (1, 3, 5)
    first = found.layers[0, 0]
    assert float(first[0]) > 0 and float(first[1:].abs().max()) == 0  # a token is its own source


def test_off_the_scores_have_no_sign_and_say_the_same_of_every_class():
    found = Decompx(Settings(propagate=False)).scores(model("Bert"), INPUTS)
    assert float(found.tokens.min()) >= 0
    assert torch.allclose(found.tokens.sum(1), torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(found.tokens[..., 0], found.tokens[..., 2])


def test_the_contract_and_the_door():
    lens = Decompx()
    subject = lens.open(topics.topic_folder(topics.tiny()))
    check_lens(lens, subject, "the harbour was near violin and boat")
    found = lens.explain(subject, "boat near drum")
    table = found.tables["tokens"]
    assert {row["token"] for row in table[:-1]} == {"<cls>", "boat", "near", "drum"}
    assert table[-1]["token"].startswith("sum")
    best = found.inputs[1].split()[1].rstrip(",")
    assert sum(row[best] for row in table[:-1]) == pytest.approx(table[-1][best], abs=1e-6)
    assert 'class="words"' in found.html()
    source = Decompx(Settings(bias="source")).explain(subject, "boat near drum")
    assert source.arrays[f"added to {best}"].labels[0][-1] == "(biases)"


def test_what_cannot_be_taken_apart_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="absdot"):
        Decompx(Settings(bias="abs"))
    with pytest.raises(UnknownNameError, match="origin"):
        Decompx(Settings(activation="zero"))
    with pytest.raises(UnsupportedModelError, match="every token"):
        Decompx().scores(model("BertMLM"), INPUTS)
    folder = topics.topic_folder(topics.tiny())
    subject = load_classifier(folder)
    with pytest.raises(InvalidInputError, match="no tokens"):
        Decompx().explain(subject, " ")
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        Decompx().explain(Checkpoint(subject.model, None, "x"), "boat")
    made("Roberta").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="lacks classifier"):
        load_classifier(str(tmp_path))
    made("GPT2").save_pretrained(tmp_path / "gpt")
    with pytest.raises(UnsupportedModelError, match="classifies no image"):
        load_classifier(str(tmp_path / "gpt"), "image")


def test_planted_texts_are_what_they_say():
    drawn = topics.texts(50)
    assert drawn.ids.shape == (50, 25) and drawn.planted.sum(1).tolist() == [3] * 50
    words = [[topics.WORDS[i] for i in row] for row in drawn.ids.tolist()]
    for row, topic, planted in zip(
        words, drawn.topic.tolist(), drawn.planted.tolist(), strict=True
    ):
        counts = [sum(w in names.split() for w in row) for names in topics.TOPICS.values()]
        assert sorted(counts) == [0, 1, 2, 3] and counts[topic] == 3
        told = list(topics.TOPICS.values())[topic].split()
        assert [w in told for w in row] == planted
    assert torch.equal(topics.texts(5).ids, drawn.ids[:5])


def test_the_claim_runs_and_its_identities_hold():
    found = claim(Ruler(), "test")
    assert [gate.passed for gate in found.gates[:2]] == [True, True]
