"""Make Some Noise: the noise, the guesses it makes usable, and tuning itself."""

from functools import partial

import pytest
import tiny
import torch

from isthmus import testing
from isthmus.decoding.law import Law
from isthmus.decoding.policy import Fixed
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Shape, Step, Verdict
from isthmus.systems.speculative.make_some_noise import (
    UNKNOWN,
    MakeSomeNoise,
    Settings,
    ahead_noise,
    guess_tree,
)
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import (
    IGNORED,
    append_groups,
    held_out_loss,
    label_loss,
    logits_of,
    next_tokens,
    tune,
)


def context(rows: list[list[int]]) -> Context:
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
    lengths = [len(r) for r in rows]
    return Context(ids, lengths, list(lengths), Law(), torch.Generator(), list(range(len(rows))))


def test_noise_comes_from_the_prefix_and_leaves_the_rest() -> None:
    ids = torch.arange(40).expand(200, -1).contiguous()
    noisy = ahead_noise(ids, 5, torch.Generator().manual_seed(0))
    changed = noisy != ids
    assert bool((changed.sum(1) == 5).all()), "unlike tokens, so all five differ"
    start = changed.float().argmax(1)
    assert bool((start >= 1).all()) and int(start.max()) == 35 and int(start.min()) == 1
    for row, first in zip(noisy, start.tolist(), strict=True):
        assert row[:first].tolist() == list(range(first))
        assert row[first + 5 :].tolist() == list(range(first + 5, 40))
        assert int(row[first : first + 5].max()) < first, "noise comes from before the span"
    assert torch.equal(ahead_noise(ids, 0, torch.Generator()), ids)
    with pytest.raises(InvalidInputError, match="no room"):
        ahead_noise(ids[:, :5], 5, torch.Generator())


def test_labels_stay_clean_and_the_switch_is_plain_tuning() -> None:
    model = tiny.network("Llama", "float32")
    ids = torch.randint(3, tiny.V, (4, 20), generator=torch.Generator().manual_seed(1))
    plain = label_loss(logits_of(model, ids), next_tokens(ids))
    off = MakeSomeNoise.fine_tuning(model, Settings(noise_tokens=0))
    assert torch.equal(off(ids, torch.Generator().manual_seed(2)), plain)
    noisy = ahead_noise(ids, 5, torch.Generator().manual_seed(2))
    want = label_loss(logits_of(model, noisy), next_tokens(ids))
    on = MakeSomeNoise.fine_tuning(model, Settings())
    assert torch.equal(on(ids, torch.Generator().manual_seed(2)), want) and want != plain


def test_tuning_learns_a_text_and_repeats_itself() -> None:
    texts = torch.arange(3, 27).repeat(8, 1)
    recipe = Recipe(steps=20, batch_size=4, sequence_length=24, learning_rate=5e-3)

    def run() -> list[float]:
        model = tiny.fresh("Llama", "float32")
        loss = MakeSomeNoise.fine_tuning(model, Settings())
        losses = tune(model, texts, loss, recipe)
        assert held_out_loss(model, texts) < 2.0 and not model.training
        return losses

    first = run()
    assert first[-1] < first[0] - 1.0 and run() == first
    with pytest.raises(InvalidInputError, match="texts"):
        tune(tiny.fresh("Llama", "float32"), texts[:0], partial(lambda i, g: i), recipe)


