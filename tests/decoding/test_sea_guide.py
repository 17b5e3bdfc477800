import random

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.claims import Status
from isthmus.decoding.fast import FastTarget
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.target import HubTarget, join_features
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.metrics.chrf import chrf
from isthmus.metrics.slots import slot_error_rate, slot_errors
from isthmus.roles import Context, Features, Forkable, Hypothesis, Rerank, Reshape, Taps
from isthmus.systems.decoding.sea_guide import Mentions, SeaGuide, Settings, examine, token_spans
from isthmus.workbench import slots as data
from isthmus.workbench._tasks import SlotsCourse
from isthmus.workbench.reference import RECIPES

ENCODERS = ("T5", "Bart", "Marian", "Whisper")
ACROSS = Taps(cross_attention=True)


def eager(name):
    model = tiny.fresh(name)
    model.set_attn_implementation("eager")
    return model


def source(name):
    if name == "Whisper":
        return {"input_features": tiny.features(name, "float64")}
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    return {"input_ids": torch.arange(3, 12).view(3, 3), "attention_mask": mask}


@pytest.mark.parametrize("name", ENCODERS)
def test_cross_attention_is_that_of_the_model_at_every_node_of_a_tree(name):
    model, given = eager(name), source(name)
    session = HubTarget(model).session(3, **given)
    read = session.prefill([torch.tensor([1, 5, 9])] * 3, taps=ACROSS).cross_attention
    tree = TokenTree(torch.tensor([[4, 5, 6]] * 3), Topology.of([-1, 0, 0]))
    seen = session.score(tree, taps=ACROSS | Taps(final=True)).features
    with torch.no_grad():
        for node, path in ((0, [4]), (1, [4, 5]), (2, [4, 6])):
            ids = torch.tensor([[1, 5, 9, *path]] * 3)
            out = model(**given, decoder_input_ids=ids, output_attentions=True)
            want = torch.stack(out.cross_attentions, 1)  # [B, L, H, N, S]
            torch.testing.assert_close(seen.cross_attention[:, node], want[..., -1, :])
            torch.testing.assert_close(read, want[..., :3, :].permute(0, 3, 1, 2, 4))
    assert seen.final is not None and seen.cross_attention.sum(-1).allclose(seen.final.new_ones(()))


def test_who_has_no_attention_weights_says_so():
    for target in (HubTarget(tiny.fresh("Bart")), HubTarget(eager("Llama"))):
        given = source("Bart") if target.encoder_decoder else {}
        session = target.session(3, **given)
        with pytest.raises(UnsupportedModelError, match="eager"):
            session.prefill([torch.tensor([1])] * 3, taps=ACROSS)


def test_the_compiled_forward_says_so():
    try:
        target = FastTarget(tiny.network("Bart", "float32"))
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    session = target.session(3, **source("Bart"))
    with pytest.raises(UnsupportedModelError, match="fast=False"):
        session.prefill([torch.tensor([1])] * 3, taps=ACROSS)


def test_taps_and_features_carry_it():
    assert ACROSS and not Taps() and (Taps(layers=(1,)) | ACROSS) == Taps(False, (1,), True)
    parts = [Features(cross_attention=torch.rand(2, n, 1, 1, 4)) for n in (1, 2)]
    joined = join_features(parts)
    assert joined.cross_attention.shape == (2, 3, 1, 1, 4)
    assert joined.map(lambda x: x[1:]).cross_attention.shape == (1, 3, 1, 1, 4)


# one row: "food" at token 1, a list at 3 and 4, something true or false at 6; 0 and 7 are no words
SLOTS = [[("food", [(0, 1)]), ("areas", [(1, 2), (2, 3)]), ("family", [(3, 4)])]]


def watching(**settings):
    spans = torch.zeros(1, 4, 8, dtype=torch.bool)
    for place, token in enumerate((1, 3, 4, 6)):
        spans[0, place, token] = True
    specials = torch.zeros(1, 8, dtype=torch.bool)
    specials[0, [0, 7]] = True
    watch = Mentions(SLOTS, spans, specials, [2], Settings(**settings))
    law = Law(reshapes=[watch])
    watch.begin(
        Context(torch.zeros(1, 9, dtype=torch.int64), [1], [1], law, torch.Generator(), [0]), None
    )
    return watch


def step(watch, weights, ending=False):
    """Weights by (layer, head, token) in 4 layers of 2 heads."""
    tensor = torch.zeros(len(watch.said), 4, 2, 8)
    for (layer, head, token), value in weights.items():
        tensor[:, layer, head, token] = value
    watch.update(tensor, torch.full((len(watch.said),), ending))
    return watch.said[0].int().tolist(), watch.sure[0].int().tolist()


