"""A law of translation in two sizes: how the loss falls with the encoder, and with the decoder.

Paper: B. Ghorbani, O. Firat, M. Freitag, A. Bapna, M. Krikun, X. Garcia, C. Chelba, C. Cherry,
    "Scaling Laws for Neural Machine Translation", 2021, arXiv:2109.07740
Idea: The loss of an encoder-decoder is a floor and a product of two powers, one of the encoder's
    size and one of the decoder's; the total size alone does not tell it.
Differs: Networks of T5's kind and of one width, trained for equal steps on fresh pairs (the paper:
    500,000 steps on billions of pairs). Losses are in nats a token of one vocabulary; quality is
    the share of exact answers instead of BLEU.

    L(N_e, N_d) = E + A N_e^-p_e N_d^-p_d        N counts no embeddings and no output matrix
    best split of N:  N_e = N p_e / (p_e + p_d),  N_d = N p_d / (p_e + p_d)
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, Status, judge
from isthmus.errors import InvalidInputError
from isthmus.folders import kept
from isthmus.laws.fit import HeldOut, Runs, ScalingLaw, fit, held_out
from isthmus.laws.opcount import count
from isthmus.laws.sweep import Record, Sweep
from isthmus.laws.trends import rank_correlation
from isthmus.models.encoder_decoder import Config, EncoderDecoder, shifted
from isthmus.signals.tokenizer import learn_tokenizer
from isthmus.training.data import Data, Pair
from isthmus.training.loop import Plan, Trainer
from isthmus.training.text import PairLearner
from isthmus.workbench import origins


@dataclass(frozen=True)
class Settings:
    """Settings of a sweep; the defaults are about the paper's.

    Attributes:
        depths: Layers that the encoder and the decoder take, each with each.
        hidden_size: Width D of every network.
        num_attention_heads: Heads.
        intermediate_size: Width inside the feed-forwards.
        vocab_size: Tokens of both languages together.
        batch_tokens: Tokens of a batch at most, both sides and padding counted.
        bivariate: The idea itself; off, the law is over the total size.

    Raises:
        InvalidInputError: Too few depths for a law.
    """

    depths: tuple[int, ...] = (6, 12, 24, 36, 48, 64)
    hidden_size: int = 1024
    num_attention_heads: int = 16
    intermediate_size: int = 8192
    vocab_size: int = 32_000
    batch_tokens: int = 260_000
    bivariate: bool = True

    def __post_init__(self) -> None:
        if len(set(self.depths)) < 3 or min(self.depths) < 1:
            raise InvalidInputError(
                f"a law in two sizes needs at least three depths of 1 or more, got {self.depths}"
            )


class NmtScaling:
    """A sweep over encoders and decoders, and the law of its losses.

    Args:
        data: Pairs to learn from.
        tests: Test sets by name, each of which gets a law of its own.
        settings: See :class:`Settings`.
        plan: How every network is trained.
    """

    role: ClassVar[str] = "law"

    def __init__(
        self,
        data: Sequence[Pair],
        tests: Mapping[str, Sequence[Pair]],
        settings: Settings | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.data, self.tests = data, tests
        self.settings = settings or Settings()
        self.plan = plan or Plan(500_000, learning_rate=1e-3, warmup_steps=10_000)
        texts = (text for pair in data for text in pair)
        self.tokenizer = learn_tokenizer(texts, self.settings.vocab_size)

    def network(self, encoder_layers: int, decoder_layers: int) -> EncoderDecoder:
        """Random weights of one point of the grid, the same at every call."""
        s = self.settings
        config = Config.t5(
            len(self.tokenizer),
            hidden_size=s.hidden_size,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            num_attention_heads=s.num_attention_heads,
            head_dim=s.hidden_size // s.num_attention_heads,
            intermediate_size=s.intermediate_size,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed)
            return EncoderDecoder(config)

    def configs(self) -> list[dict[str, int]]:
        """The grid."""
        both = itertools.product(sorted(set(self.settings.depths)), repeat=2)
        return [{"encoder_layers": e, "decoder_layers": d} for e, d in both]

    def sweep(self, path: Path) -> Sweep:
        """The grid as a sweep that is kept in a file."""
        return Sweep(path, self.train, cost=lambda c: c["encoder_layers"] + c["decoder_layers"] + 1)

    def train(self, config: Mapping[str, Any]) -> Record:
        """Train one point of the grid.

        Returns:
            ``encoder`` and ``decoder``, their parameters; ``compute``, FLOPs of the training;
            ``tokens``; ``loss:TEST`` of every test set in nats a token, ``exact:TEST`` where it has
            one right answer, and ``loss``, the mean of the test sets.
        """
        network = self.network(**config)
        learner = self._learner(network, self.data)
        Trainer(learner, self.plan).run()
        found = {"encoder": parameters(network.encoder), "decoder": parameters(network.decoder)}
        source, target = learner.batch(0)
        forward = count(network, source, shifted(target, network.config.pad_id)).flops
        told: Record = {
            **found,
            "compute": 3.0 * forward * self.plan.steps,
            "tokens": self.plan.steps * int((target != network.config.pad_id).sum()),
        }
        for name, test in self.tests.items():
            with torch.no_grad():
                said = self._learner(network, test, judged=200).validate()
            told |= {f"loss:{name}": said["loss"], f"exact:{name}": said["exact"]}
        return told | {"loss": sum(told[f"loss:{name}"] for name in self.tests) / len(self.tests)}

    def _learner(
        self, network: EncoderDecoder, pairs: Sequence[Pair], judged: int = 0
    ) -> PairLearner:
        return PairLearner(
            network,
            self.tokenizer,
            Data(pairs, pairs if judged else pairs[:1]),
            {"system": "nmt-scaling", "settings": asdict(self.settings)},
            tokens=self.settings.batch_tokens,
            judged=judged,
            seed=self.plan.seed,
        )

    def runs(self, records: Sequence[Record], test: str = "") -> Runs:
        """Runs of a sweep, as the law sees them; those that diverged are left out.

        Args:
            records: What the sweep gave.
            test: Name of a test set; empty is the mean of all.
        """
        good = [r for r in records if not r["diverged"]]
        sides = {name: [float(r[name]) for r in good] for name in ("encoder", "decoder")}
        total = [e + d for e, d in zip(*sides.values(), strict=True)]
        loss = [r[f"loss:{test}" if test else "loss"] for r in good]
        variables = sides if self.settings.bivariate else {"total": total}
        return Runs.of(variables, loss, [r["compute"] for r in good])


def parameters(stack: nn.Module) -> int:
    """Weights of one side, without embeddings and output matrix."""
    return sum(p.numel() for p in stack.parameters())


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Sweep encoders and decoders, and tell the largest by laws in two sizes and in one."""
    small = scale != "test"
    system, records = _swept(small)
    one_size = NmtScaling(
        system.data, system.tests, replace(system.settings, bivariate=False), system.plan
    )
    both, one = ({o: _law(s, records, o, small) for o in system.tests} for s in (system, one_size))

    def mean_error(laws: Mapping[str, tuple[ScalingLaw, HeldOut]]) -> float:
        return sum(told.error for _, told in laws.values()) / len(laws)

    share = mean_error(both) / max(mean_error(one), 1e-12)
    worst = min(law.r2 for law, _ in both.values())
    gates = (
        Gate("error on the largest runs, two sizes over one", share, "<=", 0.8),
        Gate("R2 of the worst of the three laws", worst, ">=", 0.9),
        Gate("R2 of the best law in the total size", max(law.r2 for law, _ in one.values()), "<",
             worst),
    )  # fmt: skip
    rows = [
        Row(
            f"error on the largest runs, {name}", "mean log", told.baselines["last"], told.error,
            one[name][1].error,
            note=f"R2 {law.r2:.3f} against {one[name][0].r2:.3f}; {law}",
        )
        for name, (law, told) in both.items()
    ]  # fmt: skip
    rows += [
        Row(
            f"exponent of the {side}, {name}", "", None, law.values[f"alpha:{side}"].value, None,
            note=str(law.values[f"alpha:{side}"]),
        )
        for name, (law, _) in both.items()
        for side in ("encoder", "decoder")
    ]  # fmt: skip
    shares = {n: law.split(1.0)["encoder"] for n, (law, _) in both.items() if _falls(law)}
    status = judge(gates, (Gate("error, two sizes over one", share, "<", 1.0),))
    missed = ", ".join(gate.name for gate in gates if not gate.passed)
    good = [r for r in records if not r["diverged"]]
    quality = rank_correlation(
        [-r["loss:source-natural"] for r in good], [r["exact:source-natural"] for r in good]
    )
    return Claim(
        slug="nmt-scaling",
        statement="A floor and a product of two powers, of the encoder's and of the decoder's "
        "size, tells the losses of the largest translation models better than the total size does.",
        paper_figure="the law explains more than 99 % of the variation of en-de losses; its "
        "decoder exponents are above the encoder's (figures not checked against the paper)",
        rows=tuple(rows),
        scale=scale,
        device="cpu",
        status=status,
        reason="" if status is Status.REPRODUCED else f"missed: {missed}",
        gates=gates,
        seeds=(0,),
        notes=(
            f"{len(records)} runs, {len(records) - len(good)} diverged; "
            f"{good[0]['tokens']} target tokens each, far from convergence; one seed a size",
            "best share of the encoder in a total size: "
            + (", ".join(f"{s:.0%} ({n})" for n, s in shares.items()) or "none, no power falls"),
            f"rank correlation of loss and exact answers, source-natural: {quality:.2f}; best "
            f"exact share {max(r['exact:source-natural'] for r in good):.1%}",
        ),
    )


