"""Medusa: its heads, its calibrated tree, and typical acceptance."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
import trained_checks as checks
from safetensors.torch import load_file

from isthmus.decoding.acceptance import Lossless, Typical
from isthmus.decoding.builders import Level
from isthmus.decoding.heads import RankShares, fill_by_level
from isthmus.decoding.law import Law
from isthmus.decoding.model import rule_of
from isthmus.decoding.policy import Fixed
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.roles import Context, Shape
from isthmus.systems.speculative.combined_speculators import CombinedSpeculators
from isthmus.systems.speculative.medusa import Medusa, Settings, head_accuracy
from isthmus.training.serving_formats import FORMATS, export


def context(law: Law | None = None) -> Context:
    ids = torch.tensor([[9]])
    return Context(ids, [1], [1], law or Law(), torch.Generator().manual_seed(0), [0])


@pytest.mark.parametrize("name", ["Llama", "Bart", "T5"])
def test_new_heads_are_the_target_s_own(name: str) -> None:
    target = tiny.target(name, "float32")
    drafter = Medusa(target)
    f = torch.randn(2, 5, 32)
    for k in (1, 5):
        torch.testing.assert_close(drafter.guess(k, f), drafter.head(f))
    heads = [m.weight for m in drafter.lm_heads]
    heads[0].data.zero_()
    assert bool(heads[1].any()) and bool(target.model.get_output_embeddings().weight.any())


def test_blocks_of_a_head_are_unlike() -> None:
    one, two = Medusa(tiny.target("Llama"), Settings(blocks=2)).blocks[0]
    assert one.linear.weight is not two.linear.weight


def test_learns_and_counts_ranks() -> None:
    drafter = checks.make(Medusa)
    before = drafter.ranks.shares.clone()
    checks.learns(drafter)
    assert bool((drafter.ranks.shares != before).any(1).all())
    batch = checks.batch_of(drafter)
    want = [
        (drafter.guess(k, batch.final)[:, :-k].argmax(-1) == batch.target_logits[:, k:].argmax(-1))
        .double()
        .mean()
        for k in range(1, 6)
    ]
    assert head_accuracy(drafter, batch.ids) == pytest.approx([float(w) for w in want])


def test_rank_shares_count_the_target_s_choice() -> None:
    """Every fourth place counts: candidate r of head k against the choice k places on."""
    drafter = checks.make(Medusa)
    batch, ranks = checks.batch_of(drafter), RankShares(2, 3)
    before = ranks.shares.clone()
    logits = torch.roll(batch.target_logits, -2, 1)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    logits = logits + 0.5 * logits.std() * noise
    ranks.learn(batch, 2, logits)
    places = [(b, i) for b in range(3) for i in (0, 4, 8)]
    top, choice = logits.argsort(-1, descending=True), batch.target_logits.argmax(-1)
    want = [sum(int(top[b, i, r] == choice[b, i + 2]) for b, i in places) / 9 for r in range(3)]
    assert sum(want) > 0.3
    torch.testing.assert_close(ranks.shares[1], before[1] + 0.03 * (torch.tensor(want) - before[1]))
    assert torch.equal(ranks.shares[0], before[0])


@torch.no_grad()
def test_the_loss_looks_at_the_right_token() -> None:
    """By hand: eq. 1 with two heads; off, both look at the next token."""
    drafter = checks.make(Medusa, Settings(heads=2))
    batch = checks.batch_of(drafter)
    for ahead in (True, False):
        total = 0.0
        for k in (1, 2):
            step = k + 1 if ahead else 1
            logp = drafter.guess(k, batch.final).log_softmax(-1)[:, :-step]
            nll = -logp.gather(-1, batch.ids[:, step:, None]).mean()
            total += 0.8**k * float(nll)
        drafter.settings = Settings(heads=2, ahead=ahead)
        assert float(drafter.loss(batch)) == pytest.approx(total)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    checks.same_as_plain(checks.make(Medusa, name=name), name, (checks.CHAIN, checks.TREE))


def test_the_tree_is_the_calibrated_one() -> None:
    """The quick filling equals expanding level by level, and the shape follows the shares."""
    drafter = checks.make(Medusa)
    checks.learns(drafter, 3, 10.0)
    drafter.feature = torch.randn(2, 32, dtype=torch.float64)
    roots, shape = torch.tensor([5, 6]), Shape(20, 4, 10)
    tree = drafter._tree(roots, shape)
    plan = drafter.ranks.plan(shape)
    slow = fill_by_level(drafter.expand, roots, plan)
    assert torch.equal(tree.tokens, slow.tokens)
    assert tree.topology.parents_list == list(plan.parents) and tree.nodes == 21
    sure = RankShares(3, 4)
    sure.shares[:] = torch.tensor([0.9, 0.01, 0.0, 0.0])
    assert sure.plan(Shape(4, 3, 4)).ranks == (0, 0, 0, 0, 1)
    assert sure.plan(Shape(9, 3, 1)).parents == (-1, 0, 1, 2)


def test_filling_by_level_follows_the_path() -> None:
    """Every node's token is the rank-th best successor of its own parent."""
    table = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    plan = RankShares(4, 5).plan(Shape(25, 4, 5))
    seen: list[Level] = []

    def expand(level: Level) -> torch.Tensor:
        if seen:
            before = seen[-1].tokens.gather(1, level.parent)
            ranks = table[before].argsort(-1, descending=True)
            assert bool((ranks == level.tokens[..., None]).any(-1).all())
        seen.append(level)
        return table[level.tokens]

    tree = fill_by_level(expand, torch.tensor([3, 4]), plan)
    order = table.argsort(-1, descending=True)
    for node, (parent, rank) in enumerate(zip(plan.parents, plan.ranks, strict=True)):
        if node:
            assert torch.equal(tree.tokens[:, node], order[tree.tokens[:, parent], rank])


