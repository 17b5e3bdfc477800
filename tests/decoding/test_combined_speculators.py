"""The MLP speculator: its weights by hand, tied and untied, and texts that a target writes."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
import trained_checks as checks
from safetensors.torch import load_file

from isthmus.decoding.builders import Level
from isthmus.decoding.law import Law
from isthmus.errors import InvalidInputError
from isthmus.roles import Shape
from isthmus.systems.speculative.combined_speculators import (
    CombinedSpeculators,
    Settings,
    token_weight,
)
from isthmus.training.samples import sampled_texts
from isthmus.training.serving_formats import export

TIED = Settings(stages=4, inner=24, tie_weights=True, scale_input=True, top_k=(3, 2, 2, 1))


def drafted(drafter: CombinedSpeculators, path: torch.Tensor) -> list[torch.Tensor]:
    """Logits after each token of one path a row [B, L], root first."""
    out = []
    for depth in range(path.shape[1]):
        token, none = path[:, depth : depth + 1], torch.zeros_like(path[:, :1])
        out.append(drafter.expand(Level(token, none, torch.zeros(none.shape), depth))[:, 0])
    return out


@torch.no_grad()
@pytest.mark.parametrize("settings", [Settings(), TIED])
def test_training_logits_are_those_of_drafting(settings: Settings) -> None:
    drafter = checks.make(CombinedSpeculators, settings)
    batch = checks.batch_of(drafter)
    seen: list[torch.Tensor] = []
    guess = drafter.guess
    drafter.guess = lambda *a: seen.append(guess(*a)) or seen[-1]  # type: ignore[func-returns-value]
    drafter.loss(batch)
    del drafter.guess
    for count in (1, 6, 9):
        drafter.reset(3)
        drafter.absorb(checks.prefix(batch, count))
        got = drafted(drafter, batch.ids[:, count : count + settings.stages])
        for k in range(settings.stages):
            torch.testing.assert_close(got[k], seen[k][:, count - 1])


@torch.no_grad()
def test_the_first_stages_by_hand() -> None:
    a = 0.5 ** (1 / 6)
    assert token_weight(3, 1024) == pytest.approx(math.sqrt((1 - a**2) * 512) / a)
    drafter = checks.make(CombinedSpeculators)
    f = torch.randn(1, 32, dtype=torch.float64)
    drafter.feature, z = f, f[0]
    got = drafted(drafter, torch.tensor([[7, 9]]))
    for k, token in enumerate((7, 9)):
        x = drafter.proj[k].weight @ z + token_weight(3, 32) * drafter.emb[k].weight[token]
        x = x / (x.square().mean() + 1e-6).sqrt() * drafter.ln[k].weight + drafter.ln[k].bias
        z = F.gelu(x)
        torch.testing.assert_close(got[k][0], drafter.lm_heads[k].weight @ z)


def test_the_context_keeps_half_of_the_variance() -> None:
    """n stages of ``a z + b e``, norms and nonlinearities left out: half of it is the state's."""
    n, inner = 3, 64
    a = 0.5 ** (0.5 / n)
    b = token_weight(n, inner) * a
    state, tokens = 1.0, 0.0
    for _ in range(n):
        state, tokens = a**2 * state, a**2 * tokens + b**2 / inner
    assert state == pytest.approx(0.5) and tokens == pytest.approx(0.25)


def test_tied_and_untied_shapes() -> None:
    target = tiny.target("Llama", "float32")
    shapes = {k: tuple(v.shape) for k, v in CombinedSpeculators(target, TIED).state_dict().items()}
    assert shapes == {
        "emb.0.weight": (64, 24),
        "proj.0.weight": (24, 32),
        "proj.1.weight": (24, 24),
        "ln.0.weight": (24,),
        "ln.0.bias": (24,),
        "lm_heads.0.weight": (64, 24),
    }
    assert len(CombinedSpeculators(target).state_dict()) == 3 * 5
    with pytest.raises(InvalidInputError, match="top_k"):
        Settings(stages=2)


@torch.no_grad()
def test_each_input_can_be_taken_away() -> None:
    paths = torch.tensor([[3, 4, 5], [3, 7, 5]])
    for settings, by_token, by_state in (
        (Settings(), True, True),
        (Settings(use_tokens=False), False, True),
        (Settings(use_state=False), True, False),
    ):
        drafter = checks.make(CombinedSpeculators, settings)
        drafter.feature = torch.ones(2, 32, dtype=torch.float64)
        second = drafted(drafter, paths)[1]
        assert torch.equal(second[0], second[1]) is not by_token
        drafter.feature = torch.randn(2, 32, dtype=torch.float64)
        first = drafted(drafter, paths)[0]
        assert torch.equal(first[0], first[1]) is not by_state


