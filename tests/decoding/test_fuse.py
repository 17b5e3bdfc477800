"""The door to fusion: ``generate(..., fuse=...)`` and ``isthmus generate --fuse``."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf

import isthmus
from isthmus.cli.main import main
from isthmus.decoding.byte_fusion import ByteMember, Leader, NextByte, lead_and_score
from isthmus.decoding.bytescorer import ByteScorer
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.contrast import ContrastiveDecoding
from isthmus.decoding.fuse import MODES, Fuse, parse
from isthmus.decoding.fusion import Member, Mixture, Product, Proxy, Route
from isthmus.decoding.law import Law
from isthmus.decoding.prefixes import PrefixScorer
from isthmus.decoding.router import MaxProb
from isthmus.errors import InvalidInputError, MismatchError, UnknownNameError
from isthmus.workbench.tokenizer import train_tokenizer

TEXT = ["def add(one, two):\n    return one + two\n", "def sub(one, two):\n    return one - two\n"]
PROMPT = "def add(one"
COMMAND = [sys.executable, "-m", "isthmus.cli.main"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Random models: two of one vocabulary, a third of another one."""
    made = {}
    for name, size, seed in (("one", 270, 0), ("same", 270, 1), ("third", 270, 2), ("far", 290, 3)):
        tokenizer = train_tokenizer(TEXT * 4, size)
        config = tf.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = tf.LlamaForCausalLM(config)
        for p in model.parameters():
            if p.ndim > 1:
                p.data.mul_(8)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture(scope="session")
def models(folders):
    return {name: isthmus.load(folder) for name, folder in folders.items()}


def law_of(mode, models):
    same, third = models["same"].target, models["third"].target
    return {
        "product": lambda: Product([Member(same, 0.3)], weight=0.7),
        "mixture": lambda: Mixture([Member(same, 0.3)], weight=0.7),
        "contrast": lambda: ContrastiveDecoding(same, strength=0.3),
        "proxy": lambda: Proxy(Member(same), Member(third), strength=0.3),
        "route": lambda: Route(Member(same), MaxProb(0.3)),
    }[mode]()


@pytest.mark.parametrize("mode", ["product", "mixture", "contrast", "proxy", "route"])
def test_one_vocabulary_goes_through_the_ordinary_loop(mode, models):
    one = models["one"]
    want = one.generate(
        [PROMPT, "def "],
        max_new_tokens=10,
        law=Law(reshapes=[law_of(mode, models)]),
        drafter="none",
    )
    others = [(models["same"], 0.3), *([(models["third"], None)] if mode == "proxy" else [])]
    plain = one.generate([PROMPT, "def "], max_new_tokens=10, drafter="none")
    for drafter in ("none", "prompt-lookup"):
        got = one.generate(
            [PROMPT, "def "], max_new_tokens=10, drafter=drafter, fuse=others, fuse_mode=mode
        )
        assert [g.tokens for g in got] == [w.tokens for w in want]
    assert [p.tokens for p in plain] != [w.tokens for w in want]


def test_auto_goes_by_the_vocabularies_and_defaults_are_equal_shares(models):
    one, same, far = models["one"], models["same"], models["far"]
    assert Fuse.of(same).way(one) == "product" and Fuse.of([same, far]).way(one) == "lead"
    assert Fuse.of(same).shares("product") == [0.5]
    assert Fuse.of([same, far]).shares("lead") == [0.1, 0.1]
    assert Fuse.of([same, far]).shares("next-byte") == [pytest.approx(1 / 3)] * 2
    half = one.generate(PROMPT, max_new_tokens=8, fuse=same)
    assert half.tokens == one.generate(PROMPT, max_new_tokens=8, fuse=(same, 0.5)).tokens


def test_other_vocabularies_are_led_and_scored(models):
    one, far = models["one"], models["far"]
    got = one.generate(PROMPT, max_new_tokens=6, fuse=(far, 0.4))
    ids = one.encode(PROMPT).tolist()
    leader = Leader(PrefixScorer(one.target, ids), ByteVocab(one.tokenizer), [0])
    member = ByteMember(ByteScorer.of(far), prompt=PROMPT.encode())
    want = lead_and_score(leader, [member], rate=0.4, max_new_tokens=6)
    assert got.tokens == list(want[0].tokens) and got.text == want[0].trace["bytes"].decode(
        errors="replace"
    )
    assert [h.score for h in got.hypotheses] == pytest.approx([h.score for h in want])
    assert got.stats.target_forwards > 0 and got.finish_reason in ("stop", "length")
    alone = lead_and_score(leader, [], rate=0.0, max_new_tokens=6)
    assert one.generate(PROMPT, max_new_tokens=6, fuse=(far, 0.0)).tokens == list(alone[0].tokens)
    ids = one.encode(PROMPT)
    assert one.generate(ids, max_new_tokens=6, fuse=(far, 0.4)).tokens == got.tokens


