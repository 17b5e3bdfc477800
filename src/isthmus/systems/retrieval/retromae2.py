"""RetroMAE v2: the first token rebuilds the text, the others name its words.

Paper: Xiao, Liu, Shao, Cao. RetroMAE v2: Duplex Masked Auto-Encoder For Pre-Training
    Retrieval-Oriented Language Models. 2022. arXiv:2211.08769
Idea: Pretrain the first token to rebuild a text through a weak decoder, and the other tokens to
    predict its bag of words; search with both.
Differs: Places are normalised before they become the decoder's queries. The head's bias begins as
    the law of single words and is no part of the sparse half, log(1 + u), u above the first word
    left out; both halves have length 1. Tuning begins with a whitened dense half, with negatives of
    the batch only; mined ones and distillation are left out. The small scale is two layers of width
    128, and w is 1 there: with 0.1 no bag is learnt so soon.

>>> fuse([{"q": {"a": 0.5, "b": 0.25}}, {"q": {"a": 0.25, "b": 0.75}}])["q"]  # eq. 10
{'a': 0.75, 'b': 1.0}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge
from isthmus.errors import InvalidInputError
from isthmus.indexes.base import to_run
from isthmus.indexes.dense import DenseIndex
from isthmus.indexes.fusion import fuse
from isthmus.indexes.sparse import SparseIndex
from isthmus.metrics.ranking import evaluate, paired_bootstrap
from isthmus.models.duplex_encoder import DuplexEncoder, Search, corrupted
from isthmus.models.embedder import Embedder
from isthmus.objectives.contrastive import info_nce, same
from isthmus.roles import Loss
from isthmus.training.buckets import BucketSampler
from isthmus.training.data import Data, Pair
from isthmus.training.loop import Plan, Trainer
from isthmus.training.seeds import batch_generator
from isthmus.training.system import Answer, TrainedSystem
from isthmus.training.system import Scale as TrainingScale
from isthmus.workbench import codesearch, pycode
from isthmus.workbench.codesearch import Task
from isthmus.workbench.tokenizer import load_tokenizer, masking_tokenizer
from isthmus.workbench.trained import trained

DEPTH = 1000
"""Documents of a query that dense and sparse search hand over to be added up."""

REST = "rest.safetensors"
"""Weights besides the encoder: the head of the sparse half, and the decoder."""


@dataclass(frozen=True)
class Settings:
    """Settings; the paper begins with BERT-base.

    Attributes:
        decoder: Whether the first token rebuilds the text (L_d).
        bag_weight: Weight w of the bag of words (L_b); with 0 and no decoder the idea is off, and
            masked tokens alone are learnt.
        search: Halves of the vector that are tuned and searched with.
        encoder_rate: Share of words hidden from the encoder.
        decoder_rate: Share of places hidden from a row of the decoder.
        pretrain_steps: Batches of pretraining; those that the plan has beyond them tune.
        pretrain_batch: Texts of a batch of pretraining.
        tune_batch: Pairs of a batch of tuning.
        dimension: Numbers of the dense half.
        terms: Largest values of the sparse half that are kept.
        hidden_size: Width of the encoder.
        num_layers: Layers.
        num_heads: Attention heads.
        vocab_size: Tokens of the vocabulary that is learnt from the data.
        max_length: Longest text in tokens.
        temperature: Scores are divided by it while tuning.
    """

    decoder: bool = True
    bag_weight: float = 0.1
    search: Search = "both"
    encoder_rate: float = 0.3
    decoder_rate: float = 0.5
    pretrain_steps: int = 600_000
    pretrain_batch: int = 256
    tune_batch: int = 1024
    dimension: int = 384
    terms: int = 384
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    vocab_size: int = 30_522
    max_length: int = 512
    temperature: float = 0.05


SMALL = Settings(
    bag_weight=1.0, pretrain_steps=800, pretrain_batch=32, tune_batch=64, dimension=64, terms=64,
    hidden_size=128, num_layers=2, num_heads=4, vocab_size=2000, max_length=48, temperature=0.1,
)  # fmt: skip
TINY = replace(
    SMALL, pretrain_steps=2, pretrain_batch=8, tune_batch=8, dimension=16, hidden_size=32,
    num_layers=1, vocab_size=500, max_length=24,
)  # fmt: skip


class Retromae2(TrainedSystem):
    """Pretrained on the texts of the pairs, tuned on the pairs; finds among their documents.

    The folder is that of an embedding model, too, whose vectors are the dense half.

    Attributes:
        dense: Index of the documents by their dense half.
        sparse: Index of the documents by their sparse half.
    """

    name = "retromae2"
    reads = "pairs"
    settings_type = Settings
    scales: ClassVar = {
        "test": TrainingScale(
            TINY, Plan(4, validate_every=4, learning_rate=1e-3), "workbench:docstrings"),
        "small": TrainingScale(
            SMALL, Plan(900, schedule="linear", warmup_steps=20, validate_every=450),
            "workbench:docstrings"),
        "paper": TrainingScale(
            Settings(), Plan(620_000, learning_rate=1e-4, schedule="linear", warmup_steps=6000),
            "hub:sentence-transformers/msmarco"),
    }  # fmt: skip

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        super().__init__(settings)
        self.tokenizer = tokenizer
        shape = ("dimension", "terms", "hidden_size", "num_layers", "num_heads", "max_length")
        self.module: Any = DuplexEncoder(
            len(tokenizer),
            **{name: getattr(settings, name) for name in (*shape, "decoder", "search")},
            bag=settings.bag_weight > 0,
        )
        self.data: Data[Pair] = Data([], [])
        self.documents: dict[str, str] = {}
        self.dense, self.sparse = DenseIndex(), SparseIndex("none")

    @property
    def searched(self) -> tuple[str, ...]:
        """Names of the halves that are searched with."""
        return tuple(h for h in ("dense", "sparse") if self.settings.search in (h, "both"))

    @classmethod
    def untrained(cls, settings: Settings, data: Data[Pair]) -> Self:
        """A new network, with a vocabulary learnt from the data."""
        texts = [text for pair in data.train for text in pair]
        tokenizer: Any = masking_tokenizer(texts, settings.vocab_size)
        tokenizer.model_max_length = settings.max_length
        system = cls(settings, tokenizer)
        system.data, (ids, present, _) = data, system.read(texts[:10_000])
        system.module.begin(ids[present])
        return system

    def learner(self, data: Data[Pair], plan: Plan) -> Duplex:
        """Pretraining, and then tuning."""
        return Duplex(self, data, plan)

    def read(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids [B, T] of texts, which are tokens, and the number of each one's word (else -1)."""
        limit = self.settings.max_length
        # encode_batch_fast does not say which word a token belongs to
        rows = self.tokenizer.backend_tokenizer.encode_batch([t or " " for t in texts])
        ids = [torch.tensor(row.ids[:limit]) for row in rows]
        words = [torch.tensor([-1 if w is None else w for w in r.word_ids[:limit]]) for r in rows]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(row) for row in ids])
        present = torch.arange(padded.shape[1]) < lengths[:, None]
        return padded, present, nn.utils.rnn.pad_sequence(words, True, -1)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray[Any, Any], list[dict[str, float]]]:
        """Dense halves [N, E], and sparse halves by token, their largest values kept."""
        dense, sparse = self.module.encode(texts, self.read)
        return dense, sparse

    def weigh(self, texts: Sequence[str], side: str = "document") -> list[dict[str, float]]:
        """Sparse halves; queries and documents are weighed alike."""
        del side
        return self.encode(texts)[1]

    def index(self, documents: Mapping[str, str]) -> None:
        """Take these documents, by id, as what is searched."""
        self.documents = dict(documents)
        self.dense, self.sparse = DenseIndex(), SparseIndex("none")
        reps = dict(zip(("dense", "sparse"), self.encode(list(documents.values())), strict=True))
        for name in self.searched:
            getattr(self, name).add(list(documents), reps[name])

    def search(self, queries: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Documents of each query with the sum of the scores of both halves (eq. 10)."""
        reps = dict(zip(("dense", "sparse"), self.encode(list(queries.values())), strict=True))
        found = {name: getattr(self, name).search(reps[name], DEPTH) for name in self.searched}
        return fuse([to_run(list(queries), hits) for hits in found.values()])

    def measure(self, task: Task) -> np.ndarray[Any, Any]:
        """MRR@10 of every query of a task; its documents become what is searched."""
        self.index(task.documents)
        return evaluate(task.qrels, self.search(task.queries), ["mrr@10"])["mrr@10"]

    def run(self, given: str) -> Answer:
        """The best documents for a query.

        Raises:
            InvalidInputError: The query is empty.
        """
        if not given.strip():
            raise InvalidInputError("the query is empty; give some words")
        found = self.search({"": given})[""]
        best = sorted(found, key=lambda d: (-found[d], d))[:5]
        hits = [{"id": d, "score": round(found[d], 4), "text": self.documents[d]} for d in best]
        lines = (f"{h['score']:8.3f}  {' '.join(str(h['text']).split())[:100]}" for h in hits)
        return Answer("\n".join(lines), {"hits": hits})

    def embedder(self) -> Embedder:
        """The dense half as an embedding model."""
        encoder: Any = transformers.BertModel(self.module.lm.config)
        encoder.load_state_dict(self.module.lm.bert.state_dict(), strict=False)
        for weight in encoder.pooler.parameters():  # not used
            nn.init.zeros_(weight)
        encoder.to(next(self.module.parameters()).device)
        return Embedder(encoder.eval(), self.tokenizer, pooling="cls", dense=self.module.dense,
                        max_length=self.settings.max_length)  # fmt: skip

    def write_files(self, folder: Path) -> None:
        """The folder of an embedding model, the other weights, both indexes and the documents."""
        if not self.documents:  # just trained
            texts = dict.fromkeys(p.target for p in [*self.data.train, *self.data.valid])
            self.index({str(i): text for i, text in enumerate(texts)})
        self.embedder().write(folder)
        state = self.module.state_dict()
        rest = {k: v.cpu().clone() for k, v in state.items() if not k.startswith("lm.bert.")}
        save_file(rest, folder / REST, metadata={"format": "pt"})
        for name in self.searched:
            getattr(self, name).save(folder / name)
        (folder / "documents.json").write_text(json.dumps(self.documents), encoding="utf-8")

    @classmethod
    def read_files(cls, settings: Settings, folder: Path) -> Self:
        """Read what :meth:`write_files` wrote."""
        system = cls(settings, load_tokenizer(folder))
        encoder = load_file(folder / "model.safetensors")
        weights = {f"lm.bert.{k}": v for k, v in encoder.items() if not k.startswith("pooler.")}
        system.module.load_state_dict(weights | load_file(folder / REST))
        system.module.eval()
        for name, kind in (("dense", DenseIndex), ("sparse", SparseIndex)):
            if name in system.searched:
                setattr(system, name, kind.load(folder / name))
        system.documents = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
        return system


class Duplex:
    """Batches of texts with L = L_d + w L_b + L_e, and then of pairs."""

    lower_is_better = False

    def __init__(self, system: Retromae2, data: Data[Pair], plan: Plan) -> None:
        self.system, self.module, self.seed = system, system.module, plan.seed
        settings = system.settings
        self.pairs = list(data.train)
        self.texts = list(dict.fromkeys(text for pair in self.pairs for text in pair))
        sizes = (len(self.texts), settings.pretrain_batch), (len(self.pairs), settings.tune_batch)
        self.samplers = [BucketSampler([0] * n, [size], plan.seed) for n, size in sizes]
        self.task = Task.of(data.valid[:: max(1, len(data.valid) // 200)])
        named = {"system": system.name, "settings": repr(settings)}
        self.identity = named | {"data": data.fingerprint}

    def batch(self, part: int) -> dict[str, torch.Tensor]:
        """Texts with their masks, or pairs, by number; the first pairs whiten the dense half."""
        settings, tokenizer = self.system.settings, self.system.tokenizer
        late = part - settings.pretrain_steps
        if late >= 0:
            if late < (dist.get_world_size() if dist.is_initialized() else 1):  # of every process
                self.system.module.whiten(self.texts[:2000], self.system.read)
            pairs = [self.pairs[i] for i in self.samplers[1].rows(late)]
            sides = [[pair[side] for pair in pairs] for side in (0, 1)]
            found = {"excluded": same(sides[0], sides[0]) | same(sides[1], sides[1])}
            for name, texts in zip(("query", "document"), sides, strict=True):
                found[f"{name}_ids"], found[f"{name}_present"], _ = self.system.read(texts)
            return found
        rows = self.samplers[0].rows(part)
        return corrupted(
            *self.system.read([self.texts[i] for i in rows]), mask_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer), encoder_rate=settings.encoder_rate,
            decoder_rate=settings.decoder_rate, generator=batch_generator(self.seed, part),
        )  # fmt: skip

    def loss(self, batch: dict[str, torch.Tensor]) -> Loss:
        """Pretraining: the three losses; tuning: every query chooses among the documents."""
        settings, found = self.system.settings, self.module(batch)
        if "seen" not in batch:
            total = info_nce(found, temperature=settings.temperature, excluded=batch["excluded"])
            return Loss(total, len(found))
        count = len(batch["ids"])
        weights = {"encoder": 1.0, "decoder": 1.0, "bag": settings.bag_weight}
        total = torch.stack([weights[name] * value for name, value in found.items()]).sum()
        return Loss(count * total, count, {k: count * v.detach() for k, v in found.items()})

    def validate(self) -> dict[str, float]:
        """MRR@10 among held-out documents."""
        found = float(self.system.measure(self.task).mean())
        self.system.documents = {}  # those that it searches once trained are all of the data's
        return {"mrr@10": found}


ARMS: dict[str, dict[str, Any]] = {
    "mlm": {"decoder": False, "bag_weight": 0.0, "search": "dense"},
    "v1": {"bag_weight": 0.0, "search": "dense"},
    "bag": {"decoder": False, "search": "sparse"},
    "off": {"decoder": False, "bag_weight": 0.0},
    "duplex": {},
}
"""What is pretrained besides masks, and searched with; ``off`` is both halves after masks alone."""


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Pretrain four ways alike, tune every arm on the same pairs, and search.

    Args:
        ruler: Not used: nothing is timed.
        scale: ``"test"`` is a few steps of a tiny encoder.
    """
    del ruler
    seeds = (0,) if scale == "test" else (0, 1, 2)
    tests = {"text": codesearch.text("test"), "doc2code": codesearch.doc2code("test")}
    both = Data(codesearch.pairs("train"), codesearch.pairs("dev"), "docstrings")
    texts = Data(codesearch.text("train").pairs, codesearch.text("dev").pairs, "text")
    found: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        runs = [_tuned(arm, scale, both, seed) for seed in (seeds if arm != "bag" else seeds[:1])]
        found[arm] = {n: np.mean([run.measure(t) for run in runs], 0) for n, t in tests.items()}
        if arm in ("mlm", "off", "duplex"):
            found[arm]["zero-shot"] = _tuned(arm, scale, texts, 0).measure(tests["doc2code"])
    means = {arm: {n: float(v.mean()) for n, v in values.items()} for arm, values in found.items()}
    joined = {arm: np.concatenate([found[arm][n] for n in tests]) for arm in ARMS}
    words = {name: codesearch.bm25(task) for name, task in tests.items()}
    compared = ("v1", "mlm"), ("duplex", "v1"), ("duplex", "off")
    over, more, taught = (paired_bootstrap(joined[a], joined[b]) for a, b in compared)
    gates = (
        Gate("first token rebuilding over masks alone, MRR@10", over.mean, ">=", 0.02),
        Gate("both halves over the first token alone, MRR@10", more.mean, ">=", 0),
        Gate("both halves over both after masks alone, MRR@10", taught.mean, ">=", 0.02),
    )
    status = judge(gates, [Gate("v1 over masks alone", over.mean, ">", 0),
                           Gate("both over masks alone", taught.mean, ">", 0)])  # fmt: skip
    return Claim(
        slug=Retromae2.name,
        statement="Pretraining the first token to rebuild the text through a weak decoder makes a "
        "better retriever than masked tokens alone, and the other tokens' words do not make it "
        "worse.",
        paper_figure="BEIR nDCG@10 0.491, v1 0.452, BERT 0.371 (as the card gives them)",
        rows=tuple(
            Row(f"MRR@10, {n}", "", means["mlm"][n], means["duplex"][n], means["off"][n],
                note="".join(f"{a} {means[a][n]:.3f}, " for a in ("v1", "bag") if n in means[a])
                + f"BM25 {words['doc2code' if n == 'zero-shot' else n]:.3f}")
            for n in (*tests, "zero-shot")
        ),
        scale=scale, device="cpu", status=status,
        reason="" if status == "reproduced" else "missed: "
        + "; ".join(g.name for g in gates if not g.passed),
        notes=(
            f"v1 over masks alone {over.mean:+.3f} [{over.low:+.3f}, {over.high:+.3f}]; both "
            f"halves over v1 {more.mean:+.3f} [{more.low:+.3f}, {more.high:+.3f}], and over both "
            f"after masks alone {taught.mean:+.3f} [{taught.low:+.3f}, {taught.high:+.3f}]; 95 % "
            "intervals over queries, each the mean of all seeds.",
            "Baseline is masked tokens alone and the first token; off, the same and both halves. "
            "Equal pretraining batches for all, once each; seeds are those of tuning, one for the "
            "bag of words alone. Zero-shot: tuned on text, searched in code.",
            "After a first look: words are really hidden (none had been); w, temperature, rate, "
            "steps, level of u and how network and tuning begin were chosen on development data.",
            f"Standard library, digest {pycode.digest()[:12]}.",
        ),
        gates=gates, seeds=seeds,
    )  # fmt: skip


def _tuned(arm: str, scale: Scale, data: Data[Pair], seed: int) -> Retromae2:
    """An arm, pretrained once on the texts of all training pairs, and tuned on these."""
    told = Retromae2.scales[name := "test" if scale == "test" else "small"]
    settings = replace(told.settings, **ARMS[arm])
    plan = replace(told.plan, steps=(steps := settings.pretrain_steps), validate_every=steps)
    begun = replace(settings, search="both")  # pretraining knows of no search
    system = Retromae2.from_pretrained(trained(Retromae2, name, settings=begun, plan=plan))
    system.settings = replace(settings, pretrain_steps=0)
    system.module.search = settings.search
    left = told.plan.steps - steps
    plan = replace(told.plan, steps=left, validate_every=left, learning_rate=5e-4, seed=seed)
    Trainer(system.learner(data, plan), plan).run()
    return system
