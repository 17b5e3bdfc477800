"""Fusions of one vocabulary: their formulas on every node, in step, and refusals by bytes."""

import pytest
import tiny
import torch

from isthmus.decoding.beam import BeamSearch
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.fusion import Member, Mixture, Product, Proxy, Route, check_same_bytes
from isthmus.decoding.law import Law
from isthmus.decoding.router import (
    Always,
    Classifier,
    Entropy,
    Margin,
    MaxProb,
    Never,
    Oracle,
    Router,
    entropy,
    margin,
    max_prob,
)
from isthmus.decoding.search import search
from isthmus.decoding.state_head import StateHead
from isthmus.decoding.table import TableTarget
from isthmus.errors import InvalidInputError, MismatchError
from isthmus.roles import Forkable, Reshape
from isthmus.workbench.tokenizer import word_tokenizer

LEAD, OTHER, THIRD = (tiny.target("Llama", noise=n) for n in (0.0, 0.5, 0.9))
PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [3, 4], [9]]


def written(part, prompts=PROMPTS, new=12, drafter="none", **options):
    answers = tiny.facade("Llama").generate(
        prompts,
        max_new_tokens=new,
        drafter=drafter,
        law=Law(reshapes=[part], **options),
        ignore_end=True,
        seed=5,
    )
    return [a.tokens for a in answers]


def by_hand(rule, prompts=PROMPTS, new=12):
    """Greedy decoding under a rule of the next token, with a fresh forward of every model."""
    out = []
    for prompt in prompts:
        ids = torch.tensor(prompt)
        for _ in range(new):
            laws = [m.forward(ids[None]).logits[0, -1] for m in (LEAD, OTHER, THIRD)]
            ids = torch.cat([ids, rule(*laws).argmax()[None]])
        out.append(ids[len(prompt) :].tolist())
    return out


def lp(x):
    return x.log_softmax(-1)


RULES = {
    "product": (
        lambda: Product([Member(OTHER, 0.6), Member(THIRD, -0.1, 2.0)], weight=0.5),
        lambda a, b, c: 0.5 * lp(a) + 0.6 * lp(b) - 0.1 * lp(c / 2),
    ),
    "mixture": (
        lambda: Mixture([Member(OTHER, 0.5), Member(THIRD, 0.2)], weight=0.3),
        lambda a, b, c: 0.3 * lp(a).exp() + 0.5 * lp(b).exp() + 0.2 * lp(c).exp(),
    ),
    "proxy": (
        lambda: Proxy(Member(OTHER), Member(THIRD), strength=0.7),
        lambda a, b, c: a + 0.7 * (b - c),
    ),
    "route": (
        lambda: Route(Member(OTHER), Entropy(4.1)),
        lambda a, b, c: b if float(-(lp(a).exp() * lp(a)).sum()) > 4.1 else a,
    ),
}


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup", "token-recycling"])
@pytest.mark.parametrize("name", RULES)
def test_as_written_by_hand_and_with_drafts(name, drafter):
    make, rule = RULES[name]
    part = make()
    assert isinstance(part, Reshape) and isinstance(part, Forkable)
    got = by_hand(rule)
    assert written(part, drafter=drafter) == got
    assert got not in (by_hand(lambda a, b, c: a), by_hand(lambda a, b, c: b))


def test_a_fusion_with_oneself_or_nobody_changes_nothing():
    plain = written(Route(Member(OTHER), Never()))
    assert plain == by_hand(lambda a, b, c: a)
    assert written(Product([Member(OTHER, 0.0)])) == plain
    assert written(Mixture([Member(OTHER, 0.0)])) == plain
    assert written(Mixture([Member(LEAD, 3.0)])) == plain
    assert written(Proxy(Member(OTHER), Member(OTHER))) == plain
    assert written(Proxy(Member(OTHER), Member(THIRD), strength=0.0)) == plain


def test_always_is_the_other_model_and_greedy_even_where_tokens_are_drawn():
    other = by_hand(lambda a, b, c: b)
    assert other != by_hand(lambda a, b, c: a)
    assert written(Route(Member(OTHER), Always())) == other
    assert written(Route(Member(OTHER), Always(), greedy=True), temperature=1.0) == other
    assert written(Route(Member(OTHER), Always()), temperature=1.0) != other


def test_what_the_model_at_work_keeps_to_itself():
    other = by_hand(lambda a, b, c: b)
    kept = other[0][2]
    part = Route(Member(OTHER), Always(), keeps=[kept])
    assert all(kept not in tokens for tokens in written(part))


