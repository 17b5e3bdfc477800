"""Sparse features of a language model: which few atoms each token's vector is a sum of.

A :class:`~isthmus.lenses.sae.SparseAutoencoder` is trained on the vectors of one site, or one that
was kept is read. It stands for the model only if the model still works with the reconstruction in
place of its own vectors, so that is measured on every run::

    loss recovered = (loss with means - loss with reconstruction) / (loss with means - own loss)

The first token of a text is left out throughout: many models keep a vector of unlike length there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.lenses.explanation import Array, Check, Explanation, identity, visible
from isthmus.lenses.sae import Fit, SaeRecipe, SparseAutoencoder, train_sae
from isthmus.lenses.sites import SiteMap, probe_of
from isthmus.lenses.trace import Change, Intervene, Site, Trace
from isthmus.models.hub import Checkpoint, load_checkpoint
from isthmus.training.tuning import IGNORED, label_loss, logits_of, next_tokens

Read = Callable[[str], tuple[Sequence[str], Sequence[str]]]
"""From the name of a data set to its texts to train on and to measure on."""

_SHOWN, _PLACES, _AROUND, _ROWS = 12, 3, 3, 32


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        data: Texts to train on: a file, a folder, workbench:NAME or hub:NAME; a part is held out.
            Empty: the explained text alone, of which little can be learnt.
        kept: Folder where the trained autoencoder is kept, and read from when it is there.
        site: Canonical name of the site, such as ``resid_post.3``; empty for the middle layer.
        atoms: Codes; 0 for eight times the width.
        active: Codes that are kept of a vector.
        steps: Steps of training.
        tokens: Tokens of the data that are read for training, and a tenth as many to measure.
        length: Tokens to which texts are cut.
        least: Share of the loss that a reconstruction must recover to be shown.
        seed: Of training.
    """

    data: str = ""
    kept: str = ""
    site: str = ""
    atoms: int = 0
    active: int = 16
    steps: int = 600
    tokens: int = 50_000
    length: int = 128
    least: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Spliced:
    """Loss of a model with other vectors at a site, nats a token.

    Attributes:
        own: With its own.
        itself: With its own, put there by the hook.
        means: With their mean everywhere.
        reconstruction: With what the autoencoder makes of them.
    """

    own: float
    itself: float
    means: float
    reconstruction: float

    @property
    def recovered(self) -> float:
        """0: no better than means; 1: untouched. 0 where means cost nothing."""
        cost = self.means - self.own
        return (self.means - self.reconstruction) / cost if cost > 1e-4 else 0.0