def test_groups_see_their_prefix_and_nobody_sees_them() -> None:
    model = tiny.network("Llama", "float64")
    ids = torch.randint(3, tiny.V, (2, 9), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([[2, 6, 8], [0, 3, 5]])
    g = append_groups(ids, ends, 3, 1, torch.float64)
    with torch.no_grad():
        logits = logits_of(model, g.ids, attention_mask=g.mask, position_ids=g.positions)
        assert torch.allclose(logits[:, :9], logits_of(model, ids), atol=1e-10)
        for b in range(2):
            for n, end in enumerate(ends[b].tolist()):
                alone = torch.cat([ids[b, : end + 1], torch.tensor([1, 1, 1])])[None]
                want = logits_of(model, alone)[0, -3:]
                got = logits[b, 9 + 3 * n : 12 + 3 * n]
                assert torch.allclose(got, want, atol=1e-10)
    assert g.labels[0, 0].tolist() == ids[0, 4:7].tolist()
    assert g.labels[0, 1].tolist() == [int(ids[0, 8]), IGNORED, IGNORED]
    with pytest.raises(InvalidInputError, match="groups"):
        append_groups(ids, ends + 1, 3, 1, torch.float64)


def test_the_guess_tree_is_the_papers_size() -> None:
    tree = guess_tree(63, 4, 10)
    assert len(tree.parents) == 64 and tree.topology.max_depth == 4
    assert [r for p, r in zip(tree.parents, tree.ranks, strict=True) if p == 0] == list(range(10))


def test_guesses_come_from_the_rejected_nodes_of_the_best_path() -> None:
    """A chain of five of which two stand: the other three foretell depths 1 to 3."""
    drafter = MakeSomeNoise(Settings(top_k=2))
    before = context([[5, 6, 7]])
    target = TableTarget(12)
    drafter.begin(before, target)
    tree = TokenTree.chain(torch.tensor([7]), torch.tensor([[1, 2, 3, 4, 5]]))
    logits = torch.zeros(1, 6, 12)
    for node in range(6):
        logits[0, node, node + 5], logits[0, node, node + 4] = 2.0, 1.0
    verdict = Verdict(torch.tensor([[0, 1, 2]]), torch.tensor([7]))
    after = context([[5, 6, 7, 1, 2, 7]])
    drafter.observe(Step(tree, logits, verdict, [2], after, Shape(5, 5, 1)))
    # nodes 3, 4, 5 were rejected; their two best tokens are node + 5 and node + 4
    assert drafter._guesses[0].tolist() == [[8, 7], [9, 8], [10, 9], [-1, -1], [-1, -1]]
    drafted = drafter.propose(after, Shape(68, 5, 11))
    level_one = drafted.tokens[0, drafted.topology.depth[0] == 1].tolist()
    # the longest suffix seen before is [7], and [1, 2, 7] followed it
    assert level_one[0] == 1 and level_one[1:] == [8, 7]
    assert drafted.first_chain().tokens[0, 1:4].tolist() == [1, 2, 7]
    drafter.begin(before, target)
    assert bool((drafter._guesses == UNKNOWN).all()), "a new request starts anew"


def test_random_guesses_come_from_the_text_and_are_unlike() -> None:
    drafter = MakeSomeNoise(Settings(retrieval=False))
    now = context([[3, 4, 3, 5], [7, 7, 7]])
    drafter.begin(now, TableTarget(12))
    tree = drafter.propose(now, drafter.default_shape)
    assert set(tree.tokens[0][tree.alive[0]].tolist()) <= {3, 4, 5}
    assert set(tree.tokens[1][tree.alive[1]].tolist()) == {7}
    testing.drafters.check_tree(tree, now, drafter.default_shape, 12)


def test_contract() -> None:
    testing.check_drafter(MakeSomeNoise)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart", "Bloom"])
def test_output_is_the_models_own(name: str) -> None:
    for shape in (MakeSomeNoise().default_shape, Shape(4, 4, 1)):
        policy = Fixed(MakeSomeNoise(), shape)
        got = tiny.generate(name, "float64", policy, 12, [0, 1, 2])
        for row, result in enumerate(got):
            want = tiny.reference(name, "float64", 12)[row]
            tiny.assert_same(name, "float64", row, result.tokens, want)


def test_retrieval_matters() -> None:
    """On a text that repeats itself, the copied chain is most of the gain."""
    model = tiny.facade("Llama", "float32")
    lengths = []
    for retrieval in (True, False):
        drafter = MakeSomeNoise(Settings(retrieval=retrieval))
        out = model.generate(
            tiny.prompts()[0],
            max_new_tokens=80,
            ignore_end=True,
            drafter=Fixed(drafter, drafter.default_shape),
        )
        lengths.append(out.stats.acceptance_length)
    assert lengths[0] > lengths[1] + 0.2


def test_bad_settings_are_refused() -> None:
    for bad in ({"top_k": 0}, {"top_k": 11}, {"noise_tokens": -1}, {"chain": 0}):
        with pytest.raises(InvalidInputError):
            Settings(**bad)