@torch.no_grad()
def test_candidates_are_the_best_joint_paths() -> None:
    drafter = checks.make(CombinedSpeculators)
    drafter.feature = torch.randn(1, 32, dtype=torch.float64)
    tree = drafter._tree(torch.tensor([6]), drafter.default_shape)
    leaves = [p for p in tree.topology.paths() if len(p) == 4]
    assert len(leaves) == 5
    found = {tuple(tree.tokens[0, p[1:]].tolist()) for p in leaves}
    scores: dict[tuple[int, ...], float] = {}

    def walk(path: tuple[int, ...], score: float) -> None:
        if len(path) == 3:
            scores[path] = score
            return
        logits = drafted(drafter, torch.tensor([[6, *path]]))[-1][0].log_softmax(-1)
        top = logits.topk((5, 4, 3)[len(path)])
        for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            walk((*path, token), score + value)

    walk((), 0.0)
    assert len(scores) == 60 and found == set(sorted(scores, key=lambda p: -scores[p])[:5])


@pytest.mark.parametrize("settings", [Settings(), TIED])
def test_learns(settings: Settings) -> None:
    checks.learns(checks.make(CombinedSpeculators, settings))


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart"])
def test_greedy_output_is_plain(name: str) -> None:
    drafter = checks.make(CombinedSpeculators, name=name)
    checks.same_as_plain(drafter, name, (Shape(3, 3, 1), checks.TREE))


def test_texts_of_the_target() -> None:
    """Greedy ones are its own continuation; drawn ones stay among the ten likeliest."""
    target = tiny.target("Llama", "float64")
    prompts = torch.stack([p[:6] for p in tiny.prompts()]).int()
    greedy = sampled_texts(target, prompts, 5, law=Law(), rows=2)
    logits = target.forward(greedy.long()).logits
    assert torch.equal(greedy[:, :6], prompts)
    assert torch.equal(logits[:, 5:-1].argmax(-1), greedy[:, 6:].long())
    drawn = sampled_texts(target, prompts, 5, seed=4)
    logits = target.forward(drawn.long()).logits[:, 5:-1]
    rank = (logits > logits.gather(-1, drawn[:, 6:, None].long())).sum(-1)
    assert int(rank.max()) < 10 and not torch.equal(drawn, greedy)


def test_files(tmp_path: Path) -> None:
    checks.round_trip(checks.make(CombinedSpeculators, TIED, dtype="float32"), tmp_path / "mlp")


@torch.no_grad()
@pytest.mark.parametrize("settings", [Settings(), TIED])
def test_export(settings: Settings, tmp_path: Path) -> None:
    """The file alone, read by its names, computes what the drafter computes."""
    drafter = checks.make(CombinedSpeculators, settings, dtype="float32")
    export(drafter, "mlp_speculator", tmp_path / "served")
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    file = load_file(tmp_path / "served" / "model.safetensors")
    n, inner = config["n_predict"], config["inner_dim"]
    assert len(config["top_k_tokens_per_head"]) == n and config["emb_dim"] == 32
    assert len(file) == (6 if config["tie_weights"] else 5 * n)
    tokens = torch.tensor([[5, 9, 20, 31][:n]])
    f = drafter.feature = torch.randn(1, 32)
    z = f / (f.square().mean() + 1e-6).sqrt() / 2**0.5 if config["scale_input"] else f
    ratio = math.sqrt((1 - 0.5 ** (1 / n)) * inner / 2) / 0.5 ** (0.5 / n)
    for k, got in enumerate(drafted(drafter, tokens)):
        own = 0 if config["tie_weights"] else k
        part = {key.removeprefix("speculator."): value for key, value in file.items()}
        x = z @ part[f"proj.{min(k, 1) if config['tie_weights'] else k}.weight"].T
        x = x + ratio * part[f"emb.{own}.weight"][tokens[:, k]]
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        z = F.gelu(x * part[f"ln.{own}.weight"] + part[f"ln.{own}.bias"])
        torch.testing.assert_close(got, z @ part[f"head.{own}.weight"].T)


def test_export_refuses_half_a_speculator(tmp_path: Path) -> None:
    drafter = checks.make(CombinedSpeculators, Settings(use_tokens=False), dtype="float32")
    with pytest.raises(InvalidInputError, match="both inputs"):
        export(drafter, "mlp_speculator", tmp_path / "served")
