"""The Python doors: load, generate, stream, and the plug for transformers' ``generate``."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

import isthmus
from isthmus import registry
from isthmus.api import Model
from isthmus.cli.main import main
from isthmus.decoding.drafters import PromptLookup
from isthmus.decoding.generation import Generation
from isthmus.decoding.policy import Fixed
from isthmus.decoding.tree import TokenTree
from isthmus.errors import (
    BrokenFileError,
    InvalidInputError,
    MismatchError,
    UnknownNameError,
    UnsupportedModelError,
)
from isthmus.roles import Context, Shape, Verdict
from isthmus.workbench import pycode

DRAFTERS = ("none", "prompt-lookup", "token-recycling", "auto")


@pytest.fixture(scope="module")
def embedded() -> Model:
    return isthmus.load(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompt(embedded: Model) -> str:
    ids = pycode.prompts(1, embedded.tokenizer, 64)[0]
    text: str = embedded.tokenizer.decode(ids)
    return text


@pytest.fixture
def checkpoint(tmp_path: Path, embedded: Model) -> Path:
    """A small checkpoint on disk with the embedded model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    embedded.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_embedded_model_writes_what_transformers_writes(
    embedded: Model, prompt: str, drafter: str
) -> None:
    ids = embedded.encode(prompt)
    want = embedded.target.model.generate(
        ids[None], attention_mask=torch.ones(1, len(ids)), max_new_tokens=48, do_sample=False
    )[0, len(ids) :].tolist()
    got = embedded.generate(prompt, max_new_tokens=48, drafter=drafter)
    assert got.tokens == want
    assert got.stats.new_tokens == len(want) == sum(r.emitted for r in got.rounds)
    assert got.stats.target_forwards == len(got.rounds)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_stream_is_the_text(embedded: Model, prompt: str, drafter: str) -> None:
    whole = embedded.generate(prompt, max_new_tokens=40, drafter=drafter).text
    assert "".join(embedded.stream(prompt, max_new_tokens=40, drafter=drafter)) == whole
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = "".join(embedded.stream(prompt, max_new_tokens=40, drafter=drafter, stop=[middle]))
    assert cut == whole[: whole.index(middle)]
    assert embedded.last.finish_reason == "stop"


def test_seeds_repeat_and_differ(embedded: Model, prompt: str) -> None:
    def draw(seed: int) -> list[int]:
        tokens: list[int] = embedded.generate(
            prompt, max_new_tokens=24, temperature=1.0, seed=seed, drafter="token-recycling"
        ).tokens
        return tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


