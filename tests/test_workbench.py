"""The pycode data set, its tokenizer, and the reference models."""

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from isthmus import folders
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError, UnknownNameError
from isthmus.workbench import pycode, reference
from isthmus.workbench._training import Recipe, Trainer, batches, evaluate, orthogonalize, pack
from isthmus.workbench.tokenizer import END, end_id, load_tokenizer, train_tokenizer

EMBEDDED = folders.EMBEDDED / "pycode-t"
TINY = Recipe(
    name="tiny",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=8,
    intermediate_size=24,
    vocab_size=64,
    steps=8,
    batch_size=2,
    sequence_length=32,
    max_position_embeddings=64,
    warmup_steps=2,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED)


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 64, size=n).astype(np.int32) for n in (90, 40, 130, 7)]


def trainer(folder, recipe=TINY, corpus="corpus"):
    return Trainer(recipe, documents(), end=0, corpus=corpus, directory=folder)


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def assert_identical(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# The data set ---------------------------------------------------------------------------------


def test_splits_are_disjoint_and_hold_no_test_module():
    train, held_out = pycode.files("train"), pycode.files("held-out")
    assert not set(train) & set(held_out)
    assert not any("test" in path.parts for path in held_out)
    modules = [path for path in train if "test" not in path.parts and "tests" not in path.parts]
    assert 0.02 < len(held_out) / (len(modules) + len(held_out)) < 0.10
    assert not set(pycode.texts("train")) & set(pycode.texts("held-out"))


def test_split_depends_on_the_path_alone():
    # The rule written out once more: changing it would leak held-out files into old models.
    held_out = set(pycode.files("held-out"))
    for name in ("doctest.py", "ipaddress.py", "unittest/case.py", "wsgiref/headers.py"):
        assert PurePosixPath(name) in held_out
    for name in ("json/decoder.py", "argparse.py", "ast.py"):
        assert PurePosixPath(name) not in held_out


def test_generated_and_foreign_files_are_left_out():
    parts = {
        part for split in ("train", "held-out") for p in pycode.files(split) for part in p.parts
    }
    assert not parts & {"site-packages", "__pycache__", "encodings", "pydoc_data", "turtledemo"}
    assert not any(part.startswith("_sysconfigdata") for part in parts)


def test_repeats_count_modules_only():
    once, twice = pycode.training_texts(1), pycode.training_texts(2)
    modules = [p for p in pycode.files("train") if not {"test", "tests", "idle_test"} & {*p.parts}]
    assert len(once) == len(pycode.files("train"))
    assert len(twice) == len(once) + len(modules)


def test_unknown_split_is_refused():
    with pytest.raises(InvalidInputError, match="'held-out'"):
        pycode.texts("test")


def test_an_interpreter_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pycode, "_root", lambda: tmp_path)
    pycode._corpus.cache_clear()
    try:
        with pytest.raises(Exception, match="holds none"):
            pycode.files("train")
    finally:
        pycode._corpus.cache_clear()


def test_prompts_are_deterministic_and_spread(tokenizer):
    first = pycode.prompts(10, tokenizer, prompt_tokens=24, seed=3)
    assert first == pycode.prompts(10, tokenizer, prompt_tokens=24, seed=3)
    assert first != pycode.prompts(10, tokenizer, prompt_tokens=24, seed=4)
    assert all(len(ids) == 24 for ids in first)
    sources = pycode.texts("held-out")
    homes = []
    for ids in first:
        text = tokenizer.decode(ids)
        home = next(i for i, source in enumerate(sources) if text in source)
        at = sources[home].index(text)
        assert at == 0 or sources[home][at - 1] == "\n"
        homes.append(home)
    assert len(set(homes)) == len(homes)


def test_prompts_refuse_what_no_file_can_give(tokenizer):
    with pytest.raises(InvalidInputError, match="no held-out file is long enough"):
        pycode.prompts(1, tokenizer, prompt_tokens=10**6)
    with pytest.raises(InvalidInputError, match="at least 1"):
        pycode.prompts(0, tokenizer)


# The tokenizer --------------------------------------------------------------------------------


def test_round_trip_on_held_out_text(tokenizer):
    for text in pycode.texts("held-out")[:8]:
        assert tokenizer.decode(tokenizer.backend_tokenizer.encode(text).ids) == text
    odd = "\ta  b\n\n \n   ünï— 漢字 \r\n\x00 <|end|> '''\n"
    assert tokenizer.decode(tokenizer.encode(odd, add_special_tokens=False)) == odd


def test_prompts_are_cut_where_training_text_is_cut(tokenizer):
    text = "def area(self):\n        return 1\n"
    whole = tokenizer.tokenize(text)
    for prefix in ("def area(self):", "def area(self):\n", "def area(self):\n        "):
        start = tokenizer.tokenize(prefix)
        assert whole[: len(start)] == start
    assert len(tokenizer.tokenize(" " * 8)) == 1


