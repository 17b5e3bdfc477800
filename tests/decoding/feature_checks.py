"""What every drafter that goes from feature to feature is checked for."""

from dataclasses import replace

import torch
import trained_checks as checks

from isthmus.decoding.builders import Level
from isthmus.decoding.feature_drafter import FeatureDrafter
from isthmus.decoding.trained import Fresh
from isthmus.roles import Features


def piece(fresh: Fresh, start: int, stop: int) -> Fresh:
    """Some of the tokens."""
    f = fresh.features
    cut = Features(
        None if f.final is None else f.final[:, start:stop],
        {i: x[:, start:stop] for i, x in f.layers.items()},
    )
    span = slice(start, stop)
    return Fresh(fresh.tokens[:, span], fresh.following[:, span], cut, fresh.valid[:, span])


def level(tokens: torch.Tensor, parent: list[int], depth: int) -> Level:
    """A level of nodes [B, F], the same parents in every row."""
    links = torch.tensor([parent]).expand(len(tokens), -1)
    return Level(tokens, links, torch.zeros(tokens.shape), depth)


def take_in(drafter: FeatureDrafter, fresh: Fresh, cuts: tuple[int, ...] = (4, 7)) -> None:
    """Absorb verified tokens as the loop does: a prompt, then round by round, some rows behind."""
    drafter.reset(len(fresh.tokens))
    length, last = fresh.tokens.shape[1], cuts[-1]
    for start, stop in zip((0, *cuts[:-1]), cuts, strict=True):
        drafter.absorb(piece(fresh, start, stop))
    rest = piece(fresh, last, length)
    late = rest.valid.clone()
    late[0, 1:] = False  # the first row accepts one token, then the others of this piece
    drafter.absorb(replace(rest, valid=late))
    # a rejected branch in between must leave nothing behind
    drafter.expand(level(rest.tokens[:, :1] * 0 + 5, [0], 0))
    drafter.expand(level(rest.tokens[:, :2] * 0 + 7, [0, 0], 1))
    others = late.logical_not() & rest.valid
    order = torch.sort((~others).to(torch.uint8), dim=1, stable=True).indices

    def front(x: torch.Tensor) -> torch.Tensor:
        return x.gather(1, order if x.ndim == 2 else order[..., None].expand_as(x))

    f = rest.features
    moved = Features(
        None if f.final is None else front(f.final), {i: front(x) for i, x in f.layers.items()}
    )
    drafter.absorb(Fresh(front(rest.tokens), front(rest.following), moved, front(others)))


@torch.no_grad()
def drafts_as_trained(drafter: FeatureDrafter, steps: int = 4) -> None:
    """Step by step drafting along a text gives the logits of the training rollout."""
    batch = checks.batch_of(drafter)
    known = batch.ids.shape[1] - steps - 1  # verified tokens t; the root is ids[:, t]
    rows = drafter.rollout(batch, drafter.body.condense(batch.features), steps)
    take_in(drafter, checks.prefix(batch, known))
    for k in range(steps):
        got = drafter.expand(level(batch.ids[:, known + k : known + k + 1], [0], k))[:, 0]
        want = drafter.logits(rows[k][:, known - 1])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def tree_as_recomputed(drafter: FeatureDrafter) -> None:
    """A drafted tree equals running every path anew, without any cache."""
    batch = checks.batch_of(drafter)
    fresh = checks.prefix(batch, 9)
    take_in(drafter, fresh)
    f = drafter.body.condense(fresh.features)
    ahead = drafter.token_ahead
    draw = torch.Generator().manual_seed(5)

    def some(count: int) -> torch.Tensor:
        return torch.randint(3, 60, (len(f), count), generator=draw)

    tokens = [batch.ids[:, 9:10], some(3), some(4), some(4)]
    parents = [[0], [0, 0, 0], [0, 2, 0, 1], [3, 1, 1, 0]]
    got = [
        drafter.expand(level(t, p, d)) for d, (t, p) in enumerate(zip(tokens, parents, strict=True))
    ]
    for depth in range(1, 4):
        for node in range(tokens[depth].shape[1]):
            path = [node]
            for above in range(depth, 1, -1):
                path.insert(0, parents[above][path[0]])
            line = [fresh.following if ahead else fresh.tokens]
            names = [tokens[0], *(tokens[d + 1][:, n : n + 1] for d, n in enumerate(path))]
            features = f
            for d in range(depth + 1):
                positions = torch.arange(features.shape[1])[None]
                g = drafter.step(torch.cat(line, 1), features, positions)
                if d < depth:
                    line.append(names[d + 1] if ahead else names[d])
                    features = torch.cat([features, g[:, -1:, : f.shape[-1]]], 1)
            want = drafter.logits(g[:, -1])
            torch.testing.assert_close(got[depth][:, node], want, rtol=1e-9, atol=1e-9)
