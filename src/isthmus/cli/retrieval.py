"""``isthmus embed``, ``isthmus index`` and ``isthmus search``."""

from __future__ import annotations

import functools
import json as json_module
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from isthmus.cli.output import console, print_json, quiet_transformers
from isthmus.errors import BrokenFileError, InvalidInputError, UnknownNameError
from isthmus.roles import TermWeigher

_Maker = Callable[[Sequence[str], str], Any] | None


def embed(
    model: str,
    /,
    *texts: str,
    file: Annotated[tuple[Path, ...], Parameter(name=["--file", "-f"], negative="")] = (),
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    prompt: str = "",
    truncate: int = 0,
    batch_size: int = 32,
) -> int:
    """Make vectors of texts.

    Texts come from the arguments, from files, or one a line from standard input.

    Args:
        model: Folder or hub id of an embedding model, of sentence-transformers or of isthmus, or
            of an encoder of transformers, whose states are then averaged.
        texts: Texts.
        file: Files or folders of texts: .txt .md .rst .py (a text each), .jsonl with "text".
        out: Where to: .npy (an array), .safetensors (tensor "vectors"), or .jsonl (an object with
            id, text and vector a line); without it, JSON lines on standard output.
        prompt: Name of one of the model's prompts, such as query.
        truncate: Numbers of a vector to keep; 0 is all.
        batch_size: Texts read at a time.
    """
    if batch_size < 1 or truncate < 0:
        raise InvalidInputError("--batch-size must be at least 1, and --truncate not negative")
    if out is not None and out.suffix not in (".npy", ".safetensors", ".jsonl"):
        raise InvalidInputError(f"--out must end in .npy, .safetensors or .jsonl, got {out}")
    documents = _texts(texts, file)
    embedder = _embedder(model)
    if truncate > embedder.width:
        raise InvalidInputError(f"vectors of {model} have {embedder.width} numbers, not {truncate}")
    vectors = embedder.encode(
        list(documents.values()),
        prompt_name=prompt or None,
        batch_size=batch_size,
        truncate=truncate or None,
    )
    if out is not None and out.suffix != ".jsonl":
        _write_array(out, vectors)
    else:
        rows = zip(documents.items(), vectors.tolist(), strict=True)
        lines = (json_module.dumps({"id": i, "text": t, "vector": v}) + "\n" for (i, t), v in rows)
        if out is None:
            sys.stdout.writelines(lines)
            return 0
        _replace(out, lambda part: part.write_text("".join(lines), encoding="utf-8"))
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers in {out}", file=sys.stderr)
    return 0


