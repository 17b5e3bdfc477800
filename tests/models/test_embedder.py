"""Texts as vectors; the folder beside that of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from isthmus.errors import (
    BrokenFileError,
    InvalidInputError,
    UnknownNameError,
    UnsupportedModelError,
)
from isthmus.models.embedder import Dense, Embedder, pool
from isthmus.workbench.tokenizer import word_tokenizer

WORDS = ["<end>", "<cls>", "query:", *(f"w{i}" for i in range(40))]
TEXTS = ["w1 w2 w3 w4 w5", "w7", "w9 w9 w30", "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12", "w2 w1"]
MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")


def embedder(seed: int = 0, **options) -> Embedder:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    encoder = transformers.BertModel(config, add_pooling_layer=False).eval()
    tokenizer = word_tokenizer(WORDS)
    tokenizer.model_max_length = 16
    return Embedder(encoder, tokenizer, **options).eval()


@pytest.mark.parametrize("mode", MODES)
def test_padding_on_either_side_changes_nothing(mode: str) -> None:
    states, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    right = pool(states, mask, mode)
    left = pool(states[:, [3, 4, 0, 1, 2]], mask[:, [3, 4, 0, 1, 2]], mode)
    torch.testing.assert_close(left[0], right[0])
    torch.testing.assert_close(pool(states[:1, :3], mask[:1, :3], mode)[0], right[0])
    same = pool(torch.ones(1, 4, 3), torch.ones(1, 4, dtype=torch.long), mode)
    torch.testing.assert_close(same, torch.ones(1, 3) * (2 if "sqrt" in mode else 1))


def test_pooling_refuses() -> None:
    with pytest.raises(InvalidInputError, match="no token"):
        pool(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), "mean")
    with pytest.raises(UnknownNameError, match="'mean'"):
        embedder(pooling="meen")


@pytest.mark.parametrize("mode", MODES)
def test_a_text_has_one_vector_whatever_it_is_read_with(mode: str) -> None:
    model = embedder(pooling=mode)
    together = model.encode(TEXTS)
    alone = np.concatenate([model.encode([t]) for t in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=2), together, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_prompts_and_what_counts() -> None:
    prompts = {"query": "query: "}
    model = embedder(prompts=prompts, include_prompt=False, normalize=False)
    batch = model.tokenize(["w1 w2", "w3"], "query: ")
    assert batch["pooled"].tolist() == [[0, 1, 1], [0, 1, 0]]
    states = model.states(batch)
    expected = torch.stack([states[0, 1:3].mean(0), states[1, 1]]).detach().numpy()
    found = model.encode(["w1 w2", "w3"], prompt_name="query")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.allclose(found, model.encode(["w1 w2", "w3"]), atol=1e-3)
    with pytest.raises(UnknownNameError, match="query"):
        model.encode(["w1"], prompt_name="qery")


def test_truncated_vectors_have_length_1() -> None:
    found = embedder().encode(TEXTS, truncate=4)
    whole = embedder().encode(TEXTS)[:, :4]
    expected = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


KINDS = {
    "mean": {},
    "two": {"pooling": ("max", "mean"), "normalize": False},
    "other order": {"pooling": ("mean", "max"), "normalize": False},
    "dense": {"dense": Dense(16, 6, activation="Tanh")},
    "last": {"pooling": "lasttoken", "similarity": "dot", "max_length": 4},
    "prompt": {"prompts": {"query": "query: "}, "include_prompt": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_files(tmp_path: Path, kind: str) -> None:
    model = embedder(**KINDS[kind])
    for _ in range(2):
        model.save_pretrained(tmp_path / "e")
    again = Embedder.from_pretrained(tmp_path / "e")
    prompt = "query" if kind == "prompt" else None
    expected = model.encode(TEXTS, prompt_name=prompt)
    np.testing.assert_array_equal(again.encode(TEXTS, prompt_name=prompt), expected)
    assert again.similarity == model.similarity and again.max_length == model.max_length


def test_the_folder_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    """Pinned by hand; the next test asks the package where it is installed."""
    embedder(pooling="cls", dense=Dense(16, 6)).save_pretrained(tmp_path / "e")
    read = lambda name: json.loads((tmp_path / "e" / name).read_text())  # noqa: E731
    assert [(m["path"], m["type"]) for m in read("modules.json")] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Dense", "sentence_transformers.models.Dense"),
        ("3_Normalize", "sentence_transformers.models.Normalize"),
    ]
    pooling = read("1_Pooling/config.json")
    assert pooling["word_embedding_dimension"] == 16
    assert [k for k, v in pooling.items() if v is True] == [
        "pooling_mode_cls_token",
        "include_prompt",
    ]
    assert read("2_Dense/config.json") == {
        "in_features": 16,
        "out_features": 6,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    assert set(load_file(tmp_path / "e/2_Dense/model.safetensors")) == {
        "linear.weight",
        "linear.bias",
    }
    assert read("sentence_bert_config.json")["max_seq_length"] == 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_reads_and_writes_the_same(tmp_path: Path, kind: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = embedder(**KINDS[kind])
    model.save_pretrained(tmp_path / "ours")
    theirs = library.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    prompt = "query" if kind == "prompt" else None
    expected = model.encode(TEXTS, prompt_name=prompt)
    found = theirs.encode(TEXTS, prompt_name=prompt)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    theirs.save(str(tmp_path / "theirs"))
    again = Embedder.from_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(again.encode(TEXTS, prompt_name=prompt), expected, atol=1e-6)


def test_a_plain_encoder_is_averaged(tmp_path: Path) -> None:
    model = embedder()
    model.encoder.save_pretrained(tmp_path / "plain")
    model.tokenizer.save_pretrained(tmp_path / "plain")
    found = Embedder.from_pretrained(tmp_path / "plain").encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-6)


def test_what_cannot_be_trusted_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "e"

    def change(name: str, edit) -> None:
        embedder(dense=Dense(16, 6)).save_pretrained(folder)
        path = folder / name
        told = json.loads(path.read_text())
        edit(told)
        path.write_text(json.dumps(told))

    change("config.json", lambda t: t.update(auto_map={"AutoModel": "x.Y"}))
    with pytest.raises(UnsupportedModelError, match="trust_remote_code"):
        Embedder.from_pretrained(folder)
    change("modules.json", lambda t: t[2].update(type="x.LSTM"))
    with pytest.raises(UnsupportedModelError, match="LSTM"):
        Embedder.from_pretrained(folder)
    change("modules.json", lambda t: t[1].update(path="../elsewhere"))
    with pytest.raises(BrokenFileError, match="out of the folder"):
        Embedder.from_pretrained(folder)
    change("2_Dense/config.json", lambda t: t.update(activation_function="os.system"))
    with pytest.raises(UnknownNameError, match="activation"):
        Embedder.from_pretrained(folder)
    embedder().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(BrokenFileError, match="cannot be read"):
        Embedder.from_pretrained(folder)
    with pytest.raises(BrokenFileError, match="holds no embedder"):
        Embedder.from_pretrained(tmp_path)
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InvalidInputError, match="no embedder"):
        embedder().save_pretrained(tmp_path)
