"""Texts as vectors: an encoder, a pooling, and what may follow.

::

    texts ──tokenizer──▶ ids [B, T] ──encoder──▶ states [B, T, D] ──pooling──▶ [B, D] ─dense─norm─▶

On disk an embedder is a folder that ``SentenceTransformer(folder)`` opens, and theirs are opened
here; neither needs the other's package. Class names in such a folder are looked up in a table and
never imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from isthmus.errors import (
    BrokenFileError,
    InvalidInputError,
    UnknownNameError,
    UnsupportedModelError,
)
from isthmus.folders import check_replaceable, published

Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""How states become one vector: the first token that is no padding, the largest value, the mean,
the sum over the root of the length, the mean weighted by position, the last token."""

_MODE_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {
    "Identity": ("torch.nn.modules.linear.Identity", nn.Identity),
    "Tanh": ("torch.nn.modules.activation.Tanh", nn.Tanh),
    "ReLU": ("torch.nn.modules.activation.ReLU", nn.ReLU),
    "GELU": ("torch.nn.modules.activation.GELU", nn.GELU),
    "SiLU": ("torch.nn.modules.activation.SiLU", nn.SiLU),
}
MODULES = "modules.json"
MAX_JSON = 2**24
"""Largest file of settings that is read, in bytes."""


def pool(states: torch.Tensor, mask: torch.Tensor, mode: Mode) -> torch.Tensor:
    """States of tokens as one vector, whichever side the padding is on.

    Args:
        states: [B, T, D].
        mask: 1 where a token counts, [B, T]; at least one in every row.
        mode: See :data:`Mode`.

    Returns:
        [B, D].

    Raises:
        UnknownNameError: No such mode.
        InvalidInputError: No token of a row counts.

    Example:
        >>> states = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> [float(pool(states, mask, mode)) for mode in ("cls", "lasttoken", "max", "mean")]
        [1.0, 3.0, 3.0, 2.0]
        >>> round(float(pool(states, mask, "weightedmean")), 4)  # (1 * 1 + 2 * 3) / 3
        2.3333
    """
    counts = mask.sum(1)
    if not bool((counts > 0).all()):
        raise InvalidInputError("a text has no token to make a vector of")
    rows, place = torch.arange(len(mask), device=mask.device), mask.cumsum(1)
    weights = mask.to(states.dtype)
    if mode == "cls":
        return states[rows, mask.int().argmax(1)]
    if mode == "lasttoken":
        return states[rows, place.argmax(1)]
    if mode == "max":
        return states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    if mode == "mean":
        total = counts
    elif mode == "mean_sqrt_len_tokens":
        total = counts.sqrt()
    elif mode == "weightedmean":
        weights = weights * place
        total = weights.sum(1)
    else:
        raise UnknownNameError("pooling", mode, get_args(Mode))
    return (states * weights[..., None]).sum(1) / total[:, None].to(states.dtype)


class Dense(nn.Module):
    """A linear layer and an activation behind the pooling.

    Args:
        in_features: Width of what comes in.
        out_features: Width of what goes out.
        bias: Whether there is one.
        activation: ``Identity``, ``Tanh``, ``ReLU``, ``GELU`` or ``SiLU``.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: str = "Identity"
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise UnknownNameError("activation", activation, _ACTIVATIONS)
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation, self.act = activation, _ACTIVATIONS[activation][1]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., E]."""
        y: torch.Tensor = self.act(self.linear(x))
        return y


