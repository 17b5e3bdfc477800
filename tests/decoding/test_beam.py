"""Beams against transformers, token for token, and against exhaustive search."""

import itertools
import math
from collections import Counter

import pytest
import tiny
import torch

from isthmus.decoding.beam import BeamSearch, Candidates, StochasticBeam
from isthmus.decoding.law import Law
from isthmus.decoding.reshape import Walk
from isthmus.decoding.search import search
from isthmus.decoding.table import TableTarget
from isthmus.errors import DeadEnd, InvalidInputError, UnsupportedModelError
from isthmus.roles import Search, Taps
from isthmus.testing.statistics import goodness_of_fit

ENDS = [2, 11, 17, 23, 40, 51]  # random models seldom end by themselves


def transformers_beams(name, prompts, new, **options):
    model = tiny.network(name)
    out = []
    for ids in prompts:
        got = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids[None]),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=ENDS,
            pad_token_id=0,
            num_return_sequences=options["num_beams"],
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        start = 1 if tiny.target(name).encoder_decoder else len(ids)
        rows = []
        for row, score in zip(got.sequences, got.sequences_scores, strict=True):
            tokens = row[start:].tolist()
            end = next((i + 1 for i, t in enumerate(tokens) if t in ENDS), len(tokens))
            rows.append((tuple(tokens[:end]), float(score)))
        out.append(rows)
    return out


def our_beams(name, prompts, new, beam, law=None):
    target = tiny.target(name)
    if target.encoder_decoder:
        starts, inputs = tiny.facade(name)._sources(list(prompts), None)
    else:
        starts, inputs = prompts, None
    return search(target, starts, beam, max_new_tokens=new, end_tokens=ENDS, law=law, inputs=inputs)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bloom", "T5", "Bart"])
@pytest.mark.parametrize(
    ("beams", "penalty", "stopping"),
    [(2, 1.0, False), (4, 0.0, "never"), (4, 2.0, "never"), (4, 1.0, True), (8, -1.0, False)],
)
def test_beams_are_those_of_transformers(name, beams, penalty, stopping):
    prompts, new = tiny.prompts(), 12
    options = {"num_beams": beams, "length_penalty": penalty, "early_stopping": stopping}
    want = transformers_beams(name, prompts, new, **options)
    beam = BeamSearch(beams, length_penalty=penalty, early_stopping=stopping)
    got = our_beams(name, prompts, new, beam)
    for ours, theirs in zip(got, want, strict=True):
        assert [h.tokens for h in ours] == [t for t, _ in theirs]
        for h, (_, score) in zip(ours, theirs, strict=True):
            assert h.score == pytest.approx(score, rel=1e-4)
            assert h.score == pytest.approx(h.logprob / len(h.tokens) ** penalty, rel=1e-6)


def test_processors_see_each_hypothesis_as_in_transformers():
    prompts = tiny.prompts()
    want = transformers_beams("Llama", prompts, 10, num_beams=4, repetition_penalty=1.7)
    law = Law(repetition_penalty=1.7)
    got = our_beams("Llama", prompts, 10, BeamSearch(4), law)
    assert [[h.tokens for h in row] for row in got] == [[t for t, _ in row] for row in want]


@pytest.mark.parametrize("end", [None, 1])
def test_a_beam_as_wide_as_all_answers_is_exhaustive(end):
    size, length = 3, 4
    target = TableTarget(size, seed=5, end_token=end)
    ends = [] if end is None else [end]
    beam = BeamSearch(size**length, length_penalty=0.0, early_stopping="never")
    prompts = [torch.tensor([0, 2]), torch.tensor([1])]
    got = search(target, prompts, beam, max_new_tokens=length, end_tokens=ends)
    for prompt, answers in zip(prompts, got, strict=True):
        truth = target.truth(prompt.tolist(), length, Law(temperature=1.0), end_token=end)
        want = sorted(truth.items(), key=lambda item: -item[1])
        assert [h.tokens for h in answers] == [answer for answer, _ in want]
        for h, (_, p) in zip(answers, want, strict=True):
            assert h.logprob == pytest.approx(math.log(p), abs=1e-9)


def test_a_beam_of_one_is_greedy():
    prompts = tiny.prompts()
    got = our_beams("Llama", prompts, 12, BeamSearch(1))
    for greedy, (answer,) in zip(tiny.reference("Llama", "float64", 12), got, strict=True):
        assert list(answer.tokens) == greedy[: len(answer.tokens)]


def test_groups_avoid_the_tokens_of_earlier_groups():
    first = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]).log()
    beam = BeamSearch(2, groups=2, diversity=1.0)
    beam.start(1, torch.Generator(), end_tokens=[], max_new_tokens=3)
    # 0.4 e^-1 = 0.147 is less than 0.3, so the second group takes the second token
    choice = beam.step(first)
    assert choice.token.tolist() == [[0, 1]]
    assert choice.logprob.exp().tolist()[0] == pytest.approx([0.4, 0.3])
    plain = BeamSearch(2, groups=2, diversity=0.0)
    plain.start(1, torch.Generator(), end_tokens=[], max_new_tokens=3)
    assert plain.step(first).token.tolist() == [[0, 0]]
    # the penalty is of this step alone: sums stay log-probabilities
    same = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(1, 2, 4)
    choice = beam.step(same)
    assert choice.token.tolist() == [[3, 2]] and choice.parent.tolist() == [[0, 1]]
    assert beam._parts[1].sums.exp().tolist() == [pytest.approx([0.3 * 0.3])]


