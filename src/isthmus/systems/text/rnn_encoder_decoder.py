"""RNN encoder-decoder: a phrase through one vector, and its probability as a feature.

Paper: K. Cho, B. van Merrienboer, C. Gulcehre, D. Bahdanau, F. Bougares, H. Schwenk, Y. Bengio,
    "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
    Translation", 2014, arXiv:1406.1078
Idea: A gated recurrent unit reads a phrase into one vector of fixed length and another one writes
    its translation from it; the probability of a phrase pair is one more feature of a phrase table.
Differs: Pieces of number words and digits instead of words; the phrase-based system is a noisy
    table with two features, its weights found on a grid instead of by MERT.

    c = tanh(V h_N),  h'_0 = tanh(V' c),  h'_t = unit(h'_(t-1), y_(t-1), c)
    logits = G_l G_r maxout(O_h h'_t + O_y y_(t-1) + O_c c)                      (section 2, app. A)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from isthmus.claims import Claim, Gate, Row, Ruler, Status, judge
from isthmus.claims import Scale as ClaimScale
from isthmus.decoding.phrase_table import PhraseTable, accuracy, best_lists, reachable, tuned
from isthmus.errors import InvalidInputError
from isthmus.models.phrase_network import PAD, PhraseNetwork
from isthmus.roles import Loss
from isthmus.signals.tokenizer import learn_tokenizer
from isthmus.training.data import Data, Pair
from isthmus.training.loop import Plan
from isthmus.training.seeds import batch_generator
from isthmus.training.system import Answer, Scale, TrainedSystem
from isthmus.training.text import tokenize
from isthmus.workbench import numbers
from isthmus.workbench.tokenizer import load_tokenizer
from isthmus.workbench.trained import trained

END = 1
SEED = 7
"""Of the claim's corpus and sentences."""


@dataclass(frozen=True)
class Settings:
    """Settings of the network; the defaults are the paper's.

    Attributes:
        hidden_size: Width D of both units, and of the summary c.
        rank: Width of the embeddings, and rank of the output matrix.
        maxout: Maxout units.
        vocab_size: Tokens of both sides together.
        batch_size: Pairs of a micro-batch.
        longest: Tokens of a target at most.
        summary: The idea itself; off, the decoder is told nothing of the source.
    """

    hidden_size: int = 1000
    rank: int = 100
    maxout: int = 500
    vocab_size: int = 15_000
    batch_size: int = 64
    longest: int = 64
    summary: bool = True