class Embedder(nn.Module):
    """Texts as vectors.

    Args:
        encoder: A transformer of transformers, without a head.
        tokenizer: Its tokenizer.
        pooling: A mode, or several whose vectors are put side by side.
        dense: A layer behind the pooling.
        normalize: Whether vectors have length 1.
        prompts: What is put before a text, by name, such as ``query`` and ``document``.
        default_prompt: Name of the prompt that is used where none is given.
        include_prompt: Whether tokens of the prompt count in the pooling.
        max_length: Longest text in tokens; longer ones are cut.
        similarity: ``cosine`` or ``dot``, for those who compare vectors.
    """

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        *,
        pooling: Mode | Sequence[Mode] = "mean",
        dense: Dense | None = None,
        normalize: bool = True,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
        include_prompt: bool = True,
        max_length: int | None = None,
        similarity: Literal["cosine", "dot"] = "cosine",
    ) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.dense = encoder, tokenizer, dense
        self.pooling = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        for mode in self.pooling:
            if mode not in get_args(Mode):
                raise UnknownNameError("pooling", mode, get_args(Mode))
        self.normalize, self.prompts = normalize, dict(prompts or {})
        self.default_prompt, self.include_prompt = default_prompt, include_prompt
        limit = getattr(encoder.config, "max_position_embeddings", None)
        self.max_length = max_length or min(limit or 512, tokenizer.model_max_length)
        self.similarity = similarity

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        if self.dense is not None:
            return self.dense.linear.out_features
        return int(self.encoder.config.hidden_size) * len(self.pooling)

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> dict[str, torch.Tensor]:
        """Ids and masks of texts; ``pooled`` [B, T] says which tokens count in the pooling."""
        found = self.tokenizer(
            [prompt + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        mask = found["attention_mask"]
        pooled = mask
        if prompt and not self.include_prompt:
            # as many tokens as the prompt alone has, what may end a text not counted
            head = self.tokenizer(prompt)["input_ids"]
            ends = (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id)
            length = len(head) - (len(head) > 0 and head[-1] in ends)
            pooled = mask * (mask.cumsum(1) > length)
        device = next(self.encoder.parameters()).device
        batch = {"input_ids": found["input_ids"], "attention_mask": mask, "pooled": pooled}
        return {name: value.to(device) for name, value in batch.items()}

    def states(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """States of all tokens [B, T, D]."""
        out = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        states: torch.Tensor = out.last_hidden_state
        return states

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Vectors [B, E] of a batch of :meth:`tokenize`."""
        states = self.states(batch)
        x = torch.cat([pool(states, batch["pooled"], mode) for mode in self.pooling], -1)
        x = x if self.dense is None else self.dense(x)
        return nn.functional.normalize(x, dim=-1) if self.normalize else x

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        batch_size: int = 32,
        truncate: int | None = None,
    ) -> NDArray[np.float32]:
        """Vectors of texts, float32 [N, E], in their order; long texts are read together.

        Args:
            texts: Texts.
            prompt_name: Which of the prompts; the default one when None.
            batch_size: Texts read at a time.
            truncate: Keep so many numbers of each vector, for models that were trained for it.

        Raises:
            UnknownNameError: No such prompt.
        """
        name = self.default_prompt if prompt_name is None else prompt_name
        if name is not None and name not in self.prompts:
            raise UnknownNameError("prompt", name, self.prompts)
        prompt = "" if name is None else self.prompts[name]
        was, width = self.training, truncate or self.width
        self.eval()
        found = np.empty((len(texts), width), np.float32)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            x = self(self.tokenize([texts[i] for i in rows], prompt)).float()[:, :width]
            if truncate and self.normalize:
                x = nn.functional.normalize(x, dim=-1)
            found[rows] = x.cpu().numpy()
        self.train(was)
        return found

    # files ------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``SentenceTransformer(folder)`` opens.

        Raises:
            InvalidInputError: The folder holds something else.
            BrokenFileError: It cannot be written.
        """
        folder = Path(folder)
        check_replaceable(folder, (MODULES,), "embedder")
        with published(folder) as part:
            self.write(part)

    def write(self, folder: Path) -> None:
        """Write the files into a folder that is there."""
        self.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        told: dict[str, Any] = {
            "word_embedding_dimension": int(self.encoder.config.hidden_size),
            **{key: mode in self.pooling for key, mode in _MODE_KEYS.items()},
            "include_prompt": self.include_prompt,
        }
        if self.pooling != tuple(m for m in _MODE_KEYS.values() if m in self.pooling):
            # only newer versions of that package know another order
            told = {
                "embedding_dimension": told["word_embedding_dimension"],
                "pooling_mode": list(self.pooling),
                "include_prompt": self.include_prompt,
            }
        _write(folder / "1_Pooling" / "config.json", told)
        if self.dense is not None:
            modules.append(("2_Dense", "Dense"))
            linear = self.dense.linear
            told = {
                "in_features": linear.in_features,
                "out_features": linear.out_features,
                "bias": linear.bias is not None,
                "activation_function": _ACTIVATIONS[self.dense.activation][0],
            }
            _write(folder / "2_Dense" / "config.json", told)
            weights = {k: v.detach().cpu().contiguous() for k, v in self.dense.state_dict().items()}
            save_file(weights, folder / "2_Dense" / "model.safetensors")
        if self.normalize:
            modules.append((f"{len(modules)}_Normalize", "Normalize"))
            (folder / modules[-1][0]).mkdir()
        _write(
            folder / MODULES,
            [
                {
                    "idx": i,
                    "name": str(i),
                    "path": path,
                    "type": f"sentence_transformers.models.{t}",
                }
                for i, (path, t) in enumerate(modules)
            ],
        )
        _write(
            folder / "sentence_bert_config.json",
            {"max_seq_length": self.max_length, "do_lower_case": False},
        )
        _write(
            folder / "config_sentence_transformers.json",
            {
                "model_type": "SentenceTransformer",
                "prompts": self.prompts,
                "default_prompt_name": self.default_prompt,
                "similarity_fn_name": self.similarity,
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Open a folder of an embedder, or of a plain encoder, whose states are then averaged.

        Raises:
            BrokenFileError: A file is missing or damaged.
            UnsupportedModelError: It brings code of its own, or a module that is not known here.
        """
        folder = Path(folder)
        config = _read(folder / "config.json")
        if "auto_map" in config:
            raise UnsupportedModelError(
                f"{folder} brings code of its own, which is not run here; load its encoder with "
                "transformers and trust_remote_code=True, and give it to Embedder"
            )
        modules = _read(folder / MODULES) if (folder / MODULES).exists() else []
        options: dict[str, Any] = {"normalize": False} if modules else {}
        try:
            for module in modules:
                kind, where = module["type"].rsplit(".", 1)[-1], folder / module["path"]
                if folder.resolve() not in (where.resolve(), *where.resolve().parents):
                    raise ValueError(f"{module['path']!r} leads out of the folder")
                options |= _module(kind, where)
            told = _optional(folder / "sentence_bert_config.json")
            options["max_length"] = told.get("max_seq_length")
            told = _optional(folder / "config_sentence_transformers.json")
            options["prompts"] = told.get("prompts") or {}
            options["default_prompt"] = told.get("default_prompt_name")
            options["similarity"] = "dot" if told.get("similarity_fn_name") == "dot" else "cosine"
            encoder: Any = transformers.AutoModel.from_pretrained(
                folder, dtype="auto", local_files_only=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise BrokenFileError(f"the embedder in {folder} cannot be read ({first})") from error
        return cls(encoder.eval(), tokenizer, **options).eval()


def _module(kind: str, where: Path) -> dict[str, Any]:
    """What a module of a folder says to the constructor."""
    if kind == "Transformer":
        return {}
    if kind == "Normalize":
        return {"normalize": True}
    if kind == "Pooling":
        told = _read(where / "config.json")
        modes = told.get("pooling_mode")  # the newer form
        if modes is None:
            modes = [mode for key, mode in _MODE_KEYS.items() if told.get(key)]
        return {"pooling": modes, "include_prompt": told.get("include_prompt", True)}
    if kind == "Dense":
        told = _read(where / "config.json")
        activation = told["activation_function"].rsplit(".", 1)[-1]
        dense = Dense(told["in_features"], told["out_features"], told["bias"], activation)
        dense.load_state_dict(load_file(where / "model.safetensors"))
        return {"dense": dense}
    raise UnsupportedModelError(
        f"{where.parent} has a module {kind}; known are Transformer, Pooling, Dense and Normalize"
    )


def _write(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _optional(path: Path) -> dict[str, Any]:
    return dict(_read(path)) if path.exists() else {}


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON:
            raise BrokenFileError(f"{path} is too large for a file of settings")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenFileError(
            f"{path.parent} holds no embedder ({path.name} is missing); give the folder of an "
            "encoder of transformers or of sentence-transformers"
        ) from None
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{path} is damaged ({error})") from error
