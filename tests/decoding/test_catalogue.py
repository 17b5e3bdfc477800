"""Every decoding method of the catalogue against its formula, computed the slow way."""

import itertools
import math

import pytest
import tiny
import torch
from transformers.generation import logits_process as lp

from isthmus.decoding import truncation
from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.beam import BeamSearch
from isthmus.decoding.contrast import ContrastiveDecoding
from isthmus.decoding.dola import DoLa, candidate_layers, divergence
from isthmus.decoding.early_logits import EarlyLogits
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.fsd import FSD, FSDVec
from isthmus.decoding.law import Law
from isthmus.decoding.lookahead import ContrastiveSearch
from isthmus.decoding.search import search
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.decoding.truncation import Mirostat
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Choice, Context, Forkable, Reshape, Taps
from isthmus.testing.statistics import goodness_of_fit

TARGET = tiny.target("Llama")
AMATEUR = tiny.target("Llama", noise=0.5)
PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [3, 4], [9]]


def forward(ids, taps=None, target=TARGET):
    scores = target.forward(torch.tensor([ids]), taps=taps)
    return scores if taps else scores.logits[0, -1]


def states(ids, target=TARGET):
    return forward(ids, Taps(final=True), target).features.final[0]


def slow_contrastive_search(ids, k=5, alpha=0.6):
    p = torch.softmax(forward(ids), -1)
    past = states(ids)
    best, token = -math.inf, -1
    for v in p.topk(k).indices.tolist():
        h = states([*ids, v])[-1]
        worst = max(float(torch.cosine_similarity(h, x, dim=0)) for x in past)
        score = (1 - alpha) * float(p[v]) - alpha * worst
        if score > best:
            best, token = score, v
    return token


def slow_fsd(ids, n=3, k=5, beta=0.9, alpha=0.6):
    p = torch.softmax(forward(ids), -1)
    best, token = -math.inf, -1
    for v in p.topk(k).indices.tolist():
        penalty, rest = 0.0, 1.0
        for order in range(n - 1, 0, -1):
            context = ids[-order:]
            if len(context) < order:
                continue
            after = [ids[j] for j in range(order, len(ids)) if ids[j - order : j] == context]
            if v in after:
                penalty += rest * beta * after.count(v) / (len(after) + 1)
                rest *= 1 - beta
        penalty += rest * ids.count(v) / len(ids)
        score = (1 - alpha) * float(p[v]) - alpha * penalty
        if score > best:
            best, token = score, v
    return token


def slow_fsd_vec(ids, n=2, k=5, alpha=0.4):
    p = torch.softmax(forward(ids), -1)
    past = torch.cat([torch.zeros(n - 2, TARGET.hidden_size, dtype=torch.float64), states(ids)])
    window = [past[j : j + n - 1].flatten() for j in range(len(ids))]  # ends at token j
    best, token = -math.inf, -1
    for v in p.topk(k).indices.tolist():
        sims = [
            float(torch.cosine_similarity(window[-1], window[j], dim=0))
            for j in range(len(ids) - 1)
            if ids[j + 1] == v
        ]
        score = (1 - alpha) * float(p[v]) - alpha * max([0.0, *sims])
        if score > best:
            best, token = score, v
    return token


def slow_contrast(ids):
    strong, weak = forward(ids), forward(ids, target=AMATEUR)
    scores = 1.5 * strong - 0.5 * weak
    scores[strong < strong.max() + math.log(0.1)] = -math.inf
    return int(scores.argmax())


@torch.no_grad()
def slow_dola(ids, layers=(0, 1)):
    scores = forward(ids, Taps(layers=layers))
    last = torch.log_softmax(scores.logits[0, -1], -1)
    lower = {}
    for layer in layers:
        q = torch.log_softmax(TARGET.head(scores.features.layers[layer][0, -1]), -1)
        middle = ((last.exp() + q.exp()) / 2).log()
        js = sum((x.exp() * (x - middle)).sum() for x in (last, q)) / 2
        lower[float(js)] = q
    out = last - lower[max(lower)]
    out[last < last.max() + math.log(0.1)] = -math.inf
    return int(out.argmax())


