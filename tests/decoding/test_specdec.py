"""SpecDec: exact with beta = 1 whatever it drafts, a block that sees both ways, its training."""

import pytest
import tiny
import torch

from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.relaxed import TopBeta
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.nn.block import BlockNetwork, masked
from isthmus.roles import Context
from isthmus.systems.speculative.specdec import Settings, Specdec, loss, reveal_share, train
from isthmus.training.drafting import Recipe

SMALL = Settings(block=4, layers=1, heads=4)


def context(ids):
    rows = torch.tensor(ids)
    lengths = [rows.shape[1]] * len(rows)
    return Context(rows, lengths, list(lengths), Law(), torch.Generator(), list(range(len(rows))))


def test_greedy_text_stays_the_targets_with_an_untrained_drafter():
    drafter = Specdec(settings=SMALL)
    policy = Fixed(drafter, drafter.default_shape)
    results = tiny.generate("Bart", "float64", policy, 10, [0, 1, 2])
    for row, result in enumerate(results):
        assert result.lossless and result.stats.drafted > 0
        assert result.tokens == tiny.reference("Bart", "float64", 10)[row]


def test_masks_see_both_ways_and_nothing_else():
    target = tiny.target("Bart", "float32")
    network = BlockNetwork(target, layers=2).eval()
    memory, hidden = network.read(source=torch.tensor([[5, 6, 7]]))
    tokens = torch.tensor([[1, 9, network.mask, network.mask, -1]])
    before = network(memory, hidden, tokens)[0]
    later = tokens.clone()
    later[0, 3] = 11  # a revealed token behind the first mask
    assert not torch.allclose(network(memory, hidden, later)[0, 2], before[2])
    unseen = torch.cat([tokens, torch.full((1, 3), -1)], 1)
    assert torch.allclose(network(memory, hidden, unseen)[0, :4], before[:4], atol=1e-5)
    other, _ = network.read(source=torch.tensor([[8, 6, 7]]))
    assert not torch.allclose(network(other, hidden, tokens)[0, 2], before[2])


def test_padding_of_the_source_is_not_read():
    network = BlockNetwork(tiny.target("Bart", "float32"), layers=1).eval()
    tokens = torch.tensor([[1, network.mask, network.mask]])
    alone = network(*network.read(source=torch.tensor([[5, 6]])), tokens)
    source = {"source": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert torch.allclose(network(*network.read(**source), tokens), alone, atol=1e-5)


def test_rows_of_unequal_length_draft_as_alone():
    drafter = Specdec(settings=SMALL)
    target = TableTarget(9)
    rows = context([[3, 4, 5, 6], [7, 8, 0, 0]])
    rows.lengths = [4, 2]
    drafter.begin(rows, target)
    tree = drafter.propose(rows, drafter.default_shape)
    for b, prefix in enumerate([[3, 4, 5, 6], [7, 8]]):
        alone = context([prefix])
        drafter.begin(alone, target)
        assert (
            drafter.propose(alone, drafter.default_shape).tokens[0].tolist()
            == tree.tokens[b].tolist()
        )


def test_cuts_masks_and_labels():
    answers = torch.tensor([[4, 5, 6, 7], [8, 9, -1, -1]])
    generator = torch.Generator().manual_seed(0)
    cuts = set()
    for _ in range(60):
        tokens, labels = masked(answers, 1, 2, 99, generator)
        assert tokens.shape == labels.shape == (2, 7)
        for row, length in ((0, 4), (1, 2)):
            holes = (tokens[row] == 99).nonzero().flatten().tolist()
            cut = holes[0] - 1
            assert 0 <= cut < length and holes == [cut + 1, cut + 2]
            assert tokens[row, 0] == 1
            assert tokens[row, 1 : cut + 1].tolist() == answers[row, :cut].tolist()
            assert (tokens[row, cut + 3 :] == -1).all()
            want = [*answers[row].tolist(), -1, -1][cut : cut + 2]
            assert labels[row, holes].tolist() == [-100 if w < 0 else w for w in want]
            cuts.add((row, cut))
    assert len(cuts) == 6, "every place is cut"


def test_the_schedule_is_a_straight_line():
    assert [round(reveal_share(Settings(), x), 3) for x in (0, 0.25, 1, 2)] == [0.5, 0.45, 0.3, 0.3]


def test_everything_revealed_leaves_no_loss():
    target = tiny.target("Bart", "float32")
    network = BlockNetwork(target, layers=1)
    answers = torch.randint(3, 60, (6, 5), generator=torch.Generator().manual_seed(1))
    source = {"source": torch.randint(3, 60, (6, 4), generator=torch.Generator().manual_seed(2))}

    def value(reveal):
        settings = Settings(block=4, reveal=(reveal, reveal))
        return loss(network, source, answers, 1, settings, 0.0, torch.Generator().manual_seed(3))

    assert torch.isfinite(value(0.0)) and torch.isfinite(value(0.5))
    assert not torch.equal(value(0.0), value(0.5))


@pytest.fixture(scope="module")
def copier():
    """A drafter that has learnt to copy the source."""
    target = tiny.target("Bart", "float32")
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(3, 19, (400, 5), generator=generator)
    settings = Settings(block=4, layers=1)
    recipe = Recipe(steps=70, batch_size=20, learning_rate=6e-3)
    return train(target, sources, sources, settings, recipe, pad=0)


def agreement(drafter, settings):
    """Share of a block that copies the source."""
    target = tiny.target("Bart", "float32")
    sources = torch.randint(3, 19, (40, 5), generator=torch.Generator().manual_seed(9))
    part = Specdec(drafter.network, settings)
    rows = context([[target.start_token]] * 40)
    part.begin(rows, target, input_ids=sources)
    tree = part.propose(rows, part.default_shape)
    return float((tree.tokens[:, 1:] == sources[:, :4]).float().mean())


def test_training_works_and_the_source_is_why(copier):
    on = agreement(copier, Settings(block=4))
    off = agreement(copier, Settings(block=4, read_source=False))
    assert on > 0.4 and off < 0.2


def test_files(copier, tmp_path):
    target = tiny.target("Bart", "float32")
    copier.save_pretrained(tmp_path / "d", target)
    again = Specdec.from_pretrained(tmp_path / "d", target)
    assert again.settings == copier.settings
    assert agreement(again, Settings(block=4)) == agreement(copier, Settings(block=4))
    with pytest.raises(MismatchError):
        Specdec.from_pretrained(tmp_path / "d", tiny.target("Marian", "float32"))
    path = tmp_path / "d" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BrokenFileError, match="altered"):
        Specdec.from_pretrained(tmp_path / "d", target)