def test_tokenizer_has_one_special_token(tokenizer):
    assert len(tokenizer) == 4096
    assert tokenizer.all_special_tokens == [END]
    assert end_id(tokenizer) == 0
    assert tokenizer.encode(END, add_special_tokens=False) == [0]


def test_training_a_tokenizer_is_repeatable(tmp_path):
    texts = pycode.texts("held-out")[:4]
    one, two = train_tokenizer(texts, 400), train_tokenizer(texts, 400)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    one.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(texts[0][:500]) == one.encode(texts[0][:500])
    loaded.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


# The training loop ----------------------------------------------------------------------------


def test_newton_schulz_brings_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((24, 24), (24, 40), (40, 24)):
        update = orthogonalize(torch.randn(3, rows, columns, generator=generator))
        assert update.shape == (3, rows, columns)
        values = torch.linalg.svdvals(update)
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_muon_step_of_a_diagonal_gradient():
    # The polynomial acts on singular values alone, so a diagonal can be followed by hand.
    x = 0.8 / np.sqrt(0.8**2 + 0.6**2), 0.6 / np.sqrt(0.8**2 + 0.6**2)
    for _ in range(5):
        x = tuple(3.4445 * v - 4.7750 * v**3 + 2.0315 * v**5 for v in x)
    got = orthogonalize(torch.diag(torch.tensor([0.8, 0.6]))[None])[0]
    assert torch.allclose(got, torch.diag(torch.tensor(x, dtype=torch.float32)), atol=1e-4)


def test_rate_rises_stays_and_falls():
    recipe = replace(TINY, steps=100, warmup_steps=9, decay_share=0.3)
    assert recipe.decay_start == 70
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(9) == recipe.rate(69) == recipe.rate(70) == 1.0
    assert recipe.rate(85) == pytest.approx(0.5)
    assert recipe.rate(99) == pytest.approx(1 / 30)


def test_an_epoch_shows_every_window_once():
    recipe = replace(TINY, batch_size=1)
    stream_tokens = sum(len(ids) + 1 for ids in documents())
    windows = stream_tokens // recipe.sequence_length
    source = batches(documents(), recipe, 0, 0)
    rows = [next(source)[0] for _ in range(windows)]
    assert all(len(row) == recipe.sequence_length + 1 for row in rows)
    seen = sorted(token for row in rows for token in row[:-1].tolist())
    rng = np.random.default_rng([recipe.seed, 0])
    stream = pack([documents()[i] for i in rng.permutation(4)], 0)
    assert seen == sorted(stream[: windows * recipe.sequence_length].tolist())


def test_batches_can_begin_anywhere():
    source = batches(documents(), TINY, 0, 0)
    skipped = [next(source) for _ in range(12)]
    assert torch.equal(next(batches(documents(), TINY, 0, 11)), skipped[11])


def test_batches_refuse_too_little_text():
    with pytest.raises(InvalidInputError, match="fewer than 32 tokens"):
        next(batches([np.arange(5, dtype=np.int32)], TINY, 0, 0))


