import pytest
import tiny
import torch

from isthmus.decoding.grid import GridSession, PlaceDraws, in_raster_order
from isthmus.decoding.law import Law
from isthmus.errors import InvalidInputError
from isthmus.nn.masks import additive


def test_what_is_fed_anywhere_scores_as_one_forward_over_what_was_seen():
    """Passes out of order, a replaced position and an absent token against one forward."""
    target = tiny.target("Llama")
    passes = [
        ([[5, 6], [7, 8]], [[0, 1], [0, 1]]),
        ([[9, 3], [4, 2]], [[2, 6], [2, -1]]),
        ([[1, 8, 7], [5, 6, 4]], [[3, 6, 7], [3, 6, 7]]),  # position 6 again, for the first image
    ]
    session, said = GridSession(target, 2), []
    for tokens, positions in passes:
        said.append(session.feed(torch.tensor(tokens), torch.tensor(positions)))
    tokens = torch.cat([torch.tensor(t) for t, _ in passes], 1)
    positions = torch.cat([torch.tensor(p) for _, p in passes], 1)
    when = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    seen = torch.zeros(2, 7, 7, dtype=torch.bool)
    for b in range(2):
        for query in range(7):
            for key in range(7):
                place = positions[b, key]
                replaced = any(
                    when[key] < when[other] <= when[query] and positions[b, other] == place
                    for other in range(7)
                )
                earlier = 0 <= place <= positions[b, query] and when[key] <= when[query]
                seen[b, query, key] = query == key or (earlier and not replaced)
    whole = target.forward(
        tokens, positions=positions.clamp(min=0), mask=additive(seen, target.dtype)
    )
    torch.testing.assert_close(torch.cat(said, 1), whole.logits)
    assert session.passes == 3


def test_raster_order_is_greedy_decoding_of_the_model():
    target = tiny.target("Llama")
    prompts = torch.tensor([[5, 9], [3, 7]])
    made = in_raster_order(target, prompts, (3, 4), PlaceDraws(0, 2, Law()), tiny.V)
    ids = prompts
    for _ in range(12):
        ids = torch.cat([ids, target.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made.flatten(1), ids[:, 2:])


def test_draws_follow_their_law():
    law = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    draws = PlaceDraws(3, 4000)
    found = draws.pick(law.log().expand(4000, 1, 3), torch.zeros(4000, 1, dtype=torch.int64))
    share = torch.bincount(found[:, 0], minlength=3) / 4000
    assert (share - law).abs().max() < 0.03
    uniform = draws.uniform(torch.ones(4000, 1, dtype=torch.int64))
    assert abs(float(uniform.mean()) - 0.5) < 0.02 and 0 < uniform.min() < uniform.max() < 1


def test_truncation_and_greed():
    logits, key = torch.tensor([[[0.0, 3.0, 2.9, 1.0]]]), torch.zeros(1, 1, dtype=torch.int64)
    found = {
        int(PlaceDraws(s, 1, Law(temperature=1.0, top_k=2)).pick(logits, key)) for s in range(40)
    }
    assert found == {1, 2}
    assert {int(PlaceDraws(s, 1, Law()).pick(logits, key)) for s in range(9)} == {1}


def test_refusals():
    with pytest.raises(InvalidInputError, match="no text before them"):
        PlaceDraws(0, 1, Law(repetition_penalty=1.2))
    with pytest.raises(InvalidInputError, match="128 positions"):
        GridSession(tiny.target("Llama"), 1).feed(torch.tensor([[1]]), torch.tensor([[128]]))
    chain = tiny.target("Bloom")
    with pytest.raises(InvalidInputError, match="several tokens in one forward"):
        GridSession(chain, 1)