def index(
    *paths: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    model: Annotated[str, Parameter(name=["--model", "-m"])] = "",
    words: int = 0,
    graph: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Make documents searchable, by words (BM25) and, with a model, by meaning.

    A model that weighs terms, such as a trained retromae2, adds an index of these.

    Args:
        paths: Files or folders of documents: .txt .md .rst .py (one each), .jsonl with a field
            "text" and perhaps "id" a line.
        out: Folder to write; an older index there is replaced at the end.
        model: Embedding model, as for isthmus embed.
        words: Cut documents into passages of so many words; 0 cuts nothing.
        graph: Search vectors by a graph of neighbours: faster for many documents, not exact.
    """
    from isthmus.folders import check_replaceable
    from isthmus.indexes.collection import CONFIG, Collection, read_documents

    if words < 0:
        raise InvalidInputError(f"--words must not be negative, got {words}")
    check_replaceable(out, (CONFIG,), "collection")
    documents = read_documents(paths, words=words)
    if graph and not model:
        raise InvalidInputError("--graph is for vectors; give a --model, too")
    name = str(Path(model).resolve()) if model and Path(model).is_dir() else model
    embedding, weighing = (maker(model) for maker in _makers()) if model else (None, None)
    Collection(documents, embedding, weigh=weighing, model=name, graph=graph).save(out)
    print(f"{len(documents)} documents in {out}", file=sys.stderr)
    return 0


def search(
    folder: Path,
    query: str,
    /,
    *,
    k: Annotated[int, Parameter(name=["--top", "-k"])] = 10,
    mode: Literal["auto", "sparse", "dense", "learned", "hybrid"] = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Find the documents that answer a query.

    Args:
        folder: Folder made by isthmus index.
        query: What is looked for; - reads it from standard input.
        k: Documents to show at most.
        mode: sparse (BM25), dense (vectors), learned (terms that the model weighs), hybrid (all
            that are there); auto is hybrid where there is a model.
        json: Print one JSON object and nothing else on standard output.
    """
    from isthmus.indexes.collection import Collection

    if k < 1:
        raise InvalidInputError(f"--top must be at least 1, got {k}")
    query = sys.stdin.read() if query == "-" else query
    collection = Collection.load(folder, *(() if mode == "sparse" else _makers()))
    hits = collection.search(query, k, mode=mode)
    if json:
        rows = [{"id": h.id, "score": h.score, "text": h.text} for h in hits]
        print_json({"query": query, "mode": mode, "hits": rows})
        return 0
    screen = console()
    for number, hit in enumerate(hits, 1):
        screen.print(f"{number:3d}  {hit.score:8.4f}  {hit.id}")
        screen.print(f"     {' '.join(hit.text.split())[:140]}")
    if not hits:
        print("nothing found", file=sys.stderr)
    return 0


def _texts(texts: Sequence[str], files: Sequence[Path]) -> dict[str, str]:
    if texts and files:
        raise InvalidInputError("give texts as arguments or with --file, not both")
    if files:
        from isthmus.indexes.collection import read_documents

        return read_documents(files)
    if not texts and not sys.stdin.isatty():
        texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        raise InvalidInputError(
            "there is no text; give some as arguments, with --file, or on standard input"
        )
    return {str(number): text for number, text in enumerate(texts)}


def _embedder(model: str) -> Any:
    quiet_transformers()
    from isthmus.models.embedder import Embedder

    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]
                )
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise UnknownNameError(
                "embedding model", model, [], hint=f"it is no folder, and the hub says: {first}"
            ) from error
    return Embedder.from_pretrained(folder)


def _weigher(model: str) -> TermWeigher | None:
    """The trained system in a folder, where it weighs terms."""
    from isthmus import registry
    from isthmus.training.system import CONFIG, read_config

    if not (Path(model) / CONFIG).is_file():
        return None
    kind: Any = registry.load(read_config(Path(model))["system"])
    return kind.from_pretrained(model) if hasattr(kind, "weigh") else None


def _makers() -> tuple[Callable[[str], _Maker], Callable[[str], _Maker]]:
    """From a model's name to what makes vectors, and to what weighs terms; it is loaded once."""
    weigher_of = functools.cache(_weigher)
    return functools.partial(_vectors, weigher_of), functools.partial(_terms, weigher_of)


def _vectors(weigher_of: Callable[[str], TermWeigher | None], model: str) -> _Maker:
    """What makes vectors of texts; prompts named query, document or passage are used."""
    weigher = weigher_of(model)
    if weigher is not None and "dense" not in weigher.searched:
        return None
    embedder = _embedder(model)

    def vectors(texts: Sequence[str], side: str) -> Any:
        names = ("query",) if side == "query" else ("document", "passage")
        name = next((n for n in names if n in embedder.prompts), None)
        return embedder.encode(texts, prompt_name=name)

    return vectors


def _terms(weigher_of: Callable[[str], TermWeigher | None], model: str) -> _Maker:
    """What weighs the terms of texts."""
    weigher = weigher_of(model)
    return weigher.weigh if weigher is not None and "sparse" in weigher.searched else None


def _write_array(out: Path, vectors: Any) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    def write(part: Path) -> None:
        if out.suffix == ".npy":
            with part.open("wb") as file:
                np.save(file, vectors, allow_pickle=False)
        else:
            save_file({"vectors": vectors}, part)

    _replace(out, write)


def _replace(out: Path, write: Callable[[Path], Any]) -> None:
    part = out.with_name(f".{out.name}.part")
    try:
        write(part)
        part.replace(out)
    except OSError as error:
        raise BrokenFileError(f"{out} cannot be written ({error.strerror})") from error