CATALOGUE = {
    "contrastive search": (ContrastiveSearch, slow_contrastive_search),
    "contrastive search k=3": (
        lambda: ContrastiveSearch(3, 0.3),
        lambda ids: slow_contrastive_search(ids, 3, 0.3),
    ),
    "fsd": (FSD, slow_fsd),
    "fsd n=4": (lambda: FSD(4, 8, 0.7, 0.4), lambda ids: slow_fsd(ids, 4, 8, 0.7, 0.4)),
    "fsd-vec": (FSDVec, slow_fsd_vec),
    "fsd-vec n=3": (lambda: FSDVec(3, 6, 0.6), lambda ids: slow_fsd_vec(ids, 3, 6, 0.6)),
    "contrastive decoding": (lambda: ContrastiveDecoding(AMATEUR), slow_contrast),
    "dola": (lambda: DoLa(TARGET, (0, 1)), slow_dola),
}


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup", "token-recycling"])
@pytest.mark.parametrize("name", list(CATALOGUE))
def test_tokens_are_those_of_the_formula(name, drafter):
    make, slow = CATALOGUE[name]
    part = make()
    assert isinstance(part, Reshape) and isinstance(part, Forkable)
    got = tiny.facade("Llama").generate(
        PROMPTS, max_new_tokens=10, drafter=drafter, law=Law(reshapes=[part]), ignore_end=True
    )
    for prompt, answer in zip(PROMPTS, got, strict=True):
        ids = list(prompt)
        for token in answer.tokens:
            assert token == slow(ids)
            ids.append(token)


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_newcomers_and_leavers_do_not_disturb(name):
    make, _ = CATALOGUE[name]
    model = tiny.facade("Llama")

    def run(prompts, batch):
        requests = [
            Request(torch.tensor(p), Stopper(max_new_tokens=4 + 3 * i))
            for i, p in enumerate(prompts)
        ]
        for _ in decode(
            TARGET,
            requests,
            policy=model.policy("prompt-lookup"),
            acceptance=Lossless(),
            law=Law(reshapes=[make()]),
            generator=torch.Generator(),
            batch_size=batch,
        ):
            pass
        return [r.result.tokens for r in requests]

    prompts = [*PROMPTS, [9, 8, 9, 8, 9], [11]]
    assert run(prompts, 2) == run(prompts, 1)


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_beams_carry_the_state(name):
    """A beam of one, forked at every step, is greedy decoding; wider ones keep histories apart."""
    make, _ = CATALOGUE[name]
    prompts = [torch.tensor(p) for p in PROMPTS]
    greedy = tiny.facade("Llama").generate(
        PROMPTS, max_new_tokens=6, drafter="none", law=Law(reshapes=[make()]), ignore_end=True
    )
    beams = search(TARGET, prompts, BeamSearch(1), max_new_tokens=6, law=Law(reshapes=[make()]))
    assert [list(row[0].tokens) for row in beams] == [r.tokens for r in greedy]
    # one hypothesis of a wide beam, scored again alone, has the same sum
    wide = search(TARGET, prompts, BeamSearch(4), max_new_tokens=5, law=Law(reshapes=[make()]))
    for prompt, answers in zip(prompts, wide, strict=True):
        for h in answers[:2]:
            law = Law(reshapes=[make()])
            forced = Forced(h.tokens)
            search(TARGET, [prompt], forced, max_new_tokens=5, law=law)
            assert forced.total == pytest.approx(h.logprob, abs=1e-9)


class Forced:
    """A search of one hypothesis that takes given tokens and adds up what the law says of them."""

    width = 1

    def __init__(self, tokens):
        self.tokens, self.total = list(tokens), 0.0

    def start(self, rows, generator, *, end_tokens, max_new_tokens):
        self.at = 0

    def step(self, logprobs):
        token = self.tokens[self.at]
        self.at += 1
        self.total += float(logprobs[0, 0, token])
        if self.at == len(self.tokens):
            return None
        one = torch.zeros(1, 1, dtype=torch.int64)
        return Choice(one, one + token, logprobs[:, :, token])

    def finish(self):
        return []


@pytest.mark.parametrize(
    "part",
    [
        lambda: ContrastiveSearch(alpha=0.0),
        lambda: ContrastiveSearch(k=1),
        lambda: FSD(alpha=0.0),
        lambda: FSDVec(alpha=0.0),
        lambda: ContrastiveDecoding(AMATEUR, strength=0.0),
    ],
)
def test_switched_off_they_are_greedy(part):
    model = tiny.facade("Llama")
    want = model.generate(PROMPTS, max_new_tokens=12, drafter="none")
    got = model.generate(PROMPTS, max_new_tokens=12, drafter="none", law=Law(reshapes=[part()]))
    assert [r.tokens for r in got] == [r.tokens for r in want]


