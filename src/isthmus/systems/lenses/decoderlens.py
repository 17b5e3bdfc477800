"""DecoderLens: every layer of an encoder, read out by the decoder that was trained on the last.

Paper: A. Langedijk, H. Mohebbi, G. Sarti, W. Zuidema, J. Jumelet, "DecoderLens: Layerwise
    Interpretation of Encoder-Decoder Transformers", 2023, arXiv:2310.03686
Idea: The unchanged decoder attends to what an intermediate layer of the encoder hands on, so that
    each layer is read as the text that it already supports.
Differs: Greedy decoding only. Beside the generated texts, the model's own answer is scored under
    every layer, and an encoder of zeros shows what the decoder writes without any source.

    source ──▶ embed ──▶ layer 1 ──▶ ... ──▶ layer L ──norm──▶ decoder ──▶ text
                 └─norm──▶ decoder ──▶ text 0     (L + 1 texts, one batch)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.decoding.model import Model
from isthmus.errors import UnsupportedModelError
from isthmus.lenses.explanation import Array, Check, Explanation, identity, visible
from isthmus.lenses.sites import SiteMap, probe_of
from isthmus.lenses.trace import Trace
from isthmus.models.hub import load_checkpoint
from isthmus.workbench import dates, reference


@dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        final_norm: Whether an intermediate state passes the encoder's last norm, as the last one
            does, before the decoder reads it. Off, the decoder reads states of another scale than
            it was trained on.
        max_new_tokens: Longest text; early layers repeat themselves.
    """

    final_norm: bool = True
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Reading:
    """What the decoder reads from every layer of the encoder, for one source.

    Attributes:
        answer: The model's own answer, token ids [U].
        texts: Token ids that each of the L + 1 layers gives, the embeddings first.
        scores: Log-probability of the answer's tokens under each layer [L + 1, U].
        empty: Token ids that an encoder of zeros gives.
    """

    answer: Tensor
    texts: Sequence[Tensor]
    scores: Tensor
    empty: Tensor

    @property
    def stable_from(self) -> int:
        """First layer from which on the answer stays."""
        same = [text.equal(self.answer) for text in self.texts]
        return next(i for i in range(len(same) + 1) if all(same[i:]))