def test_the_other_is_asked_only_where_the_router_says_so():
    """And catches up on all it has missed: its logits are those of a fresh forward."""
    asked = []

    class Every(Router):
        """Every third token of the answer."""

        def __call__(self, logits, tree, context):
            out = torch.zeros(logits.shape[:-1], dtype=torch.bool)
            for b, (n, p) in enumerate(zip(context.lengths, context.prompt_lengths, strict=True)):
                out[b, 0] = (n - p) % 3 == 2 * (b == 1)
            asked.append(out)
            return out

    part = Route(Member(OTHER), Every())
    got = written(part, new=13)
    steps = sum(bool(a.any()) for a in asked)
    assert part.companions[0].forwards <= 2 * steps < 2 * len(asked)
    for b, prompt in enumerate(PROMPTS):
        ids = torch.tensor(prompt)
        for i in range(13):
            model = OTHER if i % 3 == 2 * (b == 1) else LEAD
            ids = torch.cat([ids, model.forward(ids[None]).logits[0, -1].argmax()[None]])
        assert got[b] == ids[len(prompt) :].tolist()


def test_it_follows_the_beams_of_a_search():
    law = Law(reshapes=[Mixture([Member(OTHER, 0.5)], weight=0.5)])
    prompt = tiny.prompts()[0]
    ((best, *_),) = search(
        LEAD, [prompt], BeamSearch(3), max_new_tokens=6, law=law, generator=torch.Generator()
    )
    total, ids = 0.0, prompt
    for token in best.tokens:
        laws = [lp(m.forward(ids[None]).logits[0, -1]).exp() for m in (LEAD, OTHER)]
        total += float((sum(laws) / 2).log()[token])
        ids = torch.cat([ids, torch.tensor([token])])
    assert best.logprob == pytest.approx(total)


LAWS = torch.tensor([[[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]]]).log()


def test_uncertainty_by_hand():
    assert max_prob(LAWS).flatten().tolist() == pytest.approx([0.6, 0.4])
    assert margin(LAWS).flatten().tolist() == pytest.approx([0.3, 0.05])
    flat = torch.full((8,), -torch.inf)
    flat[:2] = 0.0
    assert float(entropy(flat).exp()) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("router", "wanted"),
    [
        (Always(), [True, True]),
        (Never(), [False, False]),
        (MaxProb(0.5), [False, True]),
        (Margin(0.2), [False, True]),
        (Entropy(1.0), [False, True]),
        (MaxProb(0.3), [False, False]),
    ],
)
def test_routers_by_hand(router, wanted):
    assert router(LAWS, None, None)[0].tolist() == wanted


def test_a_classifier_reads_probabilities_or_states():
    head = StateHead(2)
    head.weight.data = torch.tensor([-10.0, 0.0])
    head.bias.data = torch.tensor(5.0)  # yes where the likeliest has less than 0.5
    assert Classifier(head, "top-k")(LAWS, None, None)[0].tolist() == [False, True]
    assert not Classifier(head, "top-k").taps and Classifier(head).taps.final
    with pytest.raises(InvalidInputError, match="top-k"):
        Classifier(head, "logits")
    head = StateHead(32)
    states = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    head.fit(states, (states[:, 0] > 0).float())
    some = written(Route(Member(OTHER), Classifier(head)))
    never = written(Route(Member(OTHER), Classifier(head, above=1.0)))
    always = written(Route(Member(OTHER), Classifier(head, above=-1.0)))
    assert never == by_hand(lambda a, b, c: a)
    assert always == by_hand(lambda a, b, c: b)
    assert some not in (never, always)


def test_an_oracle_is_told_the_text_of_every_node():
    seen = set()

    def says(ids):
        seen.add(tuple(ids.tolist()))
        return len(ids) % 2 == 0

    part = Route(Member(OTHER), Oracle(says))
    plain = written(part, [PROMPTS[0]])
    assert written(part, [PROMPTS[0]], drafter="prompt-lookup") == plain
    (tokens,) = plain
    for i in range(12):
        assert (*PROMPTS[0], *tokens[:i]) in seen


def test_other_bytes_are_refused_though_sizes_agree():
    ours = ByteVocab.of([b"a", b"b", None])
    with pytest.raises(MismatchError, match=r"token 1 writes b'b' in one model and b'c'"):
        Product([Member(OTHER, vocab=ByteVocab.of([b"a", b"c", None]))], vocab=ours)
    padded = ByteVocab.of([b"a", b"b", None, None])
    Product([Member(OTHER, vocab=padded)], vocab=ours)
    with pytest.raises(MismatchError, match="token 3"):
        check_same_bytes(ours, ByteVocab.of([b"a", b"b", None, b"ab"]))
    check_same_bytes(ours, None)


def test_tokenizers_of_whole_words_are_compared_by_names():
    one, same = word_tokenizer(["<end>", "a", "b"]), word_tokenizer(["<end>", "a", "b"])
    check_same_bytes(one, same)
    with pytest.raises(MismatchError, match="vocabulary differs"):
        check_same_bytes(one, word_tokenizer(["<end>", "b", "a"]))


def test_bad_fusions_are_refused():
    with pytest.raises(InvalidInputError, match="needs a member"):
        Product([])
    with pytest.raises(InvalidInputError, match="temperature above 0"):
        Product([Member(OTHER, temperature=0.0)])
    with pytest.raises(InvalidInputError, match="negative"):
        Mixture([Member(OTHER, -0.5)])
    with pytest.raises(MismatchError, match="tokens"):
        written(Product([Member(TableTarget(9999))]))