class _After(StoppingCriteria):
    """Stop right after a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_custom_generate_is_generate(embedded: Model, prompt: str, drafter: str) -> None:
    model = embedded.target.model
    ids = torch.stack([embedded.encode(prompt)[:40], embedded.encode(prompt)[8:48]])
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 32,
        "do_sample": False,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 4,
    }
    want = model.generate(ids, **options)
    got = model.generate(ids, **options, custom_generate=isthmus.custom_generate(drafter))
    assert torch.equal(got, want)


def test_custom_generate_stops_in_the_middle_of_a_block(embedded: Model, prompt: str) -> None:
    model = embedded.target.model
    ids = embedded.encode(prompt)[None]
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 40}
    plain = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    criteria = StoppingCriteriaList([_After(plain[20])])
    want = model.generate(ids, **options, stopping_criteria=criteria)
    for drafter in DRAFTERS:
        plug = isthmus.custom_generate(drafter)
        got = model.generate(ids, **options, stopping_criteria=criteria, custom_generate=plug)
        assert torch.equal(got, want)


def test_custom_generate_refuses_what_it_cannot_do(embedded: Model, prompt: str) -> None:
    with pytest.raises(UnknownNameError, match="auto"):
        isthmus.custom_generate("autoo")
    ids = embedded.encode(prompt)[None]
    with pytest.raises(InvalidInputError, match="num_beams"):
        embedded.target.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            num_beams=2,
            custom_generate=isthmus.custom_generate("none"),
        )


def test_unknown_names(embedded: Model, checkpoint: Path) -> None:
    with pytest.raises(UnknownNameError, match="token-recycling"):
        embedded.generate("x", drafter="token-recyclin")
    with pytest.raises(UnknownNameError, match="float32"):
        isthmus.load(checkpoint, dtype="float31")
    with pytest.raises(InvalidInputError, match="cpu"):
        isthmus.load(checkpoint, device="tpu9")
    with pytest.raises(UnknownNameError, match="no folder here"):
        isthmus.load("nobody/nothing")


def test_bad_prompts(embedded: Model, checkpoint: Path) -> None:
    with pytest.raises(InvalidInputError, match="empty"):
        embedded.generate("")
    with pytest.raises(InvalidInputError, match="context is 64"):
        isthmus.load(checkpoint).generate([1] * 64)
    with pytest.raises(InvalidInputError, match="vocabulary"):
        embedded.generate([5000])
    with pytest.raises(InvalidInputError, match="draft model"):
        embedded.generate("x", drafter="speculative-sampling")
    cut = isthmus.load(checkpoint).generate([1] * 60, max_new_tokens=40, ignore_end=True)
    assert len(cut.tokens) == 4 and "cut" in cut.notes[0]


def test_damaged_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BrokenFileError, match="cannot be read"):
        isthmus.load(checkpoint)
    assert weights.read_bytes() == whole[: len(whole) // 2]  # nothing on disk is touched
    weights.unlink()
    with pytest.raises(BrokenFileError):
        isthmus.load(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(BrokenFileError):
        isthmus.load(checkpoint)
    with pytest.raises(BrokenFileError, match=r"config\.json"):
        isthmus.load(tmp_path)


def test_a_model_that_does_not_generate_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "vit"
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="vit"):
        isthmus.load(checkpoint)


def test_a_draft_model_with_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(other)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    model = vocabulary["model"]["vocab"]
    a, b = list(model)[300:302]
    model[a], model[b] = model[b], model[a]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(MismatchError, match="same family"):
        isthmus.load(checkpoint, draft_model=other)


class Shout:
    """A strategy: its own loop, and not the model's own text."""

    role = "strategy"

    @classmethod
    def for_model(cls, model: Model) -> "Shout":
        return cls()

    def generate(
        self, ids: torch.Tensor, *, max_new_tokens: int, temperature: float = 0.0, seed: int | None
    ) -> Generation:
        return Generation(tokens=[5] * max_new_tokens, lossless=False, finish_reason="length")


def test_a_strategy_decodes_in_its_own_loop(
    embedded: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = registry.load
    monkeypatch.setattr(
        registry, "load", lambda slug: Shout if slug == "token-recycling" else load(slug)
    )
    two = embedded.generate(["a", "b"], max_new_tokens=3, drafter="token-recycling")
    assert [g.tokens for g in two] == [[5, 5, 5]] * 2 and two[0].drafter == "token-recycling"
    text = "".join(embedded.stream("a", max_new_tokens=3, drafter="token-recycling"))
    assert text == embedded.tokenizer.decode([5, 5, 5]) == embedded.last.text
    with pytest.raises(InvalidInputError, match="takes no stop, num_draft_tokens, top_k"):
        embedded.generate("a", drafter="token-recycling", stop=["x"], top_k=3, num_draft_tokens=4)
    assert main(["generate", "a", "--drafter", "token-recycling", "-n", "2"]) == 0
    assert "lossless: no" in capsys.readouterr().err


def test_a_drafter_may_bring_its_own_acceptance_rule(embedded: Model) -> None:
    class Never:
        """Accepts nothing and says so."""

        lossless = False

        def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
            return Verdict(torch.zeros(tree.batch, 1, dtype=torch.int64), logits[:, 0].argmax(-1))

    class Own(PromptLookup):
        acceptance = Never()

    policy = Fixed(Own(), Shape(4, 4, 1))
    out = embedded.generate("a b a b a b", max_new_tokens=6, drafter=policy)
    assert not out.lossless and out.stats.target_forwards == 6
    assert embedded.generate("a b a b a b", max_new_tokens=6, drafter="prompt-lookup").lossless
