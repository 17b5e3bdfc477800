"""Lexical shortlists: the lexicon is IBM's, a full list changes nothing, rows are on their own."""

import math

import pytest
import torch

from decoding.tiny import network
from isthmus.decoding.fast import FastTarget
from isthmus.decoding.model import Model
from isthmus.decoding.shortlist import Lexicon, Shortlist, ShortlistTarget, learn_lexicon
from isthmus.decoding.tree import TokenTree
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.models.encoder_decoder import Config, EncoderDecoder
from isthmus.signals.tokenizer import learn_tokenizer

V = 96


@pytest.fixture(scope="module")
def twin():
    torch.manual_seed(0)
    config = Config.marian(
        V,
        hidden_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        head_dim=16,
        intermediate_size=64,
    )
    made = EncoderDecoder(config).eval().to_hf()
    with torch.no_grad():
        made.final_logits_bias.copy_(torch.randn(1, V))
    return made


def lexicon(best: int = 3) -> Lexicon:
    generator = torch.Generator().manual_seed(1)
    source = torch.arange(V).repeat_interleave(best)
    target = torch.randint(V, (V * best,), generator=generator)
    return Lexicon(source, target, torch.rand(V * best, generator=generator))


SOURCES = [torch.tensor(ids) for ids in ([5, 9, 40, 1], [70, 71, 1], [8, 30, 31, 32, 90, 1])]


def greedy(target, sources=SOURCES, **options):
    options = {"max_new_tokens": 12, "drafter": "none", "ignore_end": True, **options}
    return [g.tokens for g in Model(target).generate(list(sources), **options)]


def test_model_1_is_the_textbook_s():
    # one pass by hand: every target place shares its count evenly among NULL and the source words
    pairs = [(torch.tensor([2, 3]), torch.tensor([5])), (torch.tensor([2]), torch.tensor([5, 6]))]
    found = learn_lexicon(pairs, 8, 1)
    table = {
        (s, t): p
        for s, t, p in zip(
            found.source.tolist(), found.target.tolist(), found.probs.tolist(), strict=True
        )
    }
    # counts of 2: 1/3 + 1/2 of token 5, 1/2 of 6; counts of 3: 1/3 of 5
    assert table[2, 5] == pytest.approx((1 / 3 + 1 / 2) / (1 / 3 + 1))
    assert table[2, 6] == pytest.approx((1 / 2) / (1 / 3 + 1))
    assert table[3, 5] == pytest.approx(1.0) and len(table) == 3
    with pytest.raises(InvalidInputError, match="at least one"):
        learn_lexicon([], 8)


def test_the_best_are_chosen_by_probability_and_threshold():
    words = Lexicon(
        torch.tensor([3, 1, 3, 3]), torch.tensor([4, 5, 6, 7]), torch.tensor([0.1, 1.0, 0.6, 0.3])
    )
    assert words.best(5, 2).tolist() == [[0, 0], [5, 0], [0, 0], [6, 7], [0, 0]]
    assert words.best(5, 3, threshold=0.2)[3].tolist() == [6, 7, 0]
    short = Shortlist(words, 9, first=2, best=1, shared=False)
    assert short.allowed(torch.tensor([[3, 1], [4, 0]])).nonzero().tolist() == [
        *([0, 0], [0, 1], [0, 5], [0, 6], [1, 0], [1, 1]),
    ]
    assert bool(Shortlist(words, 9, first=2, best=1).allowed(torch.tensor([[8]]))[0, 8])
    for wrong in ({"first": 1}, {"best": 0}):
        with pytest.raises(InvalidInputError, match="at least the 2 special tokens"):
            Shortlist(words, 9, **wrong)


def test_a_full_list_changes_nothing(twin):
    full = Shortlist(lexicon(), V, first=V)
    assert greedy(ShortlistTarget(twin, full)) == greedy(FastTarget(twin))
    beam = {"strategy": "beam", "beams": 3, "drafter": "auto", "ignore_end": False}
    assert greedy(ShortlistTarget(twin, full), **beam) == greedy(FastTarget(twin), **beam)


def test_logits_are_the_model_s_on_the_list_and_nothing_elsewhere(twin):
    short = Shortlist(lexicon(), V, first=4, best=3)
    target, whole = ShortlistTarget(twin, short), FastTarget(twin)
    inputs = {"input_ids": SOURCES[0][None]}
    tokens = greedy(target, SOURCES[:1])[0]
    allowed = short.allowed(SOURCES[0][None])[0]
    assert allowed.sum() < V / 3 and all(allowed[t] for t in tokens)
    tree = TokenTree(torch.tensor([[0]]), TokenTree.root(torch.tensor([0])).topology)
    ours = target.session(1, **inputs).score(tree).logits[0, 0]
    theirs = whole.session(1, **inputs).score(tree).logits[0, 0]
    assert torch.equal(ours.isfinite(), allowed)
    assert torch.equal(ours[allowed], theirs[allowed])


