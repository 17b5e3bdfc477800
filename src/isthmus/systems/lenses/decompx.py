"""DecompX: what each input token adds to a classifier's logits, carried through every layer.

Paper: A. Modarressi, M. Fayyaz, E. Aghazadeh, Y. Yaghoobzadeh, M. T. Pilehvar, "DecompX: Explaining
    Transformers Decisions by Propagating Token Decomposition", 2023, arXiv:2306.02873
Idea: A token's vector is kept as a sum over the input tokens; attention, norms, feed-forwards and
    the classifier keep the sum, so that signed scores a token add up to the logits.
Differs: Also for models that normalise before adding (with or without taking the mean off), and
    for any chain of norms, linear maps and activations above the layers. Gated feed-forwards are
    refused. All parts of a layer are kept, so a text of T tokens needs T * T vectors.

::

    x_i = sum_k x_{i<-k}                                       (eq. 6)
    attention: mix by the observed pattern;  norm: by the observed deviation  (eq. 9 to 11)
    activation: theta = act(z) / z, unit by unit               (eq. 13 and 14)
    bias: shared by abs(x_{i<-k} b)                            (eq. 16)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.lenses.decompose import Bend, Decomposition, Share
from isthmus.lenses.explanation import Array, Check, Explanation, identity, visible
from isthmus.lenses.faithfulness import (
    TokenRemoval,
    aopc,
    comprehensiveness,
    gradient_times_input,
    greedy,
    interval,
    places,
    random_scores,
    rollout,
    sufficiency,
)
from isthmus.lenses.sites import TOLERANCE
from isthmus.lenses.trace import Trace
from isthmus.lenses.wiring import Wiring
from isthmus.models.hub import Checkpoint, load_classifier
from isthmus.workbench import topics

_ROWS = 32


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        bias: How biases are shared; see :data:`~isthmus.lenses.decompose.Share`.
        activation: The line that stands for an activation, ``"origin"`` (GeLU-ZO) or ``"tangent"``
            (GeLU-LA).
        propagate: Whether parts are carried from layer to layer. Off, layers are taken apart one
            by one and joined by products of the sizes of their parts, as methods before did: the
            scores have no sign and add up to nothing.
    """

    bias: Share = "absdot"
    activation: Bend = "origin"
    propagate: bool = True


@dataclass(frozen=True)
class Scores:
    """What tokens add.

    Attributes:
        tokens: To each logit [B, S, C]; S is T, and one more where biases have a source.
        logits: The model's [B, C].
        layers: Size of each token's part of what is read, after each layer [B, L + 1, S].
        errors: Distance of the sums from the model's values, as a share of the largest: after
            each layer, then of the logits.
    """

    tokens: Tensor
    logits: Tensor
    layers: Tensor
    errors: list[float]