class RnnEncoderDecoder(TrainedSystem):
    """Scores and writes phrases.

    Args:
        settings: See :class:`Settings`.
        tokenizer: Of both sides.
    """

    name = "rnn-encoder-decoder"
    reads = "pairs"
    settings_type = Settings
    scales: ClassVar[Mapping[str, Scale]] = {
        "test": Scale(Settings(16, 8, 8, 300, 8), Plan(6, validate_every=3), "workbench:numbers"),
        "small": Scale(
            Settings(128, 32, 64, 400, 64, 16),
            Plan(1_500, learning_rate=4e-3, warmup_steps=50, validate_every=300),
            "workbench:numbers",
        ),
        "paper": Scale(
            Settings(),
            Plan(
                1_000_000,
                optimizer="adadelta",
                learning_rate=1.0,
                betas=(0.95, 0.999),
                schedule="constant",
                validate_every=10_000,
                save_every=2_000,
                log_every=100,
            ),
            "hub:wmt/wmt14:fr-en",
        ),
    }
    module: PhraseNetwork

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        super().__init__(settings)
        self.tokenizer = tokenizer
        self.module = PhraseNetwork(
            len(tokenizer), settings.hidden_size, settings.rank, settings.maxout, settings.summary
        )

    @classmethod
    def untrained(cls, settings: Settings, data: Data[Pair]) -> Self:
        """A tokenizer learnt from both sides, and random weights."""
        texts = (text for pair in data.train for text in pair)
        return cls(settings, learn_tokenizer(texts, settings.vocab_size))

    def learner(self, data: Data[Pair], plan: Plan) -> PhraseLearner:
        """Pairs, every one as often as any other."""
        return PhraseLearner(self, data, plan.seed)

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """Log-probability of each target given its source, in nats, its end included.

        Raises:
            InvalidInputError: A side is empty.
        """
        for pair in pairs:
            if not pair.source.strip() or not pair.target.strip():
                raise InvalidInputError(f"a phrase pair needs two sides, got {pair}")
        found = []
        for start in range(0, len(pairs), 512):
            source, target = padded(self.tokenizer, pairs[start : start + 512])
            logp = torch.log_softmax(self.module(source, target), -1)
            each = logp.gather(2, target[..., None])[..., 0].masked_fill(target == PAD, 0.0)
            found += each.sum(1).tolist()
        return found

    @torch.no_grad()
    def write(self, sources: Sequence[str]) -> list[str]:
        """Greedy targets of phrases."""
        ids = pad_sequence(tokenize(self.tokenizer, sources), True, PAD)
        summary = self.module.encode(ids)
        token = torch.zeros(len(ids), 1, dtype=torch.int64)
        state, rows = None, []
        for _ in range(self.settings.longest):
            logits, state = self.module.step(summary, token, state)
            token = logits.argmax(-1)
            rows.append(token)
        table = torch.cat(rows, 1).tolist()
        cut = [row[: row.index(END) if END in row else None] for row in table]
        return [self.tokenizer.decode(row) for row in cut]

    def run(self, given: str) -> Answer:
        """Write the translation of a phrase; a source and a target with a tab between are scored.

        Raises:
            InvalidInputError: A side is empty.
        """
        if "\t" in given:
            pair = Pair(*given.strip("\n").split("\t", 1))
            [logp] = self.score([pair])
            return Answer(f"{logp:.4f}", {"logprob": logp})
        if not given.strip():
            raise InvalidInputError("the phrase is empty; give some text")
        return Answer(self.write([given])[0])

    def write_files(self, folder: Path) -> None:
        """Write weights and the tokenizer."""
        super().write_files(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def read_files(cls, settings: Settings, folder: Path) -> Self:
        """Read them."""
        return cls(settings, load_tokenizer(folder)).load_weights(folder)


def padded(tokenizer: Any, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of both sides, int64 [B, S] and [B, T]."""
    sides = ([p.source for p in pairs], [p.target for p in pairs])
    source, target = (pad_sequence(tokenize(tokenizer, side), True, PAD) for side in sides)
    return source, target


class PhraseLearner:
    """Cross-entropy of phrase pairs; how often a pair occurs is left to the phrase table.

    Args:
        system: What learns.
        data: Pairs.
        seed: Seed of the order.
    """

    lower_is_better = True

    def __init__(self, system: RnnEncoderDecoder, data: Data[Pair], seed: int) -> None:
        self.module: Any = system.module
        self.system, self.seed = system, seed
        self.pairs = sorted(set(data.train))
        self.valid = list(data.valid)
        sides = (tokenize(system.tokenizer, side) for side in zip(*self.pairs, strict=True))
        self.ids = list(zip(*sides, strict=True))
        self.identity = {
            "system": system.name,
            "settings": asdict(system.settings),
            "data": data.fingerprint,
        }

    def batch(self, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sources and targets, int64 [B, S] and [B, T]."""
        generator = batch_generator(self.seed, part)
        size = self.system.settings.batch_size
        chosen = torch.randint(len(self.ids), (size,), generator=generator).tolist()
        source, target = zip(*(self.ids[i] for i in chosen), strict=True)
        return pad_sequence(list(source), True, PAD), pad_sequence(list(target), True, PAD)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> Loss:
        """Sum over target tokens."""
        source, target = batch
        logits = self.module(source, target)
        total = F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="sum"
        )
        return Loss(total, int((target != PAD).sum()))

    def validate(self) -> dict[str, float]:
        """Nats a token, and the share of held-out phrases that are written right."""
        found = self.loss(padded(self.system.tokenizer, self.valid))
        said = self.system.write([p.source for p in self.valid])
        right = sum(a == p.target for a, p in zip(said, self.valid, strict=True))
        return {
            "loss": float(found.total) / float(found.weight),
            "exact": right / len(self.valid),
        }


def aligned(kinds: Sequence[Pair], sentences: int, rng: random.Random) -> list[Pair]:
    """Phrase pairs of a corpus: sentences of two phrases, one in five aligned crosswise.

    Args:
        kinds: Right phrase pairs; a few of the first occur often, most of them once or twice.
        sentences: How many.
        rng: Draws phrases and errors.
    """
    often = [1 / (200 + rank) for rank in range(len(kinds))]
    found = list[Pair]()
    for _ in range(sentences):
        a, b = rng.choices(kinds, often, k=2)
        crossed = rng.random() < 0.2
        found += [Pair(a.source, b.target), Pair(b.source, a.target)] if crossed else [a, b]
    return found


def claim(ruler: Ruler, scale: ClaimScale = "small") -> Claim:
    """Sentences of number phrases by a noisy phrase table, with the network and without."""
    del ruler
    small = scale != "test"
    rng = random.Random(SEED)
    kinds = sorted(set(numbers.pairs(3_000 if small else 60, seed="kinds")))
    rng.shuffle(kinds)
    noisy = aligned(kinds, 1_500 if small else 60, rng)
    table = PhraseTable.count(noisy)
    truth = dict(kinds)
    once = {s for s, found in table.targets.items() if max(found.values()) == 1}

    def drawn(count: int, among: Sequence[str]) -> list[list[str]]:
        return [rng.sample(among, 2) for _ in range(count)]

    known = sorted(table.targets)
    count = 2_000 if small else 20
    tuning, test, rare = drawn(count, known), drawn(count, known), drawn(count, sorted(once))
    data = Data(noisy, numbers.pairs(100, held_out=True), "noisy phrase pairs")
    pairs = sorted({Pair(s, t) for s, found in table.targets.items() for t in found})

    def measured(settings: Settings | None) -> tuple[float, ...]:
        """Accuracy on all test sentences and on those of rare phrases, and the most possible."""
        scores = dict.fromkeys(pairs, 0.0)
        if settings is not None:
            plan = RnnEncoderDecoder.scales["small" if small else "test"].plan
            folder = trained(
                RnnEncoderDecoder, "small" if small else "test", settings=settings, plan=plan,
                data=data,
            )  # fmt: skip
            network = RnnEncoderDecoder.from_pretrained(folder)
            scores = dict(zip(pairs, network.score(pairs), strict=True))
        lists = [best_lists(table, some, scores) for some in (tuning, test, rare)]
        answers = [[tuple(truth[p] for p in s) for s in some] for some in (tuning, test, rare)]
        weights = tuned(lists[0], answers[0], network=settings is not None)
        right = [accuracy(*pair, weights) for pair in zip(lists[1:], answers[1:], strict=True)]
        most = [reachable(*pair) for pair in zip(lists[1:], answers[1:], strict=True)]
        return tuple(100 * share for share in (*right, *most))

    told = RnnEncoderDecoder.scales["small" if small else "test"].settings
    plain, ours = measured(None), measured(told)
    off = measured(Settings(**{**asdict(told), "summary": False}))
    gates = (
        Gate("sentences right, points gained", ours[0] - plain[0], ">=", 3.0),
        Gate("the same on pairs that the table has seen once", ours[1] - plain[1], ">=", 3.0),
        Gate("gain kept without the summary (idea off), points", off[0] - plain[0], "<", 3.0),
    )
    direction = (Gate("sentences right, points gained", ours[0] - plain[0], ">", 0.0),)
    status = judge(gates, direction)
    why = f"the lists hold the right translation of {plain[2]:.1f} % of the sentences"
    return Claim(
        slug="rnn-encoder-decoder",
        statement="The probability that a network gives to a phrase pair through one vector makes "
        "a noisy phrase table choose the right translation more often, also where the table has "
        "seen a pair only once.",
        paper_figure="BLEU 33.30 to 33.87 on WMT14 English-French (Table 1)",
        rows=(
            Row("sentences right", "%", plain[0], ours[0], off[0], ceiling=plain[2]),
            Row("of pairs seen once", "%", plain[1], ours[1], off[1], ceiling=plain[3]),
        ),
        scale=scale,
        device="cpu",
        status=status,
        reason="" if status is Status.REPRODUCED else why,
        gates=gates,
        seeds=(SEED,),
        notes=(
            f"{len(kinds)} phrase pairs in 4 languages, {len(noisy)} occurrences in sentences of "
            "two phrases, one sentence in five aligned crosswise; 20 best combinations; weights "
            f"of every arm are tuned on {count} sentences and held to {count} others.",
            "A first look spread the errors over the whole corpus and let most phrases occur once: "
            "the lists held the right translation of 77.0 % of the sentences, and counts alone "
            "chose it in 76.0 %. Of seven other corpora, tried without a network, this one was "
            "taken for the room it leaves: errors stay inside a sentence, as those of word "
            "alignment do, and more phrases occur twice or three times.",
            "On it a network of characters gained 4.5 and 2.7 points (seeds 5 and 6) and wrote 3 "
            "and none of 100 held-out numbers right; one of pieces of words, trained for as many "
            f"steps, wrote 28 (seed 5). This is seed {SEED}, not looked at before that choice.",
            "On the first corpus, with every other pair extracted a second time, a digit too few, "
            "the network was of no help (68.0 % with it and without): it learns the cut targets "
            "like the whole ones.",
        ),
    )
