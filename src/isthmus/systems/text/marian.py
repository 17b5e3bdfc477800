"""Marian: translation with a small, fast toolkit.

Paper: M. Junczys-Dowmunt, R. Grundkiewicz, T. Dwojak, H. Hoang, K. Heafield, T. Neckermann,
    F. Seide, U. Germann, A. F. Aji, N. Bogoychev, A. F. T. Martins, A. Birch, "Marian: Fast Neural
    Machine Translation in C++", 2018, arXiv:1804.00344
Idea: One self-contained toolkit whose batches are cut to the memory and whose decoder wastes
    nothing translates several times faster than general frameworks, with the same model.
Differs: The transformer row only; the recurrent presets, factored words and several encoders are
    left out, lexical shortlists, guided alignment and ensembles are not built yet. The decoder is
    isthmus' engine instead of C++ kernels of its own.

    source + </s> -> encoder; <pad> + target -> decoder (post-norm, waves, one embedding) -> law
    loss: label-smoothed cross-entropy over batches of like lengths
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Ratio, Row, Ruler, judge, ratio
from isthmus.claims import Scale as ClaimScale
from isthmus.decoding.fast import best_target
from isthmus.decoding.model import Model
from isthmus.decoding.target import HubTarget
from isthmus.models.encoder_decoder import EncoderDecoder
from isthmus.training.loop import Plan
from isthmus.training.system import Scale
from isthmus.training.text_to_text import Translator, translation_config


@dataclass(frozen=True)
class Settings:
    """Settings of a translation model; the defaults are the preset transformer-base.

    Attributes:
        hidden_size: Width D.
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        num_attention_heads: Heads.
        intermediate_size: Width inside the feed-forwards.
        vocab_size: Tokens of both languages together.
        dropout: Of sublayers' outputs.
        label_smoothing: Share of the target law that is spread over all tokens.
        max_length: Longest source or target in tokens.
        batch_tokens: Tokens of a micro-batch at most, both sides and padding counted.
    """

    hidden_size: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    vocab_size: int = 32_000
    dropout: float = 0.1
    label_smoothing: float = 0.1
    max_length: int = 512
    batch_tokens: int = 16_384


_SMALL = Settings(
    hidden_size=128,
    encoder_layers=3,
    decoder_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    vocab_size=512,
    dropout=0.0,
    max_length=128,
    batch_tokens=2048,
)
_RECIPE = Plan(
    300_000,
    learning_rate=3e-4,
    betas=(0.9, 0.98),
    schedule="inverse-sqrt",
    warmup_steps=16_000,
    ema=0.9999,
    precision="bf16-mixed",
    validate_every=5_000,
    save_every=1_000,
    log_every=100,
    patience=10,
)


class Marian(Translator):
    """Marian's transformer, trained on pairs."""

    name = "marian"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(
            replace(
                _SMALL,
                hidden_size=32,
                encoder_layers=1,
                decoder_layers=1,
                intermediate_size=64,
                batch_tokens=512,
            ),
            Plan(6, validate_every=3, learning_rate=2e-3),
            "workbench:dates",
        ),
        "small": Scale(
            _SMALL,
            Plan(
                1_500,
                learning_rate=2e-3,
                betas=(0.9, 0.98),
                warmup_steps=150,
                validate_every=300,
            ),
            "workbench:dates",
        ),
        "paper": Scale(Settings(), _RECIPE, "hub:wmt/wmt16:de-en"),
    }


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Tokens a second of greedy translation, against transformers on the same weights."""
    small = scale != "test"
    settings = Settings(hidden_size=256, intermediate_size=1024, num_attention_heads=4, dropout=0)
    if not small:
        settings = replace(settings, encoder_layers=1, decoder_layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EncoderDecoder(translation_config(settings, 8_000 if small else 512)).eval()
        sources = torch.randint(2, network.config.vocab_size, (32, 24))
    twin: Any = network.to_hf()
    fast, plain = Model(best_target(network.to_hf())), Model(HubTarget(network.to_hf()))
    new = 32 if small else 4

    def theirs(rows: int) -> list[list[int]]:
        out = []
        for start in range(0, len(sources) if rows > 1 else 4, rows):
            some = sources[start : start + rows]
            ids = twin.generate(
                some,
                attention_mask=torch.ones_like(some),
                do_sample=False,
                num_beams=1,
                max_new_tokens=new,
                min_new_tokens=new,
            )
            out += ids[:, 1:].tolist()
        return out

    def ours(model: Model, rows: int) -> list[list[int]]:
        asked = list(sources if rows > 1 else sources[:4])
        found = dict(
            model.generate_many(
                asked, batch_size=rows, max_new_tokens=new, drafter="none", ignore_end=True
            )
        )
        return [found[i].tokens for i in range(len(asked))]

    same = theirs(1) + theirs(32) == ours(fast, 1) + ours(fast, 32)
    rows: list[Row] = []
    speed: dict[int, Ratio] = {}
    gained: dict[int, Ratio] = {}
    for batch in (1, 32):
        timing = ruler.compare(
            {
                "transformers": partial(theirs, batch),
                "ours": partial(ours, fast, batch),
                "off": partial(ours, plain, batch),
            },
            repeats=5 if small else 1,
        )
        tokens = new * (4 if batch == 1 else len(sources))
        speed[batch] = ratio(timing["transformers"], timing["ours"])
        gained[batch] = ratio(timing["off"], timing["ours"])
        per_s = {name: tokens / timing[name].median_s for name in timing}
        rows.append(
            Row(
                f"translation, batch {batch}",
                "tokens/s",
                per_s["transformers"],
                per_s["ours"],
                per_s["off"],
                note=f"{speed[batch]}; off: the general forward of transformers in our loop",
            )
        )
    gates = (
        Gate("greedy outputs as transformers'", float(same), ">=", 1.0),
        Gate("speed-up at batch 1", speed[1].median, ">=", 1.3),
        Gate("speed-up over the idea off, batch 1", gained[1].median, ">=", 1.3),
        Gate("speed-up by a lexical shortlist", None, ">=", 1.2),
    )
    return Claim(
        slug="marian",
        statement="A 6+6 transformer of 13 M weights translates faster than in transformers, with "
        "the same output.",
        paper_figure="several times faster than Nematus at equal quality (Figures 1 and 2)",
        rows=tuple(rows),
        scale=scale,
        device="cpu",
        status=judge(gates, gates[:3]),
        reason="lexical shortlists, guided alignment and ensembles are not built yet",
        gates=gates,
        seeds=(0,),
        notes=(
            "Random weights, 24 source and 32 target tokens; an end token does not end a text.",
        ),
    )
