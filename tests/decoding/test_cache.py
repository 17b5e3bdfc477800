"""Slots: whatever is kept, forgotten, compacted or forked, live slots are the committed text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.decoding import cache as cache_module
from isthmus.decoding.cache import LayerShape, SlotCache

LAYOUT = [LayerShape(1, 1, 2), LayerShape(2, 1, 1), LayerShape(1, 1, 2), None]
"""Two key shapes, so two arenas, and a layer that stores nothing."""


def write(cache: SlotCache, names: torch.Tensor) -> None:
    """Do what a forward does: every layer writes N slots; a token's name is its key."""
    cache.reserve(names.shape[1])
    for layer, shape in zip(cache.hub.layers, LAYOUT, strict=True):
        if shape is not None:
            keys = names[:, None, :, None].double().expand(-1, shape.heads, -1, -1)
            layer.update(keys, (keys + 0.5).expand(-1, -1, -1, shape.value_dim))


def texts(cache: SlotCache) -> list[list[list[float]]]:
    """Names of the live slots of each arena and row, by position."""
    pos, live = cache.slots()
    pos = pos.expand(cache.batch, -1)
    live = torch.ones_like(pos, dtype=torch.bool) if live is None else live
    out = []
    for arena in cache.arenas:
        for layer in range(arena.keys.shape[0]):
            keys = arena.keys[layer, :, 0, : cache.used, 0]
            values = arena.values[layer, :, 0, : cache.used, 0]
            rows = []
            for b in range(cache.batch):
                alive = live[b].nonzero()[:, 0]
                assert sorted(pos[b, alive].tolist()) == list(range(len(alive)))
                order = alive[pos[b, alive].argsort()]
                assert torch.equal(values[b, order], keys[b, order] + 0.5)
                rows.append(keys[b, order].tolist())
            out.append(rows)
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_history(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    cache = SlotCache(LAYOUT, batch, torch.float64, torch.device("cpu"), capacity=4)
    want: list[list[float]] = [[] for _ in range(batch)]
    fresh = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SLACK", 1)  # compact at every chance
        for _ in range(data.draw(st.integers(1, 12))):
            action = data.draw(st.sampled_from(["keep", "keep", "keep", "truncate", "select"]))
            if action == "keep":
                n = data.draw(st.integers(1, 5))
                names = torch.arange(fresh, fresh + batch * n).view(batch, n)
                fresh += batch * n
                write(cache, names)
                chosen = [sorted(data.draw(st.sets(st.integers(0, n - 1)))) for _ in range(batch)]
                width = max(map(len, chosen))
                path = [[*c, *[-1] * (width - len(c))] for c in chosen]
                cache.keep(torch.tensor(path, dtype=torch.int64).view(batch, width))
                for b, nodes in enumerate(chosen):
                    want[b] = want[b] + [float(names[b, i]) for i in nodes]
            elif action == "truncate":
                lengths = [data.draw(st.integers(0, len(w) + 2)) for w in want]
                cache.truncate(lengths)
                want = [w[:n] for w, n in zip(want, lengths, strict=True)]
            else:
                rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
                cache = cache.select(rows)
                want, batch = [list(want[r]) for r in rows], len(rows)
            assert cache.lengths == [len(w) for w in want]
            for arena in texts(cache):
                assert arena == want


def test_a_fork_does_not_share_memory() -> None:
    cache = SlotCache(LAYOUT, 2, torch.float64, torch.device("cpu"))
    write(cache, torch.tensor([[1, 2], [3, 4]]))
    cache.keep(torch.tensor([[0, 1], [0, 1]]))
    twin = cache.select([1, 0])
    write(twin, torch.tensor([[9], [9]]))
    twin.keep(torch.tensor([[0], [0]]))
    assert texts(cache)[0] == [[1.0, 2.0], [3.0, 4.0]]
    assert texts(twin)[0] == [[3.0, 4.0, 9.0], [1.0, 2.0, 9.0]]


def test_dead_slots_do_not_pile_up() -> None:
    cache = SlotCache(LAYOUT, 2, torch.float64, torch.device("cpu"), capacity=8)
    for step in range(400):
        write(cache, torch.full((2, 4), step + 1))
        # one row takes four tokens and the other none, in turns
        path = torch.full((2, 4), -1)
        path[step % 2] = torch.arange(4)
        cache.keep(path)
    assert cache.lengths == [800, 800]
    assert cache.used <= cache_module.SLACK + 800 * 4 // 3 + 4
