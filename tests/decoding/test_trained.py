"""What trained drafters share: the loop, the cache, the files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from isthmus.decoding.builders import Level
from isthmus.decoding.draft_cache import DraftCache
from isthmus.decoding.policy import Fixed
from isthmus.decoding.trained import (
    CONFIG,
    WEIGHTS,
    Batch,
    Fresh,
    TrainedDrafter,
    target_fingerprint,
)
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.nn.decoder import DecoderLayer, LayerSizes
from isthmus.roles import Shape


@dataclass(frozen=True)
class Settings:
    gain: float = 1.0
    widths: tuple[int, ...] = (3, 2)
    on: bool = True


class Echo(TrainedDrafter):
    """Drafts what the target's own head says of the last known feature, at every level."""

    name = "echo"
    settings_type = Settings

    def __init__(self, target: Any, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        width = self.sizes.hidden_size
        self.map = torch.nn.Linear(width, width, bias=False)
        torch.nn.init.eye_(self.map.weight)
        self.seen: list[list[int]] = []

    @property
    def default_shape(self) -> Shape:
        return Shape(4, 4, 1)

    def loss(self, batch: Batch) -> torch.Tensor:
        return (self.map(batch.final) - batch.final).square().mean()

    def reset(self, batch: int) -> None:
        self.state = torch.zeros(batch, self.sizes.hidden_size, dtype=self.target.dtype)
        self.seen = [[] for _ in range(batch)]

    def absorb(self, fresh: Fresh) -> None:
        for b, row in enumerate(fresh.tokens):
            self.seen[b] += row[fresh.valid[b]].tolist()
        known = fresh.valid.any(1)[:, None]
        self.state = torch.where(known, fresh.at_last(self.map(fresh.final)), self.state)

    def expand(self, level: Level) -> torch.Tensor:
        return self.head(self.state)[:, None].expand(-1, level.tokens.shape[1], -1)

    def select_state(self, rows: torch.Tensor) -> None:
        self.state = self.state[rows]
        self.seen = [self.seen[r] for r in rows.tolist()]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bart", "T5"])
@pytest.mark.parametrize("shape", [Shape(3, 3, 1), Shape(9, 3, 3)])
def test_output_is_plain_and_every_token_is_seen_once(name: str, shape: Shape) -> None:
    drafter = Echo(tiny.target(name, "float64")).double()
    plain = tiny.generate(name, "float64", "none", 12, [0, 1, 2])
    ours = tiny.generate(name, "float64", Fixed(drafter, shape), 12, [0, 1, 2])
    assert [o.tokens for o in ours] == [p.tokens for p in plain]
    alone = tiny.generate(name, "float64", Fixed(drafter, shape), 12, [1])[0]
    start = [] if tiny.target(name, "float64").encoder_decoder else tiny.prompts()[1].tolist()
    text = start + alone.tokens
    if start:  # everything but the last root, in order
        assert drafter.seen[0][: len(text) - 1] == text[: len(drafter.seen[0])][: len(text) - 1]


def test_features_are_the_models_own() -> None:
    drafter = Echo(tiny.target("Llama", "float64")).double()
    tiny.generate("Llama", "float64", Fixed(drafter, Shape(3, 3, 1)), 9, [0])
    ids = torch.tensor([drafter.seen[0]])
    with torch.no_grad():
        out = tiny.network("Llama").model(ids).last_hidden_state[0, -1]
    assert torch.allclose(drafter.state[0], out, atol=1e-9)


@pytest.mark.parametrize("rows", [[5], [4, 7]])
def test_cached_drafting_equals_recomputing(rows: list[int]) -> None:
    """Two verified chunks, then two drafted levels, against plain causal forwards of each path."""
    torch.manual_seed(0)
    sizes = LayerSizes(16, 4, 2, 4, 24)
    layer = DecoderLayer(sizes).double()
    batch, width = len(rows), max(rows)
    x = torch.randn(batch, width, 16, dtype=torch.float64)
    first, second = torch.randn(2, batch, 2, 16, dtype=torch.float64)
    parent = torch.tensor([[1, 0]]).expand(batch, -1)
    cache = DraftCache(sizes, 1, batch, torch.float64, torch.device("cpu"))

    def run(inputs: torch.Tensor, place: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        return layer(inputs, place[0], place[1], cache.store(0))

    for part in (slice(0, 3), slice(3, width)):
        steps = torch.arange(part.start, part.stop)
        valid = steps < torch.tensor(rows)[:, None]
        with torch.no_grad():
            run(x[:, part], cache.append(valid))
        cache.commit(valid)
    assert cache.lengths == rows
    for _ in range(2):  # dropped nodes leave nothing behind
        with torch.no_grad():
            one = run(first, cache.branch(torch.zeros(batch, 2, dtype=torch.int64)))
            two = run(second, cache.branch(parent))
        cache.drop()
    for b, n in enumerate(rows):
        for node in range(2):
            path = torch.cat([x[b, :n], first[b, parent[b, node], None], second[b, node, None]])
            with torch.no_grad():
                want = layer(path[None], torch.arange(n + 2)[None])[0]
            assert torch.allclose(two[b, node], want[-1], atol=1e-12)
            assert torch.allclose(one[b, parent[b, node]], want[-2], atol=1e-12)


def test_layer_equals_transformers() -> None:
    """The layer with Llama's weights is Llama's layer, rotary positions included."""
    network = tiny.network("Llama")
    theirs = network.model.layers[0]
    ours = DecoderLayer(LayerSizes.of(network.config)).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    positions = torch.arange(6)[None]
    with torch.no_grad():
        rope = network.model.rotary_emb(x, positions)
        mask = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        out = theirs(x, attention_mask=mask, position_embeddings=rope)
        want = out if torch.is_tensor(out) else out[0]
        assert torch.allclose(ours(x, positions), want, atol=1e-9)


def saved(folder: Path) -> Echo:
    drafter = Echo(tiny.target("Llama", "float64"), Settings(gain=2.0, widths=(1,))).double()
    torch.nn.init.normal_(drafter.map.weight)
    drafter.save_pretrained(folder)
    return drafter


def test_files_round_trip_and_replace(tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    saved(folder)
    drafter = saved(folder)
    again = Echo.from_pretrained(folder, tiny.target("Llama", "float64"))
    assert again.settings == drafter.settings
    assert torch.equal(again.map.weight, drafter.map.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drafter"], "nothing is left beside it"


def test_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInputError, match="holds something that is no drafter"):
        Echo(tiny.target("Llama", "float64")).save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_another_target_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "d")
    with pytest.raises(MismatchError, match="trained for another target"):
        Echo.from_pretrained(tmp_path / "d", tiny.target("Llama", noise=0.3))


def test_fingerprint_is_one_for_every_dtype() -> None:
    half = tiny.network("Llama", "bfloat16")
    import copy

    wide = copy.deepcopy(half).double()
    from isthmus.decoding.target import HubTarget

    assert target_fingerprint(HubTarget(half)) == target_fingerprint(HubTarget(wide))


@pytest.mark.parametrize("fault", ["altered", "truncated", "missing", "config", "shape"])
def test_a_damaged_drafter_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "d"
    saved(folder)
    weights, config = folder / WEIGHTS, folder / CONFIG
    if fault == "altered":
        tensors = load_file(weights)
        tensors["map.weight"][0, 0] += 1
        save_file(tensors, weights)
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif fault == "missing":
        weights.unlink()
    elif fault == "config":
        config.write_text(config.read_text()[:40])
    else:
        import hashlib

        save_file({"map.weight": torch.zeros(3, 3)}, weights)
        values = json.loads(config.read_text())
        values["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        config.write_text(json.dumps(values))
    with pytest.raises(BrokenFileError, match=r"d[/ ]"):
        Echo.from_pretrained(folder, tiny.target("Llama", "float64"))