class Decompx:
    """Takes a text classifier's logits apart, token by token.

    Args:
        settings: See :class:`Settings`.

    Raises:
        UnknownNameError: No such share or line.
    """

    role: ClassVar[str] = "lens"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        s = self.settings
        Decomposition.of_tokens(torch.ones(1, 1, 1), s.bias).bend(
            "relu", torch.ones(1, 1, 1), s.activation
        )

    def open(self, source: str) -> Checkpoint:
        """A text classifier: a folder or a hub id; a small one that names topics by default."""
        return load_classifier(source or topics.topic_folder())

    def know(self, model: Any, inputs: Mapping[str, Tensor]) -> Wiring:
        """How a model is put together, tried on one text.

        Raises:
            UnsupportedModelError: In another way; the message names where.
        """
        wiring = Wiring(model, {k: v[:1] for k, v in inputs.items()})
        if all(step.kind != "pool" for step in wiring.steps):
            raise UnsupportedModelError(
                f"{type(model).__name__} gives logits for every token; give a text classifier"
            )
        return wiring

    def scores(
        self, model: Any, inputs: Mapping[str, Tensor], wiring: Wiring | None = None
    ) -> Scores:
        """Contributions of the tokens of texts.

        Args:
            model: A text classifier of transformers.
            inputs: ``input_ids`` and ``attention_mask`` [B, T].
            wiring: What :meth:`know` said, for several calls.

        Raises:
            UnsupportedModelError: The model is put together in another way.
        """
        wiring = wiring or self.know(model, inputs)
        found = [
            self._scores(wiring, {k: v[i : i + _ROWS] for k, v in inputs.items()})
            for i in range(0, len(inputs["input_ids"]), _ROWS)
        ]
        worst = [max(each) for each in zip(*(f.errors for f in found), strict=True)]
        tokens, logits, layers = (
            torch.cat([getattr(f, name) for f in found]) for name in ("tokens", "logits", "layers")
        )
        return Scores(tokens, logits, layers, worst)

    def _scores(self, wiring: Wiring, inputs: Mapping[str, Tensor]) -> Scores:
        seen, logits = wiring.trace(inputs)
        pool = next(step.what for step in wiring.steps if step.kind == "pool")
        errors, sizes = [], []
        with torch.no_grad():
            for x, observed in self._layers(wiring, seen):
                errors.append(x.error(observed))
                sizes.append(x.take(pool).values[:, 0].norm(dim=-1))  # [B, S]
            scores = wiring.above(x, observed, self.settings.activation)
            errors.append(scores.error(logits[:, None]))
            tokens = scores.values[:, 0]
            if not self.settings.propagate:
                joined = self._joined(wiring, seen)
                read = Decomposition(joined[..., None]).take(pool).values[:, 0]
                tokens = read.expand(-1, -1, tokens.shape[-1])
        return Scores(tokens, logits, torch.stack(sizes, 1), errors)

    def _layers(self, wiring: Wiring, seen: Trace) -> Iterator[tuple[Decomposition, Tensor]]:
        """The decomposition of the embeddings, then of what every layer hands on."""
        x = wiring.start(seen, 0, self.settings.bias)
        yield x, seen["pre.0"]
        for i in range(len(wiring.layers)):
            x = wiring.through(x, i, seen, self.settings.activation)
            yield x, seen[f"post.{i}"]

    def _joined(self, wiring: Wiring, seen: Trace) -> Tensor:
        """Products over layers of the sizes of their parts [B, T, S]."""
        joined: Tensor | None = None
        for i in range(len(wiring.layers)):
            x = wiring.start(seen, i, self.settings.bias)
            parts = wiring.through(x, i, seen, self.settings.activation).values
            size: Tensor = parts.norm(dim=-1)
            size = size[:, :, : size.shape[1]]  # without the source of biases
            size = size / size.sum(-1, keepdim=True)
            joined = size if joined is None else size @ joined
        assert joined is not None
        return joined

    def explain(self, subject: Checkpoint, given: str) -> Explanation:
        """What each token of a text adds to the class that the model names.

        Raises:
            InvalidInputError: The text has no tokens, or the model no tokenizer.
            UnsupportedModelError: Another kind of model.
            MismatchError: Parts do not add up to what the model computed.
        """
        started = time.perf_counter()
        model, tokenizer = subject.model, subject.tokenizer
        if tokenizer is None:
            raise InvalidInputError(f"{subject.source} has no tokenizer, so it reads no text")
        coded = tokenizer(given, return_tensors="pt", return_token_type_ids=False)
        inputs = {k: coded[k] for k in ("input_ids", "attention_mask")}
        if not given.strip() or inputs["input_ids"].shape[1] < 2:
            raise InvalidInputError("the text has no tokens to tell apart; give several words")
        found = self.scores(model, inputs)
        names = getattr(model.config, "id2label", {})
        classes = tuple(str(names.get(i, i)) for i in range(found.logits.shape[1]))
        best = int(found.logits[0].argmax())
        words = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        places_ = [visible(w) for w in words]
        if found.tokens.shape[1] > len(words):
            places_.append("(biases)")
        labels = tuple(places_)
        rows = [
            {
                "token": labels[k],
                "position": k,
                **{c: float(found.tokens[0, k, i]) for i, c in enumerate(classes)},
            }
            for k in found.tokens[0, :, best].argsort(descending=True).tolist()
        ]
        rows.append(
            {"token": "sum, the logits", "position": None}
            | {c: float(found.tokens[0, :, i].sum()) for i, c in enumerate(classes)}
        )
        depth = ("embeddings", *(f"layer {i + 1}" for i in range(found.layers.shape[1] - 1)))
        share = found.layers[0] / found.layers[0].sum(-1, keepdim=True)
        tolerance = TOLERANCE[torch.float32]
        p = float(found.logits[0].softmax(-1)[best])
        return Explanation(
            method="decompx",
            model=identity(model),
            inputs=[f"text: {given}", f"class: {classes[best]}, probability {p:.3g}"],
            target=f"what each token adds to {classes[best]!r}",
            arrays={
                f"added to {classes[best]}": Array(
                    found.tokens[0, :, best].double().numpy(), ("token",), (labels,), True
                ),
                "added to every class": Array(
                    found.tokens[0].T.double().numpy(), ("class", "token"), (classes, labels), True
                ),
                "share of the vector that is classified": Array(
                    share.double().numpy(), ("after", "token"), (depth, labels)
                ),
            },
            tables={"tokens": rows},
            checks=[
                Check(f"parts less the hidden state, of the largest ({name})", error, tolerance)
                for name, error in zip(depth, found.errors, strict=False)
            ]
            + [Check("token scores less the logits, of the largest", found.errors[-1], tolerance)],
            params=asdict(self.settings),
            seconds=time.perf_counter() - started,
        ).require()


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Take apart a classifier of planted topics, against other rankings of the same tokens."""
    del ruler  # nothing is timed
    small = scale != "test"
    model = topics.topic_model(topics.RECIPE if small else topics.tiny())
    drawn = topics.texts(150 if small else 4)
    inputs = {"input_ids": drawn.ids, "attention_mask": torch.ones_like(drawn.ids)}
    lens, off = Decompx(), Decompx(Settings(propagate=False))
    wiring = lens.know(model, inputs)
    ours = lens.scores(model, inputs, wiring)
    exact = lens.scores(model.double(), inputs).errors
    model.float()
    named = ours.logits.argmax(-1)
    rows = torch.arange(len(named))
    seen, _ = wiring.trace(inputs)
    patterns = [seen[f"pattern.{i}"] for i in range(len(wiring.layers))]
    scored = {
        "ours": ours.tokens[rows, :, named],
        "off": off.scores(model, inputs, wiring).tokens[..., 0],
        "tangent": Decompx(Settings(activation="tangent"))
        .scores(model, inputs, wiring)
        .tokens[rows, :, named],
        "gradient x input": gradient_times_input(model, wiring.sites["resid_pre.0"], inputs, named),
        "rollout": rollout(patterns)[:, 0],
        "reverse": -ours.tokens[rows, :, named],
    }
    removable = torch.ones_like(drawn.planted)
    removable[:, 0] = False  # the class token
    answers = {
        how: TokenRemoval(model, drawn.ids, how=how, mask_id=topics.NUMBER[topics.MASK])
        for how in ("mask", "delete", "hide")
    }
    areas: dict[str, dict[str, Tensor]] = {how: {} for how in answers}
    for how, answer in answers.items():
        for name, scores in scored.items():
            areas[how][name] = aopc(answer, scores, removable)
        seeds = range(20 if how == "mask" else 5)
        chance = [aopc(answer, random_scores(removable, s), removable) for s in seeds]
        areas[how]["random"] = torch.stack(chance).mean(0)
    few = 40 if small else 2
    limit = TokenRemoval(model, drawn.ids[:few], mask_id=topics.NUMBER[topics.MASK])
    oracle = aopc(limit, greedy(limit, removable[:few]), removable[:few])
    found = {
        name: float(((places(s, removable) < 3) & drawn.planted).sum() / drawn.planted.sum())
        for name, s in scored.items()
    }
    right = float((named == drawn.topic).float().mean())
    mean = {how: {n: float(v.mean()) for n, v in each.items()} for how, each in areas.items()}
    by = mean["mask"]
    gates = (
        Gate("parts less the hidden states and logits, float32", max(ours.errors), "<=", 1e-4),
        Gate("the same, float64", max(exact), "<=", 1e-9),
        Gate("AOPC less gradient x input's", by["ours"] - by["gradient x input"], ">=", 0.0),
        Gate("AOPC less rollout's", by["ours"] - by["rollout"], ">=", 0.03),
        Gate("AOPC less random's", by["ours"] - by["random"], ">=", 0.1),
        Gate("planted words among the top 3", found["ours"], ">=", 0.9),
        Gate("AOPC less that of layers joined by sizes", by["ours"] - by["off"], ">=", 0.03),
    )

    def told(name: str) -> str:
        centre, low, high = interval(areas["mask"]["ours"] - areas["mask"][name])
        return f"{centre:+.3f} [{low:+.3f}, {high:+.3f}]"

    fuller = {
        name: (
            float(comprehensiveness(answers["mask"], s, removable).mean()),
            float(sufficiency(answers["mask"], s, removable).mean()),
        )
        for name, s in scored.items()
    }
    return Claim(
        slug="decompx",
        statement="Signed contributions of tokens, carried to the classifier, rank tokens more "
        "faithfully than gradients and attention do.",
        paper_figure="AOPC and accuracy drop better than all of nine methods on SST-2, MNLI, QNLI "
        "and HateXplain (figure 3, read)",
        rows=(
            *(
                Row(
                    f"AOPC, tokens taken out by '{how}'",
                    "probability",
                    each["gradient x input"],
                    each["ours"],
                    each["off"],
                    ceiling=float(oracle.mean()) if how == "mask" else None,
                    control=each["random"],
                    note=f"baseline: gradient x input; rollout {each['rollout']:.3f}, reversed "
                    f"{each['reverse']:.3f}, by tangents {each['tangent']:.3f}; ceiling: greedy "
                    f"search on {few} texts; control: random",
                )
                for how, each in mean.items()
            ),
            Row(
                "planted words among the top 3",
                "of words",
                found["gradient x input"],
                found["ours"],
                found["off"],
                note=f"rollout {found['rollout']:.3f}, by tangents {found['tangent']:.3f}",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, (*gates[:2], *gates[3:5])),
        gates=gates,
        seeds=(0,),
        notes=(
            "a first classifier was to learn besides that 'without' takes the next word out, and "
            "did not (right on 0.545): AOPC 0.493, gradient x input 0.451, rollout 0.144, random "
            "0.088, greedy 0.495, planted words 0.545; the texts were made simpler, the gates left "
            "alone",
            f"the classifier is right on {right:.3f} of {len(named)} held-out texts",
            "AOPC less another's, tokens masked, with 95 % intervals: "
            + "; ".join(f"{n} {told(n)}" for n in ("gradient x input", "rollout", "off", "random")),
            "comprehensiveness and sufficiency at 20 %: "
            + "; ".join(f"{n} {a:.3f}, {b:.3f}" for n, (a, b) in fuller.items()),
        ),
    )