def test_contrastive_decoding_in_its_original_form():
    strong, weak = torch.tensor([[[2.0, 1.0, -3.0]]]), torch.tensor([[[2.0, 0.0, 0.0]]])
    part = ContrastiveDecoding(AMATEUR, original=True, temperature=0.5)
    got = part.combine(strong, [weak])
    want = torch.log_softmax(strong, -1) - torch.log_softmax(weak / 0.5, -1)
    assert got[0, 0, :2].tolist() == pytest.approx(want[0, 0, :2].tolist())
    assert got[0, 0, 2] == -math.inf


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma3", "Bart", "Marian"])
def test_early_logits_of_the_last_layer_are_the_models_own(name):
    target = tiny.target(name)
    early = EarlyLogits(target, [0, target.num_layers])
    inputs = target.probe_inputs()
    scores = target.forward(
        torch.tensor([[5, 6, 7]]),
        encoded=target.encode(**inputs) if inputs else None,
        taps=early.taps,
    )
    got = early(scores.features)
    assert got.shape == (1, 3, 2, target.vocab_size)
    torch.testing.assert_close(got[:, :, 1], scores.logits)


def test_a_head_that_does_more_is_refused():
    model = tiny.fresh("Gemma3")
    model.config.final_logit_softcapping = 3.0
    with pytest.raises(UnsupportedModelError, match="early layers"):
        EarlyLogits(HubTarget(model), [0])


def test_dola_refuses_the_last_layer_and_chooses_by_divergence():
    with pytest.raises(InvalidInputError, match="contrast with itself"):
        DoLa(TARGET, (0, 2))
    with pytest.raises(InvalidInputError, match="low, high"):
        candidate_layers("middle", 4)
    with pytest.raises(InvalidInputError, match="within 0 and 2"):
        EarlyLogits(TARGET, [3])
    assert float(divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.5]).log())) == 0.0
    part = DoLa(TARGET, (0, 1))
    tiny.facade("Llama").generate(
        [5, 6], max_new_tokens=2, drafter="none", law=Law(reshapes=[part])
    )
    assert part.chosen is not None and set(part.chosen.flatten().tolist()) <= {0, 1}


def test_numbers_out_of_range_are_refused():
    for make in (
        lambda: ContrastiveSearch(k=0),
        lambda: FSD(alpha=1.5),
        lambda: FSD(beta=2.0),
        lambda: FSDVec(n=1),
        lambda: Mirostat(tau=0.0),
        lambda: Mirostat(version=3),
        lambda: truncation.typical(1.0),
        lambda: truncation.top_h(0.0),
        lambda: ContrastiveDecoding(AMATEUR, strength=-1.0),
        lambda: DoLa(TARGET, plausibility=2.0),
    ):
        with pytest.raises(InvalidInputError):
            make()
    law = Law(reshapes=[ContrastiveSearch()])
    with pytest.raises(UnsupportedModelError, match="another strategy"):
        tiny.facade("Bloom").generate([5, 6], max_new_tokens=2, drafter="none", law=law)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (truncation.typical(0.9), lp.TypicalLogitsWarper(0.9)),
        (truncation.epsilon(0.02), lp.EpsilonLogitsWarper(0.02)),
        (truncation.eta(0.02), lp.EtaLogitsWarper(0.02)),
        (truncation.top_h(0.4), lp.TopHLogitsWarper(0.4)),
    ],
)
def test_warpers_are_bit_equal_to_transformers_and_follow_the_temperature(ours, theirs):
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    tree = TokenTree(torch.ones(2, 3).long(), Topology.of([-1, 0, 0]))
    law = Law(temperature=0.7, reshapes=[ours])
    context = Context(torch.ones(2, 4).long(), [1, 1], [1, 1], law, torch.Generator(), [0, 1])
    flat = torch.ones(6, 1).long()
    want = theirs(flat, lp.TemperatureLogitsWarper(0.7)(flat, logits.flatten(0, 1)))
    assert torch.equal(law.logits(logits, tree, context), want.view_as(logits))
    assert bool(want.isinf().any())


# Mirostat


