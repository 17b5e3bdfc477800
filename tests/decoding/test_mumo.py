"""MuMo: units and their segmentations, the grafted head, and how candidates are judged."""

import json
from functools import lru_cache
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers as tf
from tokenizers import Tokenizer, models, normalizers

from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.phrases import RULES, Phrases, step_scores
from isthmus.decoding.tree import TokenTree
from isthmus.errors import (
    BrokenFileError,
    InvalidInputError,
    MismatchError,
    UnsupportedModelError,
)
from isthmus.roles import Context
from isthmus.surgery.units import IGNORED, UnitHead, Units, places, segment, train_head
from isthmus.systems.speculative.mumo import Mumo, Settings
from isthmus.training.drafting import Recipe
from isthmus.workbench.tokenizer import train_tokenizer

LINES = ["a 이천이십일년 삼월 사일", "b 천구백이십년 시월 이일", "c 이천이십년 사월 삼일"]


@lru_cache(maxsize=1)
def tokenizer():
    """Bytes, and a few merges of English."""
    return train_tokenizer(["a day in the life of the code "] * 4, 262)


@lru_cache(maxsize=1)
def units():
    return Units.learn(LINES * 4, tokenizer(), 40)


@lru_cache(maxsize=1)
def model():
    """A tiny model that has learned three lines by heart, and nothing else."""
    config = tf.LlamaConfig(
        vocab_size=262,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=96,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = tf.LlamaForCausalLM(config)
    rows = [[*tokenizer().encode(line), 0] for line in LINES]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        loss = net(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.3
    return Model(net.eval(), tokenizer())


@lru_cache(maxsize=1)
def head():
    made = UnitHead(model().target, units())
    train_head(made, places(model().target, units(), LINES), Recipe(steps=60, batch_size=16))
    return made


def read(prompt, own=None, new=60, **settings):
    strategy = Mumo(own or head(), Settings(**settings), (0,), tokenizer())
    return strategy.generate(model().encode(prompt), max_new_tokens=new)


# Units ------------------------------------------------------------------------------------------


def test_segmentations_give_the_bytes_of_their_units():
    assert len(units()) > 15 and max(map(len, units().texts)) > 1
    for text, ids, length in zip(
        units().texts, units().segments, units().lengths.tolist(), strict=True
    ):
        assert tokenizer().decode(list(ids)) == text and length == len(ids) == len(text.encode())


def test_a_text_is_read_in_units_by_hand():
    known = Tokenizer(
        models.BPE({"가": 0, "나": 1, "가나": 2, "?": 3}, [("가", "나")], unk_token="?")
    )
    made = Units.of(known, tokenizer())
    assert made.texts == ("가", "나", "가나"), "one token of the model already is no unit"
    ids, choices = made.encode("def 가나가x")
    plain = tokenizer().encode("def ")
    assert ids == tokenizer().encode("def 가나가x")
    gap = [IGNORED] * len(plain)
    assert choices == [*gap, 2, *[IGNORED] * 5, 0, IGNORED, IGNORED, IGNORED]
    assert made.encode("no units")[1] == [IGNORED] * len(tokenizer().encode("no units"))


def test_segmentations_that_lose_text_are_refused():
    lossy = train_tokenizer(["abc abc"], 258)
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    upper = Tokenizer(models.BPE({"Ä": 0, "?": 1}, [], unk_token="?"))
    with pytest.raises(InvalidInputError, match="round trip"):
        Units.of(upper, lossy)
    assert segment(tokenizer(), "\nÄ") == tokenizer().encode("\nÄ")
    lower = Tokenizer(models.BPE({"ä": 0, "?": 1}, [], unk_token="?"))
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(InvalidInputError, match="leaves texts as they are"):
        Units.of(lower, tokenizer()).encode("aÄ")
    with pytest.raises(InvalidInputError, match="no units of two or more"):
        Units.learn(["plain english"], tokenizer(), 40)
    with pytest.raises(InvalidInputError, match="hold no units"):
        places(model().target, units(), ["plain english"])


def test_rows_begin_as_the_mean_of_their_tokens_rows():
    weight = model().target.model.get_output_embeddings().weight.detach()
    mean = UnitHead(model().target, units())
    drawn = UnitHead(model().target, units(), rows="random", seed=1)
    for unit, ids in enumerate(units().segments):
        assert torch.allclose(mean.rows[unit], weight[list(ids)].mean(0), atol=1e-6)
    assert not torch.allclose(mean.rows, drawn.rows, atol=1e-2)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mean(x), x @ mean.rows.T, atol=1e-5), "it starts as those rows alone"


# Judging ----------------------------------------------------------------------------------------


def test_scores_are_products_of_stepwise_probabilities():
    target = tiny.target("Llama")
    prompt = tiny.prompts()[0]
    paths = [[5], [5, 9, 11], [5, 9, 4, 8], [7, 7]]
    session = target.session(1)
    session.prefill([prompt[:-1]])
    tree = TokenTree.from_paths(int(prompt[-1]), paths)
    context = Context(prompt[None], [len(prompt)], [len(prompt)], Law(), torch.Generator(), [0])
    phrases = Phrases(tree, paths, step_scores(session.score(tree).logits, tree, context))
    for path, score in zip(paths, phrases.log_p.tolist(), strict=True):
        want, ids = 0.0, prompt
        for token in path:
            law = torch.log_softmax(target.forward(ids[None]).logits[0, -1], -1)
            want += float(law[token])
            ids = torch.cat([ids, torch.tensor([token])])
        assert score == pytest.approx(want, abs=1e-6)


def test_rules_by_hand():
    paths = [[1], [1, 2], [1, 2, 3, 4], [1, 5, 6]]
    tree = TokenTree.from_paths(0, paths)
    assert tree.tokens[0].tolist() == [0, 1, 2, 5, 3, 6, 4]
    steps = torch.tensor([1.0, 0.9, 0.5, 0.45, 0.9, 1.0, 0.9]).log()

    def kept(rule, said=(1, 2, 3, 6, 4, 9, 9), floor=0.5):
        found = Phrases(tree, paths, steps).choose(rule, said, floor=floor)
        return tree.tokens[0, found].tolist()

    assert kept("part") == [1, 2, 3, 4], "what is said all along"
    assert kept("part", (1, 2, 3, 6, 8, 9, 9)) == [1, 2], "the end of a unit that was passed"
    assert kept("part", (1, 8, 3, 6, 4, 9, 9)) == [1], "the fallback"
    assert kept("product") == [1, 2]  # .45 against .36 and .41
    assert kept("mean") == [1, 2, 3, 4]  # .77 against .67 and .74
    assert kept("mean", floor=0.8) == [1] == kept("product", floor=0.8)


# Decoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LINES)
def test_units_save_forwards_and_keep_the_text(line):
    plain = model().generate(line[0], max_new_tokens=60, drafter="none")
    assert plain.text == line[1:]
    for rule in RULES:
        result = read(line[0], rule=rule)
        assert result.text == plain.text and result.tokens == plain.tokens
        assert result.finish_reason == "stop" and not result.lossless
        assert result.stats.target_forwards < plain.stats.target_forwards / 2.5
    off = read(line[0], use_units=False)
    assert off.tokens == plain.tokens
    assert off.stats.target_forwards == plain.stats.target_forwards == len(plain.tokens)


def test_other_text_falls_back_to_the_original_head():
    prompt = torch.tensor([70, 80, 90])  # the model never learned what follows
    want = model().generate(prompt, max_new_tokens=12, drafter="none", ignore_end=True)
    strategy = Mumo(head(), Settings(), (0,), tokenizer())
    got = strategy.generate(prompt, max_new_tokens=12, ignore_end=True)
    assert got.tokens == want.tokens
    blank = UnitHead(model().target, Units.of(_foreign(), tokenizer()))
    for rule in RULES:  # units of another language are never what the model says
        result = read("a", blank, rule=rule)
        assert result.text == LINES[0][1:] and {r.emitted for r in result.rounds} == {1}


def _foreign():
    return Tokenizer(models.BPE({"марта": 0, "ж": 1, "?": 2}, [], unk_token="?"))


def test_budget_context_and_seeds():
    for new in (1, 2, 5, 17):
        result = read("b", new=new)
        assert len(result.tokens) == new and result.finish_reason == "length"
        assert result.tokens == read("b").tokens[:new]
    strategy = Mumo(head(), Settings(rule="mean"), (), tokenizer())
    full = strategy.generate(model().encode("a" * 80), max_new_tokens=60)
    assert len(full.tokens) == 96 - 80 or full.finish_reason == "length"
    assert len(full.tokens) + full.prompt_tokens <= 96
    drawn = [
        strategy.generate(model().encode("a"), max_new_tokens=20, temperature=1.5, seed=s).tokens
        for s in (0, 0, 1, 2)
    ]
    assert drawn[0] == drawn[1] and len({tuple(d) for d in drawn}) > 1
    with pytest.raises(InvalidInputError, match="at least one"):
        strategy.generate(torch.tensor([], dtype=torch.int64), max_new_tokens=3)


def test_bad_settings_and_models_are_refused():
    for wrong in (
        {"candidates": 0},
        {"rule": "sum"},
        {"rows": "zero"},
        {"floor": 0.0},
        {"size": 1},
    ):
        with pytest.raises(InvalidInputError):
            Settings(**wrong)
    for name in ("Bloom", "Bart"):
        with pytest.raises(UnsupportedModelError, match="tree of candidates"):
            Mumo(SimpleNamespace(target=tiny.target(name)))


def test_a_head_is_kept_beside_its_model(tmp_path):
    model().target.model.save_pretrained(tmp_path)
    hub = tf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    loaded = Model(hub, tokenizer())
    with pytest.raises(InvalidInputError, match=r"holds no units\.json"):
        Mumo.for_model(loaded)
    grafted = Mumo.graft(loaded, LINES * 4, Settings(size=40), Recipe(steps=5, batch_size=8))
    grafted.head.save_pretrained(tmp_path)
    again = Mumo.for_model(loaded)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.head(x), grafted.head(x)) and again.ends == (0,)
    assert loaded.generate("a", drafter="mumo", max_new_tokens=60).text == LINES[0][1:]
    with pytest.raises(MismatchError, match="another model"):
        other = tiny.fresh("Llama", "float32")
        UnitHead.from_pretrained(tmp_path, Model(other).target, tokenizer())
    weights = tmp_path / "units.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(BrokenFileError, match="altered"):
        Mumo.for_model(loaded)
    config = tmp_path / "units.json"
    config.write_text(json.dumps({"units": 3}))
    with pytest.raises(BrokenFileError, match="cannot be read"):
        Mumo.for_model(loaded)
