"""Consensus on sentences made by hand, the clips, and the judge's place in the choice."""

from __future__ import annotations

import pytest
import torch

from isthmus.claims import Ruler
from isthmus.errors import InvalidInputError
from isthmus.metrics.cider import CiderD
from isthmus.roles import Hypothesis, Rerank
from isthmus.systems.decoding.caption_consensus import CaptionConsensus, Judge, Settings, claim
from isthmus.workbench import clips as bench

CORPUS = [[t.split()] for t in ("a cat sat here", "the dog ran off", "one bird flew by", "a cow")]
SAID = [t.split() for t in ("a cat sat here", "the dog sat here", "a cat sat there")]


def test_the_sentence_between_the_others_is_chosen():
    cider = CiderD(CORPUS)
    rule = CaptionConsensus(cider)
    support = rule.support(SAID)
    u = cider.matrix(SAID)
    assert support == pytest.approx([(u[i][(i + 1) % 3] + u[i][(i + 2) % 3]) / 2 for i in range(3)])
    assert rule.best(SAID) == 0
    assert rule.support([*SAID, SAID[1]])[1] > support[1]
    assert rule.best([[], [], SAID[0]]) == 0  # nothing supports anything: the first
    assert isinstance(rule, Rerank)


def test_the_judge_chooses_among_the_best_few():
    class Last(Judge):
        def forward(self, frames, said):
            return torch.arange(len(said), dtype=torch.float32)  # likes the last of what it sees

    clip = torch.zeros(bench.FRAMES, bench.SIDE, bench.SIDE)
    said = [c[0] for c in bench.clips(5, seed=1).captions]
    cider = CiderD(bench.clips(50, seed=2).captions)
    order = sorted(range(5), key=lambda i: -CaptionConsensus(cider).support(said)[i])
    for keep in (1, 2, 4):
        rule = CaptionConsensus(cider, Last(), Settings(keep=keep))
        assert rule.best(said, clip) == order[keep - 1]
    off = CaptionConsensus(cider, Last(), Settings(consensus=False))
    assert off.best(said, clip) == 4
    words = {w: i for i, w in enumerate(bench.WORDS)}
    answers = [Hypothesis((*(words[w] for w in s), 0), 0.0, 0.0) for s in said]
    assert off.choose(answers, clip) == 4


def test_clips_show_what_their_captions_say():
    data = bench.clips(400, seed=0)
    means = data.frames.mean(0)
    assert data.frames.shape == (400, bench.FRAMES, bench.SIDE, bench.SIDE)
    assert abs(float(means.mean())) < 0.2
    clear = data.frames.clamp(min=0)
    column = (clear.sum(2) * torch.arange(bench.SIDE)).sum(-1) / clear.sum((2, 3))
    drift = column[:, -2:].mean(1) - column[:, :2].mean(1)
    right = torch.tensor(["right" in c[0] for c in data.captions])
    left = torch.tensor(["left" in c[0] for c in data.captions])
    assert drift[right].mean() > 0.05 and drift[left].mean() < -0.05
    same = bench.clips(400, seed=0)
    assert torch.equal(same.frames, data.frames) and same.captions == data.captions
    assert len({" ".join(c) for cs in data.captions for c in cs}) > 100


def test_bad_input_is_one_line():
    with pytest.raises(InvalidInputError, match="at least 3 captions, got 2"):
        CaptionConsensus(CiderD(CORPUS)).best(SAID[:2])
    with pytest.raises(InvalidInputError, match="keep must be at least 1"):
        CaptionConsensus(CiderD(CORPUS), None, Settings(keep=0))


def test_the_claim_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    made = claim(Ruler(), "test")
    assert made.slug == "caption-consensus" and len(made.gates) == 4
