"""``isthmus embed``, ``isthmus index`` and ``isthmus search`` as a person meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from isthmus.cli.main import main
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.indexes.collection import Collection, read_documents

sys.path.insert(0, str(Path(__file__).parent / "models"))
from test_embedder import embedder

DOCUMENTS = {
    "a": "read a file line by line",
    "b": "open a socket and listen",
    "c": "w1 w2 w3",
    "d": "w7 w8 and w9",
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(DOCUMENTS["a"])
    (folder / "deep" / "b.md").write_text(DOCUMENTS["b"])
    rows = [{"id": i, "text": DOCUMENTS[i]} for i in "cd"]
    (folder / "more.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    embedder(prompts={"query": "query: "}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_words_find_documents(files: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "index"
    for _ in range(2):
        assert main(["index", str(files), "-o", str(out)]) == 0
    assert "4 documents" in capsys.readouterr().err
    assert main(["search", str(out), "readLine of files", "-k", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[::2] == ["1", "a.txt"] and shown[1].strip() == DOCUMENTS["a"]
    assert main(["search", str(out), "listen", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [h["id"] for h in found["hits"]] == ["deep/b.md"]
    assert main(["search", str(out), "unheard"]) == 0
    assert "nothing found" in capsys.readouterr().err


def test_vectors_find_documents(files: Path, model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "index"
    assert main(["index", str(files), "-o", str(out), "-m", str(model)]) == 0
    capsys.readouterr()
    ids = {}
    for mode in ("dense", "hybrid", "sparse", "auto"):
        assert main(["search", str(out), "w3 w2", "--mode", mode, "--json"]) == 0
        ids[mode] = [h["id"] for h in json.loads(capsys.readouterr().out)["hits"]]
    assert ids["auto"] == ids["hybrid"] and ids["sparse"] == ["c", "d"]
    assert len(ids["dense"]) == len(ids["hybrid"]) == 4
    texts = {**{"a.txt": "a", "deep/b.md": "b"}, "c": "c", "d": "d"}
    encoder = embedder(prompts={"query": "query: "})
    query = encoder.encode(["w3 w2"], prompt_name="query")[0]
    scores = {i: float(encoder.encode([DOCUMENTS[k]])[0] @ query) for i, k in texts.items()}
    assert ids["dense"] == sorted(scores, key=lambda i: -scores[i])


def test_another_model_in_the_same_place_is_noticed(files, model, tmp_path, capsys) -> None:
    out = tmp_path / "index"
    main(["index", str(files), "-o", str(out), "-m", str(model)])
    embedder(seed=1).save_pretrained(model)
    assert main(["search", str(out), "w1"]) == 2
    assert "other vectors" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".jsonl", ""])
def test_embed(model: Path, tmp_path: Path, capsys, suffix: str) -> None:
    out = tmp_path / f"vectors{suffix}"
    where = ["-o", str(out)] if suffix else []
    assert main(["embed", str(model), "w1 w2", "w5", *where, "--prompt", "query"]) == 0
    told = capsys.readouterr()
    if suffix == ".npy":
        found = np.lib.format.open_memmap(out, mode="r")
    elif suffix == ".safetensors":
        found = load_file(out)["vectors"]
    else:
        rows = [json.loads(s) for s in (out.read_text() if suffix else told.out).splitlines()]
        assert [r["text"] for r in rows] == ["w1 w2", "w5"]
        found = np.array([r["vector"] for r in rows], np.float32)
    expected = embedder(prompts={"query": "query: "}).encode(["w1 w2", "w5"], prompt_name="query")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not list(tmp_path.glob(".*.part"))


def test_errors_are_one_line(files: Path, model: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "index")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    main(["index", str(files), "-o", out])
    capsys.readouterr()
    for words, says in (
        (["index", str(tmp_path / "none"), "-o", out], "cannot be read"),
        (["index", str(tmp_path / "bad.jsonl"), "-o", out], "bad.jsonl, line 2"),
        (["index", str(files), "-o", str(files)], "no collection"),
        (["index", str(files), "-o", out, "--graph"], "--model"),
        (["search", out, " "], "query is empty"),
        (["search", out, "x", "-k", "0"], "at least 1"),
        (["search", out, "x", "--mode", "dense"], "no vectors"),
        (["search", str(tmp_path), "x"], "collection.json is missing"),
        (["embed", str(model), "x", "-o", "x.csv"], ".npy"),
        (["embed", str(model), "x", "--truncate", "99"], "16 numbers"),
        (["embed", str(model), "x", "--prompt", "qery"], "query"),
        (["embed", str(tmp_path), "x"], "holds no embedder"),
    ):
        assert main(words) == 2, words
        told = capsys.readouterr()
        assert len(told.err.strip().splitlines()) == 1 and says in told.err, told.err
        assert not told.out


def test_documents_are_cut_into_passages(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one two three four five")
    found = read_documents([tmp_path], words=2)
    assert found == {"x.txt#1": "one two", "x.txt#2": "three four", "x.txt#3": "five"}
    assert read_documents([tmp_path], words=5) == {"x.txt": "one two three four five"}
    (tmp_path / "y.jsonl").write_text('{"id": "x.txt", "text": "again"}\n')
    for words in (0, 2):
        with pytest.raises(InvalidInputError, match="two documents have the id"):
            read_documents([tmp_path], words=words)


def test_altered_collections_are_refused(tmp_path: Path) -> None:
    def embed(texts, side):
        return np.array([[len(t), 1.0] for t in texts], np.float32)

    folder = tmp_path / "c"
    collection = Collection(DOCUMENTS, embed, model="lengths")
    collection.save(folder)
    again = Collection.load(folder, lambda name: embed)
    assert again.search("file") == collection.search("file")
    with pytest.raises(MismatchError, match="lengths makes other vectors"):
        Collection.load(folder, lambda name: lambda t, s: 2 * embed(t, s))
    with (folder / "documents.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(BrokenFileError, match="altered"):
        Collection.load(folder)
    collection.save(folder)
    Collection({"x": "y"}).sparse.save(folder / "sparse")
    with pytest.raises(BrokenFileError, match="other documents"):
        Collection.load(folder)
    with pytest.raises(InvalidInputError, match="at least one"):
        Collection({})