def test_a_row_keeps_to_its_own_list_whoever_is_beside_it(twin):
    target = ShortlistTarget(twin, Shortlist(lexicon(), V, first=4, best=3))
    alone = [greedy(target, [source])[0] for source in SOURCES]
    assert greedy(target) == alone and alone != greedy(FastTarget(twin))
    # rows join a batch that is under way and leave it
    model = Model(target)
    asked = [SOURCES[i % 3] for i in range(7)]
    found = dict(
        model.generate_many(asked, batch_size=3, max_new_tokens=12, drafter="none", ignore_end=True)
    )
    assert [found[i].tokens for i in range(7)] == [alone[i % 3] for i in range(7)]
    beams = Model(target).generate(
        SOURCES, strategy="beam", beams=2, max_new_tokens=8, ignore_end=True
    )
    for source, each in zip(SOURCES, beams, strict=True):
        [one] = Model(target).generate(
            [source], strategy="beam", beams=2, max_new_tokens=8, ignore_end=True
        )
        assert one.tokens == each.tokens


def test_drafts_change_nothing(twin):
    target = ShortlistTarget(twin, Shortlist(lexicon(), V, first=4, best=3))
    assert greedy(target, SOURCES[:1], drafter="token-recycling") == greedy(target, SOURCES[:1])


def test_int8_rows_are_those_of_the_whole_matrix(twin):
    target, whole = ShortlistTarget(twin, Shortlist(lexicon(), V, first=V)), FastTarget(twin)
    target.to_int8()
    whole.to_int8()
    assert greedy(target) == greedy(whole)


def test_another_vocabulary_and_a_decoder_alone_are_refused(twin):
    with pytest.raises(InvalidInputError, match="this model has 96 tokens"):
        ShortlistTarget(twin, Shortlist(lexicon(), V + 1))
    model = network("Llama", "float32")
    nothing = Lexicon(torch.tensor([2]), torch.tensor([3]), torch.tensor([1.0]))
    with pytest.raises(InvalidInputError, match="fits encoder-decoders"):
        ShortlistTarget(model, Shortlist(nothing, model.config.vocab_size))
    with pytest.raises(InvalidInputError, match="token 95, outside a vocabulary of 64"):
        Shortlist(lexicon(), 64)


def test_a_lexicon_survives_its_file_and_a_bad_line_is_named(tmp_path):
    tokenizer = learn_tokenizer(["das Haus the house"] * 3, 270)
    pairs = [(torch.tensor(tokenizer("das Haus").input_ids), torch.tensor([65, 66, 1]))]
    words = learn_lexicon(pairs, len(tokenizer), 3)
    path = tmp_path / "lexicon.s2t"
    words.save(path, tokenizer)
    read = Lexicon.load(path, tokenizer)
    assert torch.equal(words.best(270, 2), read.best(270, 2))
    assert math.isclose(float(words.probs.sum()), float(read.probs.sum()), rel_tol=1e-5)
    path.write_text(path.read_text() + "one two\n")
    with pytest.raises(BrokenFileError, match=rf"line {len(words.probs) + 1}: 'one two' is not"):
        Lexicon.load(path, tokenizer)
    with pytest.raises(BrokenFileError, match="cannot be read"):
        Lexicon.load(tmp_path / "none", tokenizer)
    (tmp_path / "empty").write_text("")
    assert Lexicon.load(tmp_path / "empty", tokenizer).best(270, 2).sum() == 0


@pytest.mark.parametrize("listed", [False, True])
def test_rows_that_are_put_into_another_order_take_their_sources_along(twin, listed):
    short = Shortlist(lexicon(), V, first=4, best=3)
    target = ShortlistTarget(twin, short) if listed else FastTarget(twin)
    width = max(map(len, SOURCES))
    inputs = {
        "input_ids": torch.stack(
            [torch.nn.functional.pad(s, (0, width - len(s))) for s in SOURCES]
        ),
        "attention_mask": torch.stack([(torch.arange(width) < len(s)).long() for s in SOURCES]),
    }
    tree = TokenTree.root(torch.tensor([7, 8, 9]))

    def logits(order):
        session = target.session(3, **inputs)
        session.score(TokenTree.root(torch.tensor([0, 0, 0])))
        session.keep(torch.zeros(3, 1, dtype=torch.int64))
        session.reorder(order)
        return session.score(TokenTree.root(tree.tokens[order, 0])).logits

    first = logits([0, 1, 2])
    assert torch.equal(logits([2, 0, 1]), first[[2, 0, 1]])
    assert torch.equal(logits([1, 1, 0]), first[[1, 1, 0]])
