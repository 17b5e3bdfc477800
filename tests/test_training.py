"""Training a drafter: exact resumption, data, and the commands."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from isthmus.api import load
from isthmus.cli.main import main
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.folders import EMBEDDED
from isthmus.signals.text import read_texts
from isthmus.systems.speculative.eagle import Eagle, Settings
from isthmus.training.drafting import DraftTraining, Progress, Recipe, windows
from isthmus.workbench.tokenizer import load_tokenizer

RECIPE = Recipe(steps=8, batch_size=3, sequence_length=20, validate_every=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the embedded model's tokenizer."""
    place = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    tf.LlamaForCausalLM(config).save_pretrained(place)
    load_tokenizer(EMBEDDED / "pycode-t").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def target(folder: Path) -> Any:
    return load(folder, dtype="float32").target


def run(target: Any, state: Path | None = None, recipe: Recipe = RECIPE) -> DraftTraining:
    torch.manual_seed(0)
    texts = torch.randint(1, 4096, (10, 20), generator=torch.Generator().manual_seed(1)).int()
    return DraftTraining(Eagle(target, Settings(nodes=8)), texts, texts[:4], recipe, state)


def test_an_interrupted_run_ends_with_the_same_weights(target: Any, tmp_path: Path) -> None:
    whole = run(target)
    whole.run()
    state = tmp_path / "run.safetensors"
    for stop in (2, 5):  # before and after the first validation

        def interrupt(now: Progress, stop: int = stop) -> None:
            if now.step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(target, state).run(interrupt)
        assert state.exists()
    rest = run(target, state)
    assert rest.step == 5
    rest.run()
    assert not state.exists(), "a finished run leaves no state behind"
    ours, want = rest.drafter.state_dict(), whole.drafter.state_dict()
    assert all(torch.equal(ours[k], want[k]) for k in want)
    assert rest.curve == whole.curve and [int(c[0]) for c in whole.curve] == [3, 6, 8]