class Decoderlens:
    """Reads an encoder layer by layer.

    Args:
        settings: See :class:`Settings`.
    """

    role: ClassVar[str] = "lens"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def open(self, source: str) -> Model:
        """An encoder-decoder model: a folder, a hub id, or ``dates-deep``.

        Raises:
            UnsupportedModelError: It has no encoder.
        """
        place = reference.locate(source or "dates-deep")
        checkpoint = load_checkpoint(place, dtype="float32", device="cpu")
        model = Model(checkpoint.model, checkpoint.tokenizer)
        self._check(model)
        return model

    def states(self, model: Model, inputs: dict[str, Tensor]) -> Tensor:
        """What each layer hands on, as the decoder would read it [L + 1, T, D].

        Args:
            model: An encoder-decoder model.
            inputs: Encoder inputs of one source.

        Raises:
            UnsupportedModelError: Its layers cannot be told apart.
        """
        self._check(model)
        module = model.target.model
        sites = SiteMap.of(module, probe_of(module))
        wanted = sites.residuals("enc")
        with torch.no_grad():
            with Trace(module, wanted) as seen:
                module.get_encoder()(**inputs)
            states = torch.cat([seen[name] for name in wanted])
            norm = sites.stacks["enc"].sites.get("final_norm")
            if norm is not None and self.settings.final_norm:
                states = module.get_submodule(norm.module)(states)
        return states

    def read(self, model: Model, source: str | Tensor) -> Reading:
        """Decode every layer, and score the model's own answer under each.

        Args:
            model: An encoder-decoder model with a tokenizer, or any with ``source`` as ids.
            source: A text, or token ids [T].
        """
        ids = model.encode(source)
        module, most = model.target.model, self.settings.max_new_tokens
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        states = self.states(model, inputs)
        states = torch.cat([states, torch.zeros_like(states[:1])])
        mask = inputs["attention_mask"].expand(len(states), -1)
        encoded = {"encoder_outputs": BaseModelOutput(states), "attention_mask": mask}
        start = torch.tensor([model.target.start_token])
        own = model.generate(ids, max_new_tokens=most, drafter="none")
        texts = model.generate(
            [start] * len(states),
            max_new_tokens=most,
            drafter="none",
            inputs=dict(encoded),
        )
        answer = torch.tensor(own.tokens)
        given = torch.cat([start, answer])[None].expand(len(states), -1)
        with torch.no_grad():
            logits = module(**encoded, decoder_input_ids=given[:, :-1]).logits  # [L + 2, U, V]
        scores = logits.log_softmax(-1).gather(-1, given[:, 1:, None])[..., 0]
        found = [torch.tensor(each.tokens) for each in texts]
        return Reading(answer, found[:-1], scores[:-1], found[-1])

    def explain(self, subject: Model, given: str) -> Explanation:
        """Texts of all layers, and where each token of the answer becomes likely.

        Raises:
            MismatchError: The last layer does not give the model's own answer.
        """
        started = time.perf_counter()
        reading = self.read(subject, given)
        tokenizer = subject.tokenizer

        def text(ids: Tensor) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        names = ("embeddings", *(f"layer {i}" for i in range(1, len(reading.texts))))
        tokens = tokenizer.convert_ids_to_tokens(reading.answer.tolist())
        rows: list[dict[str, Any]] = [
            {
                "layer": name,
                "text": text(ids),
                "is the answer": "yes" if ids.equal(reading.answer) else "no",
                "nats a token": -float(reading.scores[i].mean()),
                "repeated": _repeated(ids),
            }
            for i, (name, ids) in enumerate(zip(names, reading.texts, strict=True))
        ]
        rows.append(
            {
                "layer": "zeros",
                "text": text(reading.empty),
                "is the answer": "yes" if reading.empty.equal(reading.answer) else "no",
                "nats a token": None,
                "repeated": _repeated(reading.empty),
            }
        )
        stable = reading.stable_from
        differ = sum(a != b for a, b in zip(reading.texts[-1], reading.answer, strict=False))
        return Explanation(
            method="decoderlens",
            model=identity(subject.target.model),
            inputs=[f"source: {given}", f"answer: {text(reading.answer)}"],
            target=f"the answer stays from {names[stable]} on"
            if stable < len(names)
            else "no layer gives the answer",
            arrays={
                "probability of the answer's tokens": Array(
                    reading.scores.exp().numpy(),
                    ("layer", "token"),
                    (names, tuple(visible(t) for t in tokens)),
                )
            },
            tables={"what the decoder reads": rows},
            checks=[
                Check(
                    "tokens of the last layer's text that differ from the model's own",
                    float(differ + abs(len(reading.texts[-1]) - len(reading.answer))),
                    0.0,
                )
            ],
            params=asdict(self.settings),
            seconds=time.perf_counter() - started,
        ).require()

    def _check(self, model: Model) -> None:
        if not model.target.encoder_decoder:
            raise UnsupportedModelError(
                f"{type(model.target.model).__name__} has no encoder to be read by its decoder; "
                "give an encoder-decoder model"
            )