_SMALL = Settings(
    depths=(1, 2, 4, 6),
    hidden_size=64,
    num_attention_heads=2,
    intermediate_size=128,
    vocab_size=300,
    batch_tokens=2048,
)


def _swept(small: bool) -> tuple[NmtScaling, list[Record]]:
    """The system of the claim, and its sweep, which is kept in the cache."""
    rng = random.Random(0)
    data = [pair for o in origins.ORIGINS for pair in origins.pairs(12_000 if small else 40, o)]
    rng.shuffle(data)
    tests: dict[str, Sequence[Pair]] = {
        o: origins.pairs(600 if small else 8, o, held_out=True)
        for o in origins.ORIGINS[: None if small else 1]
    }
    tiny = replace(_SMALL, depths=(1, 2, 3), hidden_size=32, num_attention_heads=1)
    steps = 200 if small else 2
    plan = Plan(
        steps,
        learning_rate=2e-3,
        betas=(0.9, 0.98),
        warmup_steps=steps // 10,
        validate_every=steps,
        save_every=steps,
    )
    system = NmtScaling(data, tests, _SMALL if small else tiny, plan)
    key = {
        "settings": asdict(system.settings),
        "plan": asdict(plan),
        "data": Data(data, [pair for test in tests.values() for pair in test]).fingerprint,
        "source": hashlib.sha256(inspect.getsource(NmtScaling).encode()).hexdigest(),
    }
    with kept("sweeps", "nmt-scaling", key) as folder:
        return system, system.sweep(folder / "runs.jsonl").run(system.configs())


def _law(
    system: NmtScaling, records: Sequence[Record], test: str, small: bool
) -> tuple[ScalingLaw, HeldOut]:
    runs, draws = system.runs(records, test), 200 if small else 2
    return fit(runs, "product", draws=draws), held_out(runs, "product", draws=draws)


def _falls(law: ScalingLaw) -> bool:
    return sum(law.values[f"alpha:{n}"].value for n in law.runs.variables) > 0
