import dataclasses

import pytest
import torch

from isthmus.claims import Ruler
from isthmus.decoding.law import Law
from isthmus.errors import InvalidInputError
from isthmus.models.guided_decoder import GuidedDecoder
from isthmus.nn.decoder import rotate
from isthmus.nn.masks import additive
from isthmus.systems.decoding.arpg import Arpg, Settings, claim, group_sizes

PLACES, WIDTH, LEVELS, CLASSES = 12, 4, 5, 3


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GuidedDecoder(LEVELS, CLASSES, WIDTH, 32, 4, 4, 48)
        torch.nn.init.normal_(made.head.weight, std=0.5)  # it begins as zero and says nothing
        torch.nn.init.normal_(made.embedding.weight)
        torch.nn.init.normal_(made.query)
    return made.double().eval()


def drawn(seed=1, batch=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(LEVELS, (batch, PLACES), generator=generator)
    order = torch.rand(batch, PLACES, generator=generator).argsort(1)
    return tokens, torch.tensor([0, 2])[:batch], order


def test_two_coordinates_turn_by_their_differences_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)

    def score(a, b):
        at = [torch.tensor([[x]]) for x in (a, b)]
        return float((rotate(q, at[0], 1e2) * rotate(k, at[1], 1e2)).sum())

    assert score([2, 5], [1, 1]) == pytest.approx(score([4, 9], [3, 5]), rel=1e-5)
    assert score([2, 5], [1, 1]) != pytest.approx(score([5, 2], [1, 1]), rel=1e-3)
    one, row = torch.tensor([[3]]), torch.tensor([[[3, 0]]])
    assert torch.equal(rotate(q, row, 1e2)[..., :8], rotate(q[..., :8], one, 1e2))
    assert torch.equal(rotate(q, row, 1e2)[..., 8:], q[..., 8:])


@torch.no_grad()
def test_places_asked_for_together_are_those_asked_for_alone(model):
    tokens, classes, order = drawn()
    memory = model.remember(
        torch.cat([model.class_token(classes)[:, None], tokens.gather(1, order[:, :3])], 1),
        torch.cat([torch.full((2, 1), -1), order[:, :3]], 1),
    )
    together = model.ask(order[:, 3:], memory)
    for i in range(3, PLACES):
        alone = model.ask(order[:, i : i + 1], memory)
        torch.testing.assert_close(together[:, i - 3 : i - 2], alone)


@torch.no_grad()
def test_logits_do_not_know_their_own_token_or_later_ones(model):
    tokens, classes, order = drawn()
    before = model(tokens, classes, order)
    changed = tokens.scatter(1, order[:, 6:], (tokens.gather(1, order[:, 6:]) + 1) % LEVELS)
    after = model(changed, classes, order)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7:], before[:, 7:])


@torch.no_grad()
def test_greedy_one_by_one_is_what_training_sees(model):
    classes = torch.tensor([0, 2])
    made = (
        Arpg(Settings(steps=0, guidance=1.0))
        .paint(model, classes, PLACES, seed=3, law=Law())
        .tokens
    )
    order = torch.randperm(PLACES, generator=torch.Generator().manual_seed(3)).expand(2, -1)
    said = model(made, classes, order).argmax(-1)
    assert torch.equal(said, made.gather(1, order))


@torch.no_grad()
def test_groups_are_one_forward_under_a_block_mask(model):
    """Cached groups against all content at once, where a group sees itself and what was before."""
    classes, sizes = torch.tensor([0, 2]), group_sizes(PLACES, 3)
    made = (
        Arpg(Settings(steps=3, guidance=1.0))
        .paint(model, classes, PLACES, seed=3, law=Law())
        .tokens
    )
    order = torch.randperm(PLACES, generator=torch.Generator().manual_seed(3))
    block = torch.tensor([0] + [i + 1 for i, size in enumerate(sizes) for _ in range(size)])
    memory = model.remember(
        torch.cat([model.class_token(classes)[:, None], made[:, order]], 1),
        torch.cat([torch.tensor([-1]), order]).expand(2, -1),
        mask=additive(block[:, None] >= block, torch.float64),
    )
    for i, group in enumerate(torch.split(order, sizes)):
        count = int((block <= i).sum())
        seen = tuple(part[:, :, :count] for part in memory)
        said = model.ask(group.expand(2, -1), seen).argmax(-1)
        assert torch.equal(said, made[:, group])


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_group_sizes_add_up(schedule):
    for places in (1, 7, 64):
        for steps in range(1, places + 1):
            sizes = group_sizes(places, steps, schedule)
            assert len(sizes) == steps and sum(sizes) == places and min(sizes) >= 1


def test_guidance_by_its_ends(model):
    classes, nobody = torch.tensor([0, 2]), torch.tensor([CLASSES, CLASSES])

    def paint(guidance, who, **settings):
        part = Arpg(Settings(steps=4, guidance=guidance, **settings))
        return part.paint(model, who, PLACES, seed=5).tokens

    assert torch.equal(paint(0.0, classes, rising=False), paint(1.0, nobody))
    assert torch.equal(paint(1.0 + 1e-12, classes), paint(1.0, classes))
    assert not torch.equal(paint(6.0, classes, rising=False), paint(1.0, classes))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_known_tokens_stay_and_matter(model, guidance):
    known = torch.full((2, PLACES), -1)
    known[:, [2, 7]] = torch.tensor([4, 1])
    part = Arpg(Settings(steps=3, guidance=guidance))
    made = part.paint(model, torch.tensor([0, 2]), PLACES, seed=1, known=known).tokens
    assert made[:, [2, 7]].tolist() == [[4, 1], [4, 1]] and made.min() >= 0
    other = known.clone()
    other[:, [2, 7]] = torch.tensor([0, 3])
    changed = part.paint(model, torch.tensor([0, 2]), PLACES, seed=1, known=other).tokens
    free = [i for i in range(PLACES) if i not in (2, 7)]
    assert not torch.equal(made[:, free], changed[:, free])
    whole = part.paint(model, torch.tensor([0, 2]), PLACES, seed=1, known=made)
    assert torch.equal(whole.tokens, made) and whole.passes.tolist() == [0, 0]


def test_refusals(model):
    with pytest.raises(InvalidInputError, match="arpg needs steps"):
        Arpg(dataclasses.replace(Settings(), schedule="linear"))
    known = torch.full((2, PLACES), -1)
    known[0, 2] = 4
    with pytest.raises(InvalidInputError, match="same places"):
        Arpg().paint(model, torch.tensor([0, 2]), PLACES, seed=1, known=known)
    with pytest.raises(InvalidInputError, match="even number of layers"):
        GuidedDecoder(LEVELS, CLASSES, WIDTH, 32, 3, 4, 48)


def test_a_saved_model_is_the_same(model, tmp_path):
    small = GuidedDecoder(LEVELS, CLASSES, WIDTH, 32, 2, 4, 48)
    small.save_pretrained(tmp_path)
    again = GuidedDecoder.from_pretrained(tmp_path)
    tokens, classes, order = drawn()
    assert torch.equal(small(tokens, classes, order), again(tokens, classes, order))


def test_the_claim_made_small():
    pytest.importorskip("sklearn")
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["passes, as a share of those with the idea off"].passed
    assert len(found.rows) == 10