def test_loss_of_a_fresh_model_is_that_of_guessing(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    loss = evaluate(run.model, pack(documents(), 0), 32, None)
    assert loss == pytest.approx(np.log(64), abs=1e-5)


def test_training_lowers_the_loss(tmp_path):
    losses = []
    trainer(tmp_path, replace(TINY, steps=40)).run(lambda now: losses.append(now.loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


@pytest.mark.parametrize("at", [1, 3, 7])
def test_resumed_run_is_bit_identical(tmp_path, at):
    whole = trainer(tmp_path / "whole")
    whole.run()
    first = trainer(tmp_path / "parts")
    first.run(stop_at=at)
    second = trainer(tmp_path / "parts")
    assert second.step == at
    second.run()
    assert second.step == TINY.steps
    assert_identical(weights(whole), weights(second))


def test_ctrl_c_saves_after_the_step_and_the_run_goes_on(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.run()

    def interrupt(now):
        if now.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "parts").run(interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    second = trainer(tmp_path / "parts")
    assert second.step in (4, 5)
    second.run()
    assert_identical(weights(whole), weights(second))


def test_length_can_change_before_the_rate_falls(tmp_path):
    longer = replace(TINY, steps=12, decay_share=0.4)
    whole = trainer(tmp_path / "whole", longer)
    whole.run()
    trainer(tmp_path).run(stop_at=4)
    run = trainer(tmp_path, longer)
    assert run.step == 4
    run.run()
    assert_identical(weights(whole), weights(run))


def test_length_cannot_change_after_that(tmp_path):
    trainer(tmp_path).run(stop_at=4)
    with pytest.raises(MismatchError, match="another recipe"):
        trainer(tmp_path, replace(TINY, steps=5))


def test_checkpoint_of_another_recipe_or_corpus_is_refused(tmp_path):
    trainer(tmp_path).run(stop_at=2)
    with pytest.raises(MismatchError):
        trainer(tmp_path, replace(TINY, muon_lr=0.5))
    with pytest.raises(MismatchError):
        trainer(tmp_path, corpus="other")


def test_broken_checkpoints_are_refused(tmp_path):
    trainer(tmp_path).run(stop_at=2)
    path = tmp_path / "state.safetensors"
    good = path.read_bytes()
    rng = random.Random(0)
    for length in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(BrokenFileError, match="delete it"):
            trainer(tmp_path)
    path.write_bytes(bytes(rng.randrange(256) for _ in range(500)))
    with pytest.raises(BrokenFileError):
        trainer(tmp_path)
    path.write_bytes(good)
    assert trainer(tmp_path).step == 2


# Reference models -----------------------------------------------------------------------------

SMALL = replace(TINY, name="small", vocab_size=4096, steps=3)


def test_train_publishes_a_folder_that_transformers_loads(tmp_path, cache, capfd):
    text = pycode.texts("held-out")[:3]
    out, snapshots = tmp_path / "out", tmp_path / "snapshots"
    reference.train(
        SMALL,
        out,
        documents=text,
        snapshots=snapshots,
        snapshot_every_s=0.0,
        held_out_windows=2,
    )
    assert capfd.readouterr() == ("", "")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(out)) == 4096
    assert json.loads((out / "recipe.json").read_text()) == SMALL.as_dict()
    card = json.loads((out / "card.json").read_text())
    assert card["tokens_seen"] == 3 * 2 * 32
    assert card["held_out"]["nats_per_token"] > 0
    assert json.loads((snapshots / "card.json").read_text())["steps"] == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not list((cache / "unfinished").glob("*/state.safetensors"))


def test_interrupted_training_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    text = pycode.texts("held-out")[:3]
    out = tmp_path / "out"
    reference.train(SMALL, out, documents=text, held_out_windows=1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "_held_out", fail)
    with pytest.raises(KeyboardInterrupt):
        reference.train(replace(SMALL, steps=4), out, documents=text, held_out_windows=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_reference_trains_once_and_then_answers_from_the_cache(monkeypatch, cache):
    calls = []

    def train(recipe, folder, progress):
        calls.append(recipe.name)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        (folder / "recipe.json").write_text(json.dumps(recipe.as_dict()))

    monkeypatch.setattr(reference, "train", train)
    first = reference.reference("pycode-s")
    assert first == reference.reference("pycode-s")
    assert first.is_relative_to(cache)
    assert calls == ["pycode-s"]
    (first / "recipe.json").write_text("{")
    with pytest.raises(BrokenFileError, match="delete its folder"):
        reference.reference("pycode-s")


def test_fingerprints_tell_recipes_apart():
    prints = {reference.fingerprint(recipe) for recipe in reference.RECIPES.values()}
    assert len(prints) == len(reference.RECIPES)


def test_unknown_model_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean 'pycode-xs'"):
        reference.reference("pycode-xss")


def test_unwritable_cache_is_one_clear_error(tmp_path, monkeypatch):
    # A file where the folder should be is refused to every user, root included.
    blocked = tmp_path / "blocked"
    blocked.touch()
    monkeypatch.setenv("ISTHMUS_CACHE", str(blocked / "cache"))
    with pytest.raises(BrokenFileError, match="ISTHMUS_CACHE"):
        reference.reference("pycode-xs")


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InvalidInputError, match="no reference model"):
        reference.train(SMALL, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_command_line_names_mistakes(capsys):
    assert reference.main(["pycode-q"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown reference model 'pycode-q'")
    assert reference.main(["pycode-xs", "--steps", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


# The model that ships -------------------------------------------------------------------------


def test_embedded_model_is_the_one_of_its_recipe():
    assert reference.reference("pycode-t") == EMBEDDED
    card = json.loads((EMBEDDED / "card.json").read_text())
    recipe = reference.RECIPES["pycode-t"]
    assert card["steps"] == card["steps_of_recipe"] == recipe.steps
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 20e6
    stored = load_file(EMBEDDED / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == card["parameters"]


def test_embedded_model_predicts_held_out_code(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    texts = pycode.texts("held-out")[:12]
    ids = [np.array(tokenizer.backend_tokenizer.encode(t).ids, dtype=np.int32) for t in texts]
    loss = evaluate(model, pack(ids, end_id(tokenizer)), 256, 8)
    assert loss < 3.9  # Measured 3.66 under Python 3.11; an untrained model has 8.3.