def test_a_sure_mention_is_the_largest_weight_of_the_first_layer():
    watch = watching(likely=0.6)  # which half of 0.95 is not
    assert step(watch, {(0, 1, 1): 0.95, (0, 0, 3): 0.92}) == ([1, 0, 0, 0], [1, 0, 0, 0])
    assert step(watching(), {(0, 1, 1): 0.89}) == ([1, 0, 0, 0], [0, 0, 0, 0])  # 0.89 / 2: likely
    assert step(watching(), {(1, 1, 1): 0.5}) == ([0, 0, 0, 0], [0, 0, 0, 0])  # 0.25


def test_a_likely_mention_is_a_mean_over_the_lower_half():
    weights = {(0, 0, 3): 0.4, (1, 1, 3): 0.2, (0, 0, 4): 0.3, (1, 0, 4): 0.28, (2, 0, 6): 1.0}
    assert step(watching(), weights) == ([0, 1, 0, 0], [0, 0, 0, 0])  # 0.3, 0.29, the upper half
    assert step(watching(likely=0.29), weights)[0] == [0, 1, 1, 0]


def test_before_the_end_what_is_looked_at_was_forgotten_unless_it_is_sure():
    watch = watching()
    step(watch, {(0, 0, 1): 0.95})
    step(watch, {(0, 0, 6): 0.5, (1, 0, 6): 0.5})
    assert watch.said[0].int().tolist() == [1, 0, 0, 1]
    said, sure = step(watch, {(3, 0, 6): 0.4, (3, 1, 1): 0.4, (0, 0, 3): 0.7}, ending=True)
    assert said == [1, 0, 0, 0] and sure == [1, 0, 0, 0]  # 0.7 / 4 mentions nothing at an end


def test_special_tokens_are_not_looked_at():
    assert step(watching(), {(0, 0, 0): 1.0, (0, 0, 1): 0.9})[1] == [1, 0, 0, 0]


def test_flags_go_with_the_beams():
    watch = watching()
    step(watch, {(0, 0, 1): 0.95})
    watch.fork([0, 0], [0, 1])
    tensor = torch.zeros(2, 4, 2, 8)
    tensor[1, 0, 0, 6] = 0.95
    watch.update(tensor, torch.zeros(2, dtype=torch.bool))
    watch.fork([1, 1, 0], [0, 1, 2])
    assert watch.said.int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]]
    assert isinstance(watch, Reshape) and isinstance(watch, Forkable)


def test_several_tokens_at_once_are_refused():
    tree = TokenTree(torch.tensor([[4, 5]]), Topology.of([-1, 0]))
    with pytest.raises(InvalidInputError, match="token by token"):
        watching()(torch.zeros(1, 2, 9), tree, None)


def test_a_list_is_mentioned_when_all_its_elements_are():
    watch = watching()
    for token in (1, 3, 6):
        step(watch, {(0, 0, token): 0.95})
    context = Context(
        torch.tensor([[1, 5, 0]]), [2], [1], Law(reshapes=[watch]), torch.Generator(), [0]
    )
    root = TokenTree.root(torch.tensor([5]))
    for token, left in ((0, 1), (4, 0)):
        across = torch.zeros(1, 1, 4, 2, 8)
        across[0, 0, 0, 0, token] = 0.95
        context.features = Features(cross_attention=across)
        logits = torch.zeros(1, 1, 9)
        assert watch(logits, root, context) is logits
        assert watch.missing == [{(5,): left}]


WORDS = data.tokenizer()


