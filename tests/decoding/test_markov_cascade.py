import datetime
import itertools

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, MBartConfig
from transformers import MBartForConditionalGeneration as MBart

from isthmus.claims import Ruler
from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.models.hub import load_checkpoint
from isthmus.models.markov import (
    barred,
    blocks,
    check_barriers,
    markov_loss,
    ngram_logprobs,
    within,
)
from isthmus.systems.decoding.markov_cascade import (
    Lengths,
    MarkovCascade,
    Settings,
    claim,
)
from isthmus.workbench import date_phrases, dates

PAD, START, END, A, B, C = range(6)
SIZES = {
    "vocab_size": 6,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 24,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
    "decoder_start_token_id": START,
    "init_std": 0.6,
}


def network(kind=MBart, config=MBartConfig, order=2, seed=0):
    """A Markov transformer with large random weights, so that contexts matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config(**SIZES)).eval().requires_grad_(False)
    model.config.markov_order = order
    return model


MODEL = network()
SOURCE = torch.tensor([[A, B, C, A, END], [C, C, END, PAD, PAD], [B, A, B, END, PAD]])
MASK = (SOURCE != PAD).long()
FOUR = Lengths(0.0, 4.0)


def cascade(model=MODEL, lengths=FOUR, **settings):
    return MarkovCascade(model, None, lengths, Settings(**settings))


@torch.no_grad()
def teacher(model, texts, order, row):
    """Log-probabilities [N] of texts of one length, each token from ``order`` others at most."""
    tokens = torch.tensor(texts)  # [N, L]
    sums = torch.zeros(len(tokens))
    for place in range(tokens.shape[1]):
        first = max(0, place - order)
        # barriers: everything before ``first`` in one block, what may be seen in another
        block = torch.tensor([[int(p >= first) for p in range(place + 1)]])
        ids = torch.nn.functional.pad(tokens[:, :place], (1, 0), value=START)
        logits = model(
            input_ids=SOURCE[row : row + 1].expand(len(tokens), -1),
            attention_mask=MASK[row : row + 1].expand(len(tokens), -1),
            decoder_input_ids=barred(ids, block, START),
            decoder_attention_mask=within(block).expand(len(tokens), -1, -1, -1),
        ).logits[:, -1]
        sums += torch.log_softmax(logits, -1).gather(1, tokens[:, place, None])[:, 0]
    return sums


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("scan", [False, True])
def test_with_all_states_it_is_the_best_text_of_all(rounds, scan):
    """Texts of 3 to 5 letters, enumerated, each scored token by token."""
    found = cascade(states=64, rounds=rounds, window=1, scan=scan).decode(SOURCE, MASK)
    for row in range(2):
        scored = {}
        for length in (3, 4, 5):
            texts = [(*some, END) for some in itertools.product((A, B, C), repeat=length)]
            scored |= zip(texts, teacher(MODEL, texts, rounds - 1, row).tolist(), strict=True)
        best = max(scored, key=scored.__getitem__)
        said = found[0][row].tolist()
        assert tuple(said[: said.index(END) + 1]) == best
        assert set(said[said.index(END) + 1 :]) <= {PAD}
        assert float(found[1][row]) == pytest.approx(scored[best], abs=1e-4)


@pytest.mark.parametrize("states", [2, 3, 5])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_what_is_found_scores_what_it_says_whatever_was_lost(states, rounds):
    tokens, logprobs = cascade(states=states, rounds=rounds, window=2).decode(SOURCE, MASK)
    for row, said in enumerate(tokens.tolist()):
        text = said[: said.index(END) + 1]
        score = teacher(MODEL, [text], rounds - 1, row)
        assert float(logprobs[row]) == pytest.approx(float(score[0]), abs=1e-4)


def test_a_text_does_not_depend_on_those_beside_it():
    lengths = Lengths(2.0, 0.0)
    together = cascade(states=4, rounds=3, lengths=lengths).decode(SOURCE, MASK)
    for row, size in enumerate(MASK.sum(1).tolist()):
        alone = cascade(states=4, rounds=3, lengths=lengths).decode(
            SOURCE[row : row + 1, :size], MASK[row : row + 1, :size]
        )
        assert float(alone[1]) == pytest.approx(float(together[1][row]), abs=1e-5)
        width = alone[0].shape[1]
        assert alone[0][0].tolist() == together[0][row, :width].tolist()
        assert set(together[0][row, width:].tolist()) <= {PAD}


def test_lengths_stay_in_the_window_and_short_texts_are_possible():
    for length, window in ((0.0, 0), (1.0, 0), (1.0, 3), (6.0, 1)):
        lengths = Lengths(0.0, length)
        tokens, logprobs = cascade(states=6, rounds=3, window=window, lengths=lengths).decode(
            SOURCE, MASK
        )
        assert bool(logprobs.isfinite().all())
        for said in tokens.tolist():
            assert abs(said.index(END) - length) <= window and START not in said


@pytest.mark.parametrize("order", [0, 1, 2])
def test_ngrams_in_one_forward_are_ngrams_one_by_one(order):
    generator = torch.Generator().manual_seed(order)
    ngrams = torch.randint(3, 6, (3, 5, 2, order), generator=generator)
    encoded = MODEL.get_encoder()(input_ids=SOURCE, attention_mask=MASK)[0]
    found = ngram_logprobs(MODEL, encoded, MASK, ngrams)
    assert found.shape == (3, 5, 2, 6)
    for row, place, k in itertools.product(range(3), range(5), range(2)):
        ids = torch.tensor([[A] * place + [START, *ngrams[row, place, k].tolist()]])
        block = torch.tensor([[0] * place + [1] * (order + 1)])
        logits = MODEL(
            input_ids=SOURCE[row : row + 1],
            attention_mask=MASK[row : row + 1],
            decoder_input_ids=ids,
            decoder_attention_mask=within(block),
        ).logits[0, -1]
        torch.testing.assert_close(found[row, place, k], torch.log_softmax(logits.float(), -1))


def test_a_slot_sees_its_block_and_nothing_else():
    block = blocks(7, 2, torch.tensor([1]))  # 0 | 1 2 3 | 4 5 6
    tokens = torch.tensor([[START, A, B, C, A, B, C]])

    def logits(ids):
        return MODEL(
            input_ids=SOURCE[:1],
            decoder_input_ids=barred(ids, block, START),
            decoder_attention_mask=within(block),
        ).logits[0]

    plain = logits(tokens)
    for changed in range(1, 7):
        other = tokens.clone()
        other[0, changed] = B if int(tokens[0, changed]) != B else A
        moved = (logits(other) - plain).abs().amax(-1) > 1e-6
        first = int(block[0, changed]) != int(block[0, changed - 1])  # the start token hides it
        want = [
            not first and p >= changed and int(block[0, p]) == int(block[0, changed])
            for p in range(7)
        ]
        assert moved.tolist() == want


def test_an_order_beyond_the_text_is_plain_teacher_forcing():
    tokens = torch.tensor([[START, A, B, C]])
    labels = torch.tensor([[A, B, C, END]])
    found = markov_loss(
        MODEL,
        SOURCE[:1],
        MASK[:1],
        tokens,
        labels,
        torch.tensor([0]),
        order=9,
        label_smoothing=0.0,
    )
    plain = MODEL(input_ids=SOURCE[:1], decoder_input_ids=tokens, labels=labels).loss
    assert float(found.total / found.weight) == pytest.approx(float(plain))


def test_bart_keeps_barriers_too_and_what_says_no_order_is_refused():
    bart = network(BartForConditionalGeneration, BartConfig, order=3)
    assert check_barriers(bart) == 3
    tokens, _ = cascade(bart, states=4, rounds=4).decode(SOURCE, MASK)
    assert all(END in said for said in tokens.tolist())
    del bart.config.markov_order
    with pytest.raises(UnsupportedModelError, match="markov_order"):
        cascade(bart)


def test_a_model_that_ignores_the_mask_is_refused(monkeypatch):
    model = network()
    deaf = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, decoder_attention_mask=None, **k: deaf(*a, **k)
    )
    with pytest.raises(UnsupportedModelError, match="four-dimensional"):
        cascade(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 4}, "at most 3"),
        ({"rounds": 0}, "rounds and batch must be"),
        ({"states": 1}, "states must be"),
        ({"window": -1}, "window must be"),
        ({"rounds": 2, "window": 30}, "places for 24"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        cascade(**settings).decode(SOURCE, MASK)


def test_english_dates_by_hand():
    said = date_phrases.english(datetime.date(2022, 8, 11))
    assert said[2] == "Thursday the 11th of August 2022"
    endings = [
        date_phrases.english(datetime.date(2022, 1, day))[2].split()[2][-2:]
        for day in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 30, 31)
    ]
    assert endings == ["st", "nd", "rd", "th", "th", "th", "th", "st", "nd", "rd", "th", "st"]


def test_phrases_are_about_one_date_and_parts_do_not_meet():
    parts = {split: date_phrases.phrases(200, split) for split in ("train", "held-out")}
    tokenizer = dates.tokenizer()
    for one in itertools.chain(*parts.values()):
        assert len(set(one.targets)) == len(date_phrases.FORMS)
        assert max(map(len, one.targets)) <= date_phrases.LONGEST
        for text in (one.source, *one.targets):
            assert tokenizer.unk_token_id not in tokenizer.encode(text)
    train, held_out = ({one.targets for one in part} for part in parts.values())
    assert not train & held_out


def test_batches_follow_from_the_seed_and_the_step():
    course = date_phrases.PhrasesCourse(date_phrases.tiny(date_phrases.MARKOV))
    steps = course.batches(0)
    next(steps)
    second, again = next(steps), next(course.batches(1))
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
    assert set(torch.cat([next(steps)[-1] for _ in range(20)]).tolist()) == {0, 1, 2, 3, 4}
    plain = date_phrases.PhrasesCourse(date_phrases.tiny(date_phrases.PLAIN))
    assert not next(plain.batches(0))[-1].any()


def test_a_trained_folder_knows_its_order_and_writes_texts():
    recipe = date_phrases.tiny(date_phrases.MARKOV)
    found = load_checkpoint(str(date_phrases.reference(recipe)), dtype="float32")
    system = MarkovCascade(
        found.model, found.tokenizer, Lengths(0.0, 20.0), Settings(states=4, rounds=2)
    )
    sources = [phrase.source for phrase in date_phrases.phrases(3)]
    answers = system.generate(sources)
    for answer in answers:
        assert answer.text == found.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert 17 <= len(answer.text) <= 23 and answer.stats.target_forwards == 2
    one = MarkovCascade(
        found.model, found.tokenizer, Lengths(0.0, 20.0), Settings(states=4, rounds=2, batch=1)
    )
    assert [a.text for a in one.generate(sources)] == [a.text for a in answers]
    assert Model(found.model, found.tokenizer).target.encoder_decoder


def test_the_claim_made_small():
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["forwards of the decoder"].value == 4
    assert all(row.ours is not None for row in found.rows)