def test_next_bytes_are_written_and_drawn(models):
    one, far = models["one"], models["far"]
    options = {"max_new_tokens": 5, "fuse": (far, 0.4), "fuse_mode": "next-byte"}
    got = one.generate(PROMPT, **options)
    fused = NextByte.of([one, far], [0.6, 0.4])
    assert got.text == fused.generate(PROMPT.encode(), 5).decode(errors="replace")
    drawn = [one.generate(PROMPT, temperature=1.0, seed=s, **options).text for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_streams_and_many_prompts_say_the_same(models):
    one = models["one"]
    for other in ("same", "far"):
        options = {"max_new_tokens": 6, "fuse": (models[other], 0.4)}
        alone = one.generate(PROMPT, **options)
        assert "".join(one.stream(PROMPT, **options)) == alone.text
        found = dict(one.generate_many([PROMPT, "def s"], **options))
        assert found[0].tokens == alone.tokens and len(found) == 2


def test_a_strategy_goes_with_it(models):
    one, same = models["one"], models["same"]
    got = one.generate(PROMPT, max_new_tokens=6, fuse=(same, 0.4), strategy="beam", beams=2)
    assert len(got.hypotheses) == 2
    assert "".join(one.stream(PROMPT, max_new_tokens=4, fuse=same, strategy="top-k", seed=1))


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"fuse_mode": "product"}, MismatchError, "fused token by token only where"),
        ({"fuse_mode": "prodct"}, UnknownNameError, "product"),
        ({"fuse_mode": "proxy"}, InvalidInputError, "fuses with 2"),
        ({"weight": 1.5}, InvalidInputError, "1 at most together"),
        ({"weight": -0.5}, InvalidInputError, "0 or more"),
        ({"temperature": 1.0}, InvalidInputError, "draws nothing"),
        ({"drafter": "prompt-lookup"}, InvalidInputError, "takes no drafter"),
        ({"top_k": 3}, InvalidInputError, "takes no top_k"),
        ({"stop": ["x"]}, InvalidInputError, "takes no stop"),
        ({"strategy": "beam"}, InvalidInputError, "takes no strategy"),
    ],
)
def test_what_is_refused(options, kind, words, models):
    given = dict(options)
    fuse = (models["far"], given.pop("weight", 0.3))
    with pytest.raises(kind, match=words):
        models["one"].generate(PROMPT, max_new_tokens=4, fuse=fuse, **given)


def test_a_complete_law_is_refused(models):
    with pytest.raises(InvalidInputError, match="complete law"):
        models["one"].generate(PROMPT, law=Law(), fuse=models["same"])


def test_names_with_weights():
    assert parse(["a/b:0.25", "a"]) == [("a/b", 0.25), ("a", None)]
    with pytest.raises(InvalidInputError, match="MODEL:weight"):
        parse([":0.3"])


def test_from_the_command_line(folders, models, tmp_path, capsys):
    one = str(folders["one"])
    for other in ("same", "far"):
        spec = f"{folders[other]}:0.4"
        words = ["generate", PROMPT, "-m", one, "--fuse", spec, "-n", "6"]
        assert main([*words, "--json"]) == 0
        want = models["one"].generate(PROMPT, max_new_tokens=6, fuse=(models[other], 0.4))
        assert json.loads(capsys.readouterr().out)["tokens"] == want.tokens
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout.strip() == want.text.strip()
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    assert main(["generate", "-i", str(lines), "-m", one, "--fuse", spec, "-n", "6"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == want.text


def test_errors_on_the_command_line_are_one_line(folders, capsys):
    one, far = str(folders["one"]), str(folders["far"])
    for arguments, words in (
        (("--fuse", far, "--fuse-mode", "product"), "token by token only"),
        (("--fuse", far, "--fuse-mode", "led"), "lead"),
        (("--fuse-mode", "lead"), "--fuse"),
        (("--fuse", ":0.2"), "MODEL:weight"),
    ):
        assert main(["generate", "def", "-m", one, *arguments]) == 2
        out, error = capsys.readouterr()
        assert len(error.strip().splitlines()) == 1, error
        assert words in error and not out
    assert main(["generate", "--fuse-mode", "help"]) == 0
    shown = capsys.readouterr().out
    assert all(mode in shown for mode in MODES)