def _repeated(ids: Tensor) -> float:
    """Share of tokens that stand in the same order of three once more."""
    if len(ids) < 3:
        return 0.0
    three = ids.unfold(0, 3, 1)
    return 1 - len(set(map(tuple, three.tolist()))) / len(three)


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Read the encoder of a translator of dates, on held-out dates."""
    del ruler  # nothing is timed
    small = scale != "test"
    lens = Decoderlens(Settings(max_new_tokens=14))
    bare = Decoderlens(Settings(max_new_tokens=14, final_norm=False))
    model = lens.open("dates-deep" if small else str(reference.reference(_tiny())))
    examples = dates.examples(120 if small else 4, "held-out", seed="decoderlens")
    right: list[list[bool]] = []
    fields: list[list[list[bool]]] = []
    own, bare_own, others, ends = [], [], [], []
    for example, other in zip(examples, [*examples[1:], examples[0]], strict=True):
        reading = lens.read(model, example.source)
        target = model.encode(example.target)
        texts = [model.tokenizer.decode(t, skip_special_tokens=True) for t in reading.texts]
        right.append([text == example.target for text in texts])
        fields.append([_fields(text, example.target) for text in texts])
        ends.append(reading.texts[-1].equal(reading.answer))
        own.append(_nats(lens, model, example.source, target))
        bare_own.append(_nats(bare, model, example.source, target))
        others.append(_nats(lens, model, other.source, target)[-1])
    layers = len(right[0])
    exact = torch.tensor(right).double().mean(0)
    nats, bare_nats = torch.stack(own).mean(0), torch.stack(bare_own).mean(0)
    parts = torch.tensor(fields).double().mean(0)  # [L + 1, 3]
    gates = (
        Gate("last layer's texts that are the model's own", sum(ends) / len(ends), "==", 1.0),
        Gate("nats a token, embeddings less the last layer", float(nats[0] - nats[-1]), ">=", 1.0),
        Gate(
            "exact, last layer less the middle one",
            float(exact[-1] - exact[layers // 2]),
            ">",
            0.0,
        ),
        Gate(
            "nats a token, another date's states less its own",
            float(torch.stack(others).mean() - nats[-1]),
            ">",
            0.0,
        ),
        Gate(
            "nats a token on the way, without the final norm less with it",
            float((bare_nats - nats)[1:-1].mean()),
            ">",
            0.0,
        ),
    )
    first = {
        name: next((i for i in range(layers) if parts[i, k] >= 0.9), None)
        for k, name in enumerate(("year", "month", "day"))
    }
    return Claim(
        slug="decoderlens",
        statement="Read by the decoder, the layers of an encoder show simpler parts of a task "
        "solved earlier than the whole.",
        paper_figure="several subtasks are solved at low or middle layers (figures 2 to 6, read)",
        rows=(
            Row(
                "exact",
                "of dates",
                float(exact[layers // 2]),
                float(exact[-1]),
                float(exact[0]),
                note="baseline: the middle layer; off: the embeddings",
            ),
            Row(
                "reference",
                "nats/token",
                float(nats[layers // 2]),
                float(nats[-1]),
                float(bare_nats[layers // 2]),
                note="baseline: the middle layer; off: the same without the final norm",
            ),
            *(
                Row(
                    f"{name} right",
                    "of dates",
                    float(parts[layers // 2, k]),
                    float(parts[-1, k]),
                    float(parts[0, k]),
                    note=f"90 % from layer {first[name]} on",
                )
                for k, name in enumerate(("year", "month", "day"))
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, gates[:2]),
        gates=gates,
        seeds=(0,),
        notes=(
            "exact by layer: " + ", ".join(f"{v:.2f}" for v in exact.tolist()),
            "shuffling the encoder's states in time, as one might, is no control: cross-attention "
            "without positions gives the same numbers; the states of another date are",
            "nats a token by layer: " + ", ".join(f"{v:.2f}" for v in nats.tolist()),
        ),
    )


def _tiny() -> Any:
    """The recipe of the claim's model, in seconds: it has learnt next to nothing."""
    whole: Any = reference.RECIPES["dates-deep"]
    sizes = {"hidden_size": 24, "num_attention_heads": 1, "head_dim": 24, "intermediate_size": 32}
    return replace(whole, name="dates-deep-t", steps=12, batch_size=8, **sizes)


def _fields(text: str, target: str) -> list[bool]:
    """Whether year, month and day of an ISO date are right."""
    given = [*text.split("-"), "", "", ""][:3]
    return [a == b for a, b in zip(given, target.split("-"), strict=True)]


def _nats(lens: Decoderlens, model: Model, source: str, target: Tensor) -> Tensor:
    """Nats a token of a target under every layer of a source [L + 1]."""
    ids = model.encode(source)
    mask = torch.ones_like(ids)[None]
    states = lens.states(model, {"input_ids": ids[None], "attention_mask": mask})
    given = torch.cat([torch.tensor([model.target.start_token]), target])[None]
    given = given.expand(len(states), -1)
    module: Any = model.target.model
    with torch.no_grad():
        logits = module(
            encoder_outputs=BaseModelOutput(states),
            attention_mask=mask.expand(len(states), -1),
            decoder_input_ids=given[:, :-1],
        ).logits
    nats: Tensor = -logits.log_softmax(-1).gather(-1, given[:, 1:, None]).mean((1, 2))
    return nats