def test_places_are_found_in_tokens_and_in_parts_of_words():
    one = data.Meaning(
        (("name", ("iron comet",)), ("platforms", ("pc", "wii")), ("family", ("no",)))
    )
    spans = token_spans(WORDS, [one.source], [one.places()], 14)
    assert one.source == "name = iron comet , platforms = pc wii , family = no"
    assert [row.nonzero().flatten().tolist() for row in spans[0]] == [
        [2, 3],
        [7],
        [8],
        [10, 11, 12],
    ]
    shattered = token_spans(WORDS, ["family = no"], [[("family", [(2, 4)])]], 4)
    assert shattered[0, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("slots", [[], [("name", [])], [("name", [(90, 99)])]])
def test_slots_without_a_place_are_refused(slots):
    with pytest.raises(InvalidInputError):
        token_spans(WORDS, ["family = no"], [slots], 4)


@pytest.fixture(scope="module")
def model():
    """The network of the claim before its training, with an end that comes now and then."""
    network = SlotsCourse(RECIPES["slots"]).build().eval()
    network.set_attn_implementation("eager")
    network.generation_config = SlotsCourse(RECIPES["slots"]).generation()
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    return Model(network, WORDS, fast=False)


def meanings(count):
    found = [each.meaning for each in data.examples(count)]
    return [one.source for one in found], [one.places() for one in found]


def test_beams_are_those_of_plain_search_and_only_their_order_changes(model):
    sources, slots = meanings(3)
    guided, off = (
        SeaGuide(model, Settings(width=4, likely=0.1, sure=0.3, guide=guide)).hypotheses(
            sources, slots, max_new_tokens=8
        )
        for guide in (True, False)
    )
    plain = model.generate(sources, strategy="beam", beams=4, max_new_tokens=8)
    for one, ours, kept in zip(plain, guided, off, strict=True):
        assert [h.tokens for h in kept] == [h.tokens for h in one.hypotheses]
        assert {h.tokens for h in ours} == {h.tokens for h in kept}
        left_out = [h.trace["unmentioned"] for h in ours]
        assert left_out == sorted(left_out)
    counts = {h.trace["unmentioned"] for row in off for h in row}
    assert len(counts) > 1  # something was to be sorted


def test_flags_are_those_of_each_answer_read_again(model):
    """What was carried along with the beams is what one pass over each answer shows."""
    sources, slots = meanings(2)
    given = Settings(width=4, likely=0.1, sure=0.3)
    found = SeaGuide(model, given).hypotheses(sources, slots, max_new_tokens=8)
    for text, row, places in zip(sources, found, slots, strict=True):
        starts, inputs = model._sources([text], None)
        spans = token_spans(WORDS, [text], [places], inputs["input_ids"].shape[1])
        special = torch.isin(inputs["input_ids"], torch.tensor(WORDS.all_special_ids))
        for hypothesis in row:
            watch = Mentions([places], spans, special, model._ends(False), given)
            context = Context(torch.zeros(1, 1), [1], [1], Law(), torch.Generator(), [0])
            watch.begin(context, model.target)
            ids = torch.tensor([[int(starts[0]), *hypothesis.tokens[:-1]]])
            encoded = model.target.encode(**inputs)
            scores = model.target.forward(ids, encoded=encoded, taps=ACROSS)
            ends = torch.isin(scores.logits[0].argmax(-1), watch.ends)
            for n in range(ids.shape[1]):
                watch.update(scores.features.cross_attention[:, n], ends[n : n + 1])
            unsaid = (watch.owner[0] & ~watch.said).any(-1).sum()
            assert int(unsaid) == hypothesis.trace["unmentioned"]


def test_one_beam_never_changes_the_text(model):
    sources, slots = meanings(3)
    made = SeaGuide(model, Settings(width=1)).hypotheses(sources, slots, max_new_tokens=8)
    plain = model.generate(sources, strategy="beam", beams=1, max_new_tokens=8)
    assert [row[0].tokens for row in made] == [tuple(one.tokens) for one in plain]


def test_the_choice_is_the_first_of_those_that_leave_least_out(model):
    row = [Hypothesis((i,), 0.0, 0.0, {"unmentioned": n}) for i, n in enumerate((2, 1, 1, 3))]
    assert SeaGuide(model).choose(row) == 1
    assert SeaGuide(model, Settings(guide=False)).choose(row) == 0
    assert isinstance(SeaGuide(model), Rerank)


def test_texts_say_what_they_should_and_training_texts_leave_some_out():
    rng = random.Random(0)
    for number in range(400):
        one = data.meaning(rng)
        text = data.say(one, rng, style=number % 4)
        assert slot_errors(data.wanted(one), data.said(text)) == 0
        assert WORDS.unk_token_id not in WORDS.encode(f"{one.source} {text}")[:-1]
    drawn = data.examples(2000, "train")
    wrong = [slot_errors(data.wanted(e.meaning), data.said(e.target)) for e in drawn]
    assert 0.12 < sum(map(bool, wrong)) / 2000 < 0.18
    held = {e.meaning for e in data.examples(300)}
    assert not held & {e.meaning for e in drawn} and all(data.is_held_out(one) for one in held)


VALUES = st.dictionaries(st.sampled_from("abc"), st.sets(st.sampled_from("xyz"), min_size=1))


@given(VALUES, VALUES)
def test_slot_errors_are_those_of_counting_one_by_one(wanted, said):
    missing = sum(len(wanted.get(s, set()) - said.get(s, set())) for s in "abc")
    assert slot_errors(wanted, wanted) == 0
    assert missing <= slot_errors(wanted, said) <= missing + sum(map(len, said.values()))
    assert slot_errors(wanted, {}) == missing + sum(
        len(wanted.get(s, set()) & said.get(s, set())) for s in "abc"
    )


def test_slot_error_rate_of_nothing_is_none():
    assert slot_error_rate([]) == 0.0


def test_chrf_is_that_of_sacrebleu():
    # sacrebleu 2.6.0: CHRF().corpus_score(texts, references by column)
    texts = ["the cat sat on a mat .", "good games are fun to play"]
    references = [
        ["a cat sat on the mat .", "the cat is here"],
        ["fun games are good", "play games"],
    ]
    assert chrf(texts, references) == pytest.approx(57.58192067806218)


def test_the_claim_on_an_untrained_model(model):
    found = examine(model, "test", tuned_on=2, count=3)
    gates = {gate.name: gate for gate in found.gates}
    assert gates["idea off: SER as the beam"].passed
    assert found.status is not Status.REPRODUCED