# The relaxed rule -----------------------------------------------------------------------------


def accept(rule, logits, drafted):
    tree = TokenTree.chain(torch.tensor([0]), torch.tensor([drafted]))
    return rule.accept(tree, torch.tensor([logits]), context([[0]]))


def test_top_beta_by_hand():
    logits = [[0.0, 2.0, 1.5, -3.0], [1.0, 0.0, 0.9, 0.8], [0.0, 0.0, 0.0, 4.0]]
    assert accept(TopBeta(1), logits, [1, 0]).path.tolist() == [[0, 1, 2]]
    exact = accept(TopBeta(1), logits, [2, 0])
    assert exact.path.tolist() == [[0]] and exact.token.tolist() == [1]
    second = accept(TopBeta(2, 1.0), logits, [2, 2])
    assert second.path.tolist() == [[0, 1, 2]] and second.token.tolist() == [3]
    assert accept(TopBeta(2, 1.0), logits, [2, 3]).path.tolist() == [[0, 1]], "rank 3 of 2"
    assert accept(TopBeta(3, 1.0), logits, [2, 3]).path.tolist() == [[0, 1, 2]]
    assert accept(TopBeta(3, 0.4), logits, [2, 3]).path.tolist() == [[0]], "0.5 nats away"


def test_tolerance_is_told():
    tolerant = Specdec(settings=Settings(block=4, beta=3, tolerance=50.0))
    target = TableTarget(9, seed=1)
    request = Request(torch.tensor([1]), Stopper(max_new_tokens=20))
    policy = Fixed(tolerant, tolerant.default_shape)
    generator = torch.Generator()
    for _ in decode(
        target,
        [request],
        policy=policy,
        acceptance=tolerant.acceptance,
        law=Law(),
        generator=generator,
    ):
        pass
    assert not request.result.lossless and len(request.result.tokens) == 20
    assert Specdec(settings=SMALL).acceptance.lossless


def test_bad_input_is_refused():
    with pytest.raises(InvalidInputError, match="at least 1"):
        Settings(block=0)
    with pytest.raises(InvalidInputError, match="beta"):
        TopBeta(0)
    with pytest.raises(InvalidInputError, match="has to be trained"):
        tiny.facade("Bart").policy("specdec")
    with pytest.raises(MismatchError, match="encoder"):
        one = torch.ones(4, 2, dtype=torch.int64)
        train(tiny.target("Llama", "float32"), one, one, SMALL, Recipe(steps=1), pad=0)
    with pytest.raises(InvalidInputError, match="chains"):
        branching = TokenTree.from_paths(0, [[1], [2]])
        TopBeta(3).accept(branching, torch.zeros(1, 3, 4), context([[0]]))