def zipf(size, s):
    return -s * torch.arange(1, size + 1).double().log()


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_keeps_the_surprise_at_its_target(version):
    """2,000 draws from Zipf laws of changing steepness."""
    tau, generator = 3.0, torch.Generator().manual_seed(0)
    part = Mirostat(tau, 0.3, version)
    ids = torch.zeros(1, 2002, dtype=torch.int64)
    context = Context(ids, [1], [1], Law(temperature=1.0, reshapes=[part]), generator, [0])
    part.begin(context, None)
    surprises = []
    for i in range(2000):
        logits = zipf(3000, 1.05 + 0.1 * (i % 3))[None, None]
        tree = TokenTree.root(context.roots())
        law = torch.softmax(part(logits, tree, context), -1)
        token = int(torch.multinomial(law[0, 0], 1, generator=generator))
        surprises.append(-float(torch.log_softmax(logits, -1)[0, 0, token]) / math.log(2))
        ids[0, i + 1] = token
        context.lengths = [i + 2]
    assert sum(surprises) / len(surprises) == pytest.approx(tau, abs=0.2)


def test_mirostat_first_step_by_hand():
    part = Mirostat(2.0, 1.0, 2)
    context = Context(torch.zeros(1, 9).long(), [1], [1], None, torch.Generator(), [0])
    part.begin(context, None)
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]]]).log()
    # surprises 1, 2, 3, 4, 5, 5 bits; mu = 4
    got = part(logits, TokenTree.root(torch.tensor([0])), context)
    assert got[0, 0].isfinite().tolist() == [True] * 4 + [False] * 2
    context.ids[0, 1], context.lengths = 3, [2]  # 4 bits: mu falls by 2
    got = part(logits, TokenTree.root(torch.tensor([3])), context)
    assert got[0, 0].isfinite().tolist() == [True, True, False, False, False, False]
    # version 1: an exact Zipf law of exponent 2, mu = 4: k = sqrt(1 * 16 / (1 - 1/V)) = 4
    part = Mirostat(2.0, 1.0, 1)
    part.begin(context, None)
    context.lengths = [1]
    got = part(zipf(1000, 2.0)[None, None], TokenTree.root(torch.tensor([0])), context)
    assert int(got.isfinite().sum()) == 4


@pytest.mark.parametrize(("version", "seed"), [(1, 3), (2, 1)])
@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_mirostat_draws_from_its_law_with_and_without_drafts(version, seed, drafter):
    target = TableTarget(5, seed=seed, sharpness=1.0, order=1)
    prompt, length, rows = [0, 2, 1, 0, 2], 3, 5000

    def truth():
        """All answers, each walked by hand through the rule."""
        out = {}
        for answer in itertools.product(range(5), repeat=length):
            mu, p, ids = 3.0, 1.0, list(prompt)
            for token in answer:
                logits = target.logits(target.state(torch.tensor([ids])))[None]
                part = Mirostat(1.5, 0.8, version)
                context = Context(
                    torch.tensor([[*ids, 0]]), [len(ids)], [len(ids)], None, torch.Generator(), [0]
                )
                part.begin(context, target)
                part.states[0] = mu
                law = part(logits, TokenTree.root(context.roots()), context)
                p *= float(torch.softmax(law, -1)[0, 0, token])
                mu -= 0.8 * (-float(torch.log_softmax(logits, -1)[0, 0, token]) / math.log(2) - 1.5)
                ids.append(token)
            out[answer] = p
        return out

    want = truth()
    assert sum(want.values()) == pytest.approx(1.0)
    requests = [Request(torch.tensor(prompt), Stopper(max_new_tokens=length)) for _ in range(rows)]
    for _ in decode(
        target,
        requests,
        policy=tiny.facade("Llama").policy(drafter),
        acceptance=Lossless(),
        law=Law(temperature=1.0, reshapes=[Mirostat(1.5, 0.8, version)]),
        generator=torch.Generator().manual_seed(1),
    ):
        pass
    counts = dict.fromkeys(want, 0)
    for request in requests:
        counts[tuple(request.result.tokens)] += 1
    cells = [answer for answer in want if want[answer] > 0]
    assert sum(counts[c] for c in cells) == rows
    assert goodness_of_fit([counts[c] for c in cells], [rows * want[c] for c in cells]) > 1e-3
    if drafter != "none":
        assert sum(r.result.stats.accepted for r in requests) > 0