class SaeLens:
    """Shows the sparse features of a decoder-only model's tokens.

    Args:
        settings: See :class:`Settings`.
        read: Reads a data set by name; needed for ``data``.

    Raises:
        InvalidInputError: A size is below its least value, or data and nothing that reads it.
    """

    role: ClassVar[str] = "lens"

    def __init__(self, settings: Settings | None = None, read: Read | None = None) -> None:
        self.settings = s = settings or Settings()
        self.read = read
        self.recipe = SaeRecipe(atoms=s.atoms, active=s.active, steps=s.steps, seed=s.seed)
        if s.tokens < 20 or s.length < 3:
            raise InvalidInputError("tokens must be at least 20, and length 3")
        if s.data and read is None:
            raise InvalidInputError("give read=, which reads a data set by its name")

    def open(self, source: str) -> Checkpoint:
        """A decoder-only model: a folder or a hub id."""
        return load_checkpoint(source, dtype="float32", device="cpu")

    def know(self, model: Any) -> tuple[str, Site]:
        """Canonical name and place of the site.

        Raises:
            UnsupportedModelError: The model has an encoder, or layers that cannot be told apart.
            UnknownNameError: It has no such site.
        """
        sites = SiteMap.of(model, probe_of(model))
        if "" not in sites.stacks:
            raise UnsupportedModelError(
                f"{type(model).__name__} has an encoder and a decoder; give a decoder-only model"
            )
        name = self.settings.site or f"resid_post.{(len(sites.stacks['']) - 1) // 2}"
        return name, sites[name]

    def explain(self, subject: Checkpoint, given: str) -> Explanation:
        """The strongest features of each token of a text, or of a UTF-8 file.

        Raises:
            InvalidInputError: No tokenizer, too few tokens, or a file that is no text.
            MismatchError: The reconstruction does not stand for the model's vectors, or the kept
                autoencoder is one of another model or site.
        """
        started = time.perf_counter()
        if subject.tokenizer is None:
            raise InvalidInputError(f"{subject.source} has no tokenizer, so it reads no text")
        model, s = subject.model, self.settings
        name, site = self.know(model)
        text = _text(given)
        ids = subject.tokenizer(text, verbose=False).input_ids[: s.length]
        if len(ids) < 3:
            raise InvalidInputError(f"{len(ids)} tokens are too few; give a longer text")
        shown = [torch.tensor([ids])]
        train, valid = shown, shown
        if s.data and self.read is not None:
            parts = self.read(s.data)
            train, valid = (
                self._batches(subject, texts, count)
                for texts, count in zip(parts, (s.tokens, max(s.tokens // 10, 20)), strict=True)
            )
        told = identity(model)
        x = vectors(model, site, train)
        sae = self._sae(x, told["sha256"], name)
        held = vectors(model, site, valid)
        learnt = sae.measure(x)  # firing of rare features wants many tokens
        fit = replace(sae.measure(held), dead=learnt.dead, firing=learnt.firing)
        cost = splice(model, site, sae, valid)
        z = sae.encode(vectors(model, site, shown))  # [T - 1, m]
        own = vectors(model, site, shown)
        parts_sum = torch.einsum("tm,md->td", z, sae.atoms) / sae.scale + sae.shift / sae.scale
        apart = float((parts_sum - sae(own)).abs().max() / own.abs().max())
        words = [visible(w) for w in subject.tokenizer.convert_ids_to_tokens(ids)][1:]
        strongest = z.abs().amax(0).topk(min(_SHOWN, int((z != 0).any(0).sum()))).indices
        labels = tuple(f"{i} {w}" for i, w in enumerate(words, 1))
        return Explanation(
            method="sae",
            model=told,
            inputs=[text[:2000]],
            target=f"{sae.active} of {len(sae.atoms)} features a token at {name}; their sum "
            f"explains {1 - fit.unexplained:.1%} of the variance",
            arrays={
                "activation": Array(
                    z[:, strongest].T.double().numpy(),
                    ("feature", "token"),
                    (tuple(str(int(i)) for i in strongest), labels),
                    signed=bool((z[:, strongest] < 0).any()),
                )
            },
            tables={
                "how well features stand for the model": [
                    _numbers(fit, cost, sum(int(_there(b).sum()) for b in valid), bool(s.data))
                ],
                "strongest features of each token": _each_token(z, words),
                "where the strongest features fire most": self._places(
                    subject, sae, strongest, fit, x, train
                ),
            },
            checks=[
                Check(
                    "loss with its own vectors put back, less its own",
                    abs(cost.itself - cost.own),
                    1e-5,
                ),
                Check("sum of the features less the reconstruction, of the largest", apart, 1e-4),
                Check("share of the loss not recovered", 1 - cost.recovered, 1 - s.least),
            ],
            params=asdict(s) | {"site": name},
            seconds=time.perf_counter() - started,
        ).require()

    def _batches(self, subject: Checkpoint, texts: Sequence[str], count: int) -> list[Tensor]:
        """Rows of tokens [B, T] of like length, padded with -1, of about so many tokens."""
        rows: list[list[int]] = []
        total = 0
        for text in texts:
            ids = subject.tokenizer(text, verbose=False).input_ids[: count - total]
            for start in range(0, len(ids), self.settings.length):
                rows.append(ids[start : start + self.settings.length])
                total += len(rows[-1])
            if total >= count:
                break
        rows = sorted((r for r in rows if len(r) > 2), key=len)
        if not rows:
            raise InvalidInputError("a part of the data has no texts of three tokens or more")
        padded = torch.nn.utils.rnn.pad_sequence
        return [
            padded(
                [torch.tensor(r) for r in rows[i : i + _ROWS]], batch_first=True, padding_value=-1
            )
            for i in range(0, len(rows), _ROWS)
        ]

    def _sae(self, x: Tensor, model: str, site: str) -> SparseAutoencoder:
        """The autoencoder that was kept, or one that is trained now."""
        s = self.settings
        if s.kept and Path(s.kept, "sae.json").exists():
            sae, notes = SparseAutoencoder.load(s.kept)
            if (notes.get("model"), notes.get("site")) != (model, site):
                raise MismatchError(
                    f"{s.kept} is of another model, or of {notes.get('site')} and not of {site}; "
                    "choose another folder"
                )
            return sae
        sae = train_sae(x, self.recipe)
        if s.kept:
            sae.save(s.kept, {"model": model, "site": site, "recipe": asdict(self.recipe)})
        return sae

    def _places(
        self,
        subject: Checkpoint,
        sae: SparseAutoencoder,
        chosen: Tensor,
        fit: Fit,
        x: Tensor,
        train: Sequence[Tensor],
    ) -> list[dict[str, Any]]:
        """Where in the texts that were trained on each chosen feature is largest."""
        # One flat text: position p of the vectors is token p of it, with its row beside it.
        flat = torch.cat([b[_there(b)] for b in train])
        rows = torch.cat([_rows(b)[_there(b)] + _ROWS * i for i, b in enumerate(train)])
        codes = torch.cat([sae.encode(part)[:, chosen] for part in torch.split(x, 4096)])
        best = codes.topk(min(_PLACES, len(codes)), 0)
        found = []
        for feature, places, fired in zip(
            chosen.tolist(), best.indices.T.tolist(), (best.values.T > 0).tolist(), strict=True
        ):
            row: dict[str, Any] = {
                "feature": feature,
                "fires on": f"{float(fit.firing[feature]):.2%}",
            }
            for i, place in enumerate(places, 1):
                row[f"place {i}"] = ""
                if not fired[i - 1]:
                    continue
                near = torch.arange(max(place - _AROUND, 0), place + 1)
                near = near[rows[near] == rows[place]]
                words = subject.tokenizer.convert_ids_to_tokens(flat[near].tolist())
                row[f"place {i}"] = " ".join(visible(w) for w in words)
            found.append(row)
        return found


def _there(batch: Tensor) -> Tensor:
    """Which places of a batch hold a token that is looked at: all but the first of a text."""
    there = batch >= 0
    there[:, 0] = False
    return there


def _rows(batch: Tensor) -> Tensor:
    return torch.arange(len(batch))[:, None].expand_as(batch)


@torch.no_grad()
def vectors(model: Any, site: Site, batches: Sequence[Tensor]) -> Tensor:
    """Vectors [N, D] of a site on tokens [B, T], -1 where there is none; no text's first token.

    Args:
        model: A decoder-only model in eval mode.
        site: Of vectors a token.
        batches: Tokens.

    Raises:
        InvalidInputError: The site's values are not vectors a token.
    """
    found = []
    for batch in batches:
        with Trace(model, {"x": site}) as seen:
            model(input_ids=batch.clamp(min=0), attention_mask=(batch >= 0).long())
        value = seen["x"]
        if value.numel() % batch.numel() or value.shape[0] not in (len(batch), batch.numel()):
            raise InvalidInputError(f"{site} holds {list(value.shape)}, not vectors a token")
        found.append(value.reshape(*batch.shape, -1)[_there(batch)].float())
    return torch.cat(found)


@torch.no_grad()
def splice(model: Any, site: Site, sae: SparseAutoencoder, batches: Sequence[Tensor]) -> Spliced:
    """Loss of a model with its own vectors, their mean, and their reconstruction at a site.

    Args:
        model: A decoder-only model in eval mode.
        site: Of vectors a token.
        sae: Trained on that site.
        batches: Tokens [B, T], -1 where there is none.
    """
    mean = vectors(model, site, batches).mean(0)
    changes: dict[str, Callable[[Tensor], Tensor] | None] = {
        "own": None,
        "itself": lambda x: x,
        "means": lambda x: mean.expand_as(x),
        "reconstruction": sae,
    }
    total = dict.fromkeys(changes, 0.0)
    count = 0
    for batch in batches:
        labels = next_tokens(torch.where(batch >= 0, batch, IGNORED))
        tokens = int((labels != IGNORED).sum())
        count += tokens
        inputs = {"attention_mask": (batch >= 0).long()}
        for name, change in changes.items():
            put = {} if change is None else {site: _inside(change, batch)}
            with Intervene(model, put):
                logits = logits_of(model, batch.clamp(min=0), **inputs)
            total[name] += float(label_loss(logits, labels)) * tokens
    return Spliced(**{name: value / max(count, 1) for name, value in total.items()})


def _inside(change: Callable[[Tensor], Tensor], batch: Tensor) -> Change:
    """A change of the vectors of tokens that are looked at; others stay."""
    there = _there(batch)

    def put(value: Tensor) -> Tensor:
        new = value.reshape(*batch.shape, -1).clone()
        new[there] = change(new[there].float()).to(new)
        return new.view_as(value)

    return put


def _numbers(fit: Fit, cost: Spliced, tokens: int, held_out: bool) -> dict[str, Any]:
    return {
        "measured on": f"{tokens:,} {'held-out tokens' if held_out else 'tokens it learnt from'}",
        "variance explained": 1 - fit.unexplained,
        "L0": fit.active,
        "dead": f"{fit.dead:.1%}",
        "loss": cost.own,
        "with means": cost.means,
        "with features": cost.reconstruction,
        "loss recovered": f"{cost.recovered:.1%}",
    }


def _each_token(z: Tensor, words: Sequence[str], count: int = 4) -> list[dict[str, Any]]:
    values, places = z.abs().topk(min(count, z.shape[1]), 1)
    signs = z.gather(1, places)
    return [
        {"token": word}
        | {
            f"feature {i + 1}": f"{int(places[t, i])} ({float(signs[t, i]):.2f})"
            if values[t, i] > 0
            else ""
            for i in range(values.shape[1])
        }
        for t, word in enumerate(words)
    ]


def _text(given: str) -> str:
    """What is given, or what the file of that name holds."""
    if "\n" in given or len(given) > 1000 or not given or not Path(given).is_file():
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{given} cannot be read as UTF-8 text ({error})") from error
