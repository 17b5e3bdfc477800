"""Tree masks: float, right in windows, and never an empty row."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.decoding.tree import Topology
from isthmus.nn.masks import additive, relaxed_mask, rollout_mask, tree_mask


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_against_a_slow_reference(data: st.DataObject) -> None:
    n, s, batch = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 6)), 2
    parents = [-1, *(data.draw(st.integers(0, i - 1)) for i in range(1, n))]
    topology = Topology.of(parents)
    window = data.draw(st.sampled_from([None, 1, 2, 4]))
    drawn = [[data.draw(st.booleans()) for _ in range(s)] for _ in range(batch)]
    live = torch.tensor(drawn, dtype=torch.bool).view(batch, s)
    pos = (live.long().cumsum(1) - 1).clamp(min=0)
    node_pos = live.sum(1, keepdim=True) + topology.depth
    mask = tree_mask(
        topology.ancestors, node_pos, slot_pos=pos, slot_live=live, past=s, window=window
    )
    assert mask.is_floating_point() and mask.shape == (batch, 1, n, s + n)
    ancestors = [[i] for i in range(n)]
    for i in range(1, n):
        ancestors[i] += ancestors[parents[i]]
    for b in range(batch):
        for i in range(n):
            for j in range(s + n):
                if j < s:
                    seen, at = bool(live[b, j]), int(pos[b, j])
                else:
                    seen, at = j - s in ancestors[i], int(node_pos[b, j - s])
                seen &= window is None or int(node_pos[b, i]) - at < window
                assert (float(mask[b, 0, i, j]) == 0.0) == seen
            assert float(mask[b, 0, i, s + i]) == 0.0, "a node that sees nothing gives NaN"
    low = torch.finfo(torch.float32).min
    assert set(mask.flatten().tolist()) <= {0.0, low}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_why_masks_are_floats(kernel: str) -> None:
    """A boolean mask is right under sdpa and silently wrong under eager; a float one is right."""
    model = tiny.fresh("Llama")
    model.set_attn_implementation(kernel)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    positions = torch.tensor([[0, 1, 2, 2, 3]])
    topology = Topology.of([-1, 0, 1, 1, 2])  # 3 4 (5 (7) | 6)
    with torch.no_grad():
        want = model(ids[:, [0, 1, 2, 4]]).logits[0, -1]
        mask = tree_mask(topology.ancestors, positions, dtype=torch.float64)
        got = model(ids, attention_mask=mask, position_ids=positions).logits[0, -1]
        assert float((got - want).abs().max()) < 1e-12
        wrong = model(ids, attention_mask=mask == 0, position_ids=positions).logits[0, -1]
    error = float((wrong - want).abs().max())
    assert (error > 1e-3) == (kernel == "eager")


def test_rollout_rows_see_what_drafting_sees() -> None:
    """Against the rule in words: real rows up to the anchor, and one's own draft so far."""
    anchor = torch.arange(4).repeat(3)
    depth = torch.arange(3).repeat_interleave(4)
    seen = rollout_mask(anchor, depth)
    for q in range(12):
        for k in range(12):
            a, d, b, e = (int(x) for x in (anchor[q], depth[q], anchor[k], depth[k]))
            # a draft from place a has verified tokens at places up to a, and steps 1 .. d
            drafted = {(i, 0) for i in range(a + 1)} | {(a, j) for j in range(1, d + 1)}
            assert bool(seen[q, k]) == ((b, e) in drafted)
    part = rollout_mask(anchor[8:], depth[8:], anchor, depth)
    assert torch.equal(part, seen[8:])
    mask = additive(seen)
    assert mask.shape == (1, 1, 12, 12) and torch.equal(mask[0, 0] == 0, seen)


def test_relaxed_blocks() -> None:
    table = relaxed_mask(6, 2).int().tolist()
    assert table == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert torch.equal(relaxed_mask(5, 1), torch.ones(5, 5).tril().bool())