def test_best_weights_are_kept(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = iter([1.5, 2.5, 1.0])
    monkeypatch.setattr(
        "isthmus.training.drafting.acceptance_length", lambda *args, **more: next(lengths)
    )
    training = run(target)
    seen = {}

    def keep(now: Progress) -> None:
        seen[now.step] = {k: v.clone() for k, v in training.drafter.state_dict().items()}

    drafter = training.run(keep)
    assert training.best == 2.5
    assert all(torch.equal(v, seen[6][k]) for k, v in drafter.state_dict().items())
    assert any(not torch.equal(v, seen[8][k]) for k, v in drafter.state_dict().items())


def test_another_runs_state_is_refused(target: Any, tmp_path: Path) -> None:
    state = tmp_path / "run.safetensors"
    training = run(target, state)
    training._save()
    with pytest.raises(MismatchError, match="another recipe, target or data"):
        run(target, state, Recipe(steps=9, batch_size=3, sequence_length=20))
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(BrokenFileError, match="delete that file to begin anew"):
        run(target, state)


def test_loss_falls_on_one_batch(target: Any) -> None:
    recipe = Recipe(steps=25, batch_size=10, sequence_length=20, learning_rate=0.02)
    training, losses = run(target, recipe=recipe), []
    for _ in range(recipe.steps):
        training._take_step()
        losses.append(training.loss)
    assert losses[-1] < 0.9 * losses[0]


def test_windows() -> None:
    assert windows([[1, 2, 3], [4, 5]], 3, 0).tolist() == [[1, 2, 3], [0, 4, 5]]
    with pytest.raises(InvalidInputError, match="fewer than one text"):
        windows([[1]], 3, 0)
    with pytest.raises(InvalidInputError, match="must be positive"):
        Recipe(steps=0)


def test_texts_and_their_faults(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n{"text": "third"}\n')
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert read_texts([tmp_path]) == ["first", "second", "third"]
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n{"txt": 1}\n')
    with pytest.raises(BrokenFileError, match=r"b\.jsonl, line 2: needs a field"):
        read_texts([tmp_path])
    (tmp_path / "b.jsonl").write_text("{\n")
    with pytest.raises(BrokenFileError, match=r"b\.jsonl, line 1: not JSON"):
        read_texts([tmp_path / "b.jsonl"])
    (tmp_path / "d.txt").write_bytes(b"fine\nnot \xff\n")
    with pytest.raises(BrokenFileError, match=r"d\.txt, line 2: not UTF-8"):
        read_texts([tmp_path / "d.txt"])
    with pytest.raises(BrokenFileError, match="cannot be read"):
        read_texts([tmp_path / "none.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="no text was found"):
        read_texts([tmp_path / "empty"])


def test_train_then_generate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.txt").write_text("def add(a, b):\n    return a + b\n" * 60)
    out = tmp_path / "drafter"
    words = ["train", "eagle", "--target", str(folder), "--data", str(tmp_path / "data.txt")]
    words += ["--out", str(out), "--set", "nodes=6", "--steps", "4", "--plan", "batch_size=2"]
    words += ["--plan", "sequence_length=24", "--plan", "validate_every=2", "--json"]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["system"] == "eagle" and [c[0] for c in record["curve"]] == [2, 4]
    model = load(folder, dtype="float32")
    prompt = "def add(a, b):"
    plain = model.generate(prompt, max_new_tokens=12, drafter="none", ignore_end=True)
    ours = model.generate(prompt, max_new_tokens=12, drafter=str(out), ignore_end=True)
    assert ours.tokens == plain.tokens and ours.lossless
    other = load(dtype="float32")
    with pytest.raises(MismatchError, match="trained for another target"):
        other.generate(prompt, drafter=str(out))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "egle", "--out", "x"], "did you mean 'eagle'"),
        (["train", "token-recycling", "--out", "x"], "unknown system that is trained"),
        (["train", "eagle", "--out", "x", "--set", "nodse=1"], "no setting 'nodse'"),
        (["train", "eagle", "--out", "x", "--set", "nodes"], "name=value"),
        (["train", "eagle", "--out", "x", "--steps", "0"], "must be positive"),
        (["generate", "x", "--drafter", "eagle"], "isthmus train eagle"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / w) if w == "x" and words[0] == "train" else w for w in words]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_target_that_cannot_be_trained_for_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "eagle", "--out", str(tmp_path / "out"), "--target"]
    (tmp_path / "data.txt").write_text("x = 1\n" * 400)
    data = ["--data", str(tmp_path / "data.txt")]
    pair, endless = tmp_path / "pair", tmp_path / "endless"
    config = tf.BartConfig(vocab_size=8, d_model=16, encoder_layers=1, decoder_layers=1)
    tf.BartForConditionalGeneration(config).save_pretrained(pair)
    shutil.copytree(folder, endless)
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(endless)
    capsys.readouterr()
    for target, more, message in [
        (pair, [], "an encoder-decoder needs a source"),
        (endless, [], "no end-of-text token"),
        (folder, ["--plan", "sequence_length=300"], "longer than the target's context of 256"),
    ]:
        assert main([*words, str(target), *data, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.txt").write_text("x = 1\n" * 400)
    out = tmp_path / "drafter"
    words = ["train", "eagle", "--target", str(folder), "--data", str(tmp_path / "data.txt")]
    words += ["--out", str(out), "--steps", "6", "--plan", "batch_size=2"]
    words += ["--plan", "sequence_length=24"]
    step = DraftTraining._take_step

    def stop(self: DraftTraining) -> None:
        step(self)
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(DraftTraining, "_take_step", stop)
        assert main(words) == 130
    state = out.with_name("drafter.unfinished.safetensors")
    assert state.exists() and not out.exists()
    assert main(words) == 0
    assert out.exists() and not state.exists()