def test_typical_acceptance_by_hand() -> None:
    tree = TokenTree.from_paths(9, [[1, 2], [3, 4]])  # nodes: 1 -> token 1, 2 -> 3, 3 -> 2, 4 -> 4
    logits = torch.full((1, 5, 10), -torch.inf)
    logits[0, 0, [1, 3]] = torch.tensor([0.9, 0.1]).log()  # H = 0.325, bar = 0.09
    logits[0, 1, 5] = 0.0  # entropy 0: only the mode stands
    logits[0, 2, [4, 6]] = torch.tensor([0.3, 0.7]).log()
    logits[0, 3:, 8] = 0.0
    rule = Typical(0.09, 0.3)
    verdict = rule.accept(tree, logits, context())
    assert verdict.path.tolist() == [[0, 2, 4]] and verdict.token.tolist() == [8]
    assert not rule.lossless and Lossless().lossless
    # a higher bar, min(0.2, 0.3 exp(-0.325) = 0.217): token 3 falls and the mode goes on alone
    verdict = Typical(0.2, 0.3).accept(tree, logits, context())
    assert verdict.path.tolist() == [[0, 1]] and verdict.token.tolist() == [5]
    # equal lengths: the likelier path
    logits[0, 1, [2, 5]] = math.log(0.5)
    assert rule.accept(tree, logits, context()).path.tolist() == [[0, 1, 3]]
    # sampling: the last token is drawn among the typical ones
    sampled = rule.accept(
        TokenTree.root(torch.tensor([9])), logits[:, :1], context(Law(temperature=1))
    )
    assert sampled.token.tolist() in ([1], [3])


def test_typical_ragged_rows() -> None:
    """Each row of a batch is judged as it would be alone; padding never stands."""
    generator = torch.Generator().manual_seed(4)
    tree = (
        RankShares(3, 3)
        .plan(Shape(9, 3, 3))
        .fill(torch.tensor([1, 2, 3]), torch.randint(0, 6, (3, 3, 3), generator=generator))
    )
    valid = torch.rand(3, 10, generator=generator) > 0.2
    valid[:, 0] = True
    tree = TokenTree(tree.tokens, tree.topology, valid)
    logits = 2 * torch.randn(3, 10, 6, generator=generator)
    together = Typical().accept(tree, logits, context())
    for b in range(3):
        alone = Typical().accept(tree.row(b), logits[b : b + 1], context())
        path = together.path[b][together.path[b] >= 0]
        assert path.tolist() == alone.path[0].tolist() and bool(tree.alive[b, path].all())
        assert together.token[b] == alone.token[0]


def test_typical_is_an_option_and_says_so() -> None:
    assert rule_of(Fixed(checks.make(Medusa), checks.TREE)) is None
    drafter = checks.make(Medusa, Settings(typical=True, delta=0.9))
    policy = Fixed(drafter, checks.TREE)
    (result,) = tiny.generate("Llama", "float64", policy, 12, [0])
    assert result.lossless is False and len(result.tokens) == 12
    with pytest.raises(InvalidInputError, match="delta"):
        Typical(delta=1.0)


def test_files(tmp_path: Path) -> None:
    checks.round_trip(checks.make(Medusa, dtype="float32"), tmp_path / "medusa")


@torch.no_grad()
def test_export(tmp_path: Path) -> None:
    """The file alone, read by its names, computes what the drafter computes."""
    drafter = checks.make(Medusa, Settings(heads=2, blocks=2), dtype="float32")
    folder = tmp_path / "served"
    for _ in range(2):  # an earlier export may be replaced
        export(drafter, "medusa", folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_heads"], config["num_hidden_layers"], config["vocab_size"]) == (2, 2, 64)
    assert config["model_type"] == "medusa" and config["torch_dtype"] == "float32"
    assert [k for k in config if "num" in k and "heads" in k] == ["num_heads"]
    file = load_file(folder / "model.safetensors")
    assert len(file) == 2 * 5
    f = torch.randn(3, 32)
    for i in range(2):
        x = f
        for j in range(2):
            name = f"blocks.{i}.layers.{j}"
            x = x + torch.nn.functional.silu(x @ file[f"{name}.weight"].T + file[f"{name}.bias"])
        torch.testing.assert_close(x @ file[f"lm_heads.{i}.weight"].T, drafter.guess(i + 1, f))


def test_export_refusals(tmp_path: Path) -> None:
    drafter = checks.make(Medusa, dtype="float32")
    other = checks.make(CombinedSpeculators, dtype="float32")
    assert {"medusa", "mlp_speculator"} <= set(FORMATS)
    with pytest.raises(UnknownNameError, match="medusa"):
        export(drafter, "medussa", tmp_path / "x")
    with pytest.raises(InvalidInputError, match="holds medusa drafters"):
        export(other, "medusa", tmp_path / "x")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InvalidInputError, match="something else"):
        export(drafter, "medusa", tmp_path)
    drafter.lm_heads[0].bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(InvalidInputError, match="bias"):
        export(drafter, "medusa", tmp_path / "x")
    assert not (tmp_path / "x").exists()