def test_groups_make_answers_differ():
    prompts = tiny.prompts()
    plain = our_beams("Llama", prompts, 10, BeamSearch(4))
    diverse = our_beams("Llama", prompts, 10, BeamSearch(4, groups=4, diversity=5.0))
    for a, b in zip(plain, diverse, strict=True):
        assert len({h.tokens[0] for h in b}) == 4 > len({h.tokens[0] for h in a})
        assert {h.trace["group"] for h in b} == {0, 1, 2, 3}


class Longest:
    """Prefers sums of token numbers, which has nothing to do with likelihood."""

    def __init__(self):
        self.seen = []

    def __call__(self, candidates: Candidates):
        return candidates.tokens().sum(-1).float()

    def follow(self, parent, token):
        self.seen.append((parent.tolist(), token.tolist()))


def test_a_ranker_decides_among_the_likeliest():
    ranker = Longest()
    beam = BeamSearch(2, ranker=ranker)
    target = TableTarget(6, seed=1)
    (answers,) = search(target, [torch.tensor([0])], beam, max_new_tokens=3)
    assert [h.score for h in answers] == [float(sum(h.tokens)) for h in answers]
    assert answers[0].score >= answers[1].score
    assert len(ranker.seen) == 3
    # all 6 first tokens cannot be candidates: 2 W = 4 are
    law = torch.log_softmax(target.logits(target.state(torch.tensor([[0]]))), -1)[0]
    assert set(ranker.seen[0][1][0]) == set(sorted(law.topk(4).indices.tolist())[-2:])


class Sums(Walk[int]):
    """Bans tokens so that the sum along the path stays even; the state is the sum."""

    stage = "mask"

    def start(self, prompt):
        return int(prompt.sum())

    def advance(self, state, token):
        return state + token

    def apply(self, states, logits):
        odd = (torch.arange(logits.shape[-1]) + torch.tensor(states)[:, None]) % 2 == 1
        return logits.masked_fill(odd, -torch.inf)


@pytest.mark.parametrize("make", [BeamSearch, StochasticBeam])
def test_states_of_reshapes_follow_the_hypotheses(make):
    prompts = tiny.prompts()
    got = our_beams("Llama", prompts, 10, make(5), Law(reshapes=[Sums()]))
    for prompt, answers in zip(prompts, got, strict=True):
        assert len(answers) == 5 and len({h.tokens for h in answers}) == 5
        for h in answers:
            partial = itertools.accumulate(h.tokens, initial=int(prompt.sum()))
            assert all(total % 2 == 0 for total in list(partial)[1:])


class Nothing(Sums):
    def apply(self, states, logits):
        return torch.full_like(logits, -torch.inf)


@pytest.mark.parametrize("make", [BeamSearch, StochasticBeam])
def test_a_law_without_tokens_is_a_dead_end(make):
    with pytest.raises(DeadEnd, match="no answer"):
        our_beams("Llama", tiny.prompts()[:1], 4, make(3), Law(reshapes=[Nothing()]))


class Unforkable:
    stage, taps = "mask", Taps()

    def begin(self, context, target, **inputs): ...
    def forget(self, requests): ...
    def __call__(self, logits, tree, context):
        return logits


def test_a_reshape_that_cannot_fork_is_refused_by_name():
    law = Law(reshapes=[Unforkable()])
    with pytest.raises(InvalidInputError, match="Unforkable cannot follow"):
        our_beams("Llama", tiny.prompts()[:1], 4, BeamSearch(3), law)


def test_bad_beams_and_models_are_refused():
    with pytest.raises(InvalidInputError, match="multiple"):
        BeamSearch(4, groups=3)
    with pytest.raises(InvalidInputError, match="early_stopping"):
        BeamSearch(4, early_stopping="soon")
    with pytest.raises(InvalidInputError, match="diversity"):
        BeamSearch(4, diversity=-1.0)
    with pytest.raises(InvalidInputError, match="width"):
        StochasticBeam(0)
    with pytest.raises(UnsupportedModelError, match="2 rows"):
        our_beams("Mamba", tiny.prompts()[:1], 4, BeamSearch(2))
    with pytest.raises(InvalidInputError, match="empty"):
        our_beams("Llama", [torch.tensor([], dtype=torch.int64)], 4, BeamSearch(2))
    with pytest.raises(InvalidInputError, match="no room"):
        our_beams("Llama", [torch.arange(128) % 60], 4, BeamSearch(2))
    assert isinstance(BeamSearch(), Search) and isinstance(StochasticBeam(), Search)


def without_replacement(law, width):
    """Probability of every ordered draw of `width` answers without replacement."""
    out = {}
    for order in itertools.permutations(law, width):
        p, left = 1.0, 1.0
        for answer in order:
            p *= law[answer] / left
            left -= law[answer]
        out[order] = p
    return out


@pytest.mark.parametrize("width", [1, 2])
def test_stochastic_beams_draw_without_replacement(width):
    target = TableTarget(3, seed=2, sharpness=0.7, end_token=1)
    prompt, length, rows = [0, 2], 2, 6000
    truth = target.truth(prompt, length, Law(temperature=1.0), end_token=1)
    want = without_replacement(truth, width)
    got = search(
        target,
        [torch.tensor(prompt)] * rows,
        StochasticBeam(width),
        max_new_tokens=length,
        end_tokens=[1],
        generator=torch.Generator().manual_seed(3),
    )
    counts = Counter(tuple(h.tokens for h in answers) for answers in got)
    assert set(counts) <= set(want)
    cells = list(want)
    assert goodness_of_fit([counts[c] for c in cells], [rows * want[c] for c in cells]) > 1e-3
    for answers in got[:50]:
        for h in answers:
            assert h.logprob == pytest.approx(math.log(truth[h.tokens]), abs=1e-9)
