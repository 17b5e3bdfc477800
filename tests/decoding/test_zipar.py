import dataclasses

import pytest
import tiny
import torch

from isthmus.claims import Ruler
from isthmus.decoding.grid import PlaceDraws, in_raster_order
from isthmus.decoding.law import Law
from isthmus.errors import InvalidInputError
from isthmus.systems.decoding.zipar import Settings, Zipar, _Canvas, claim, pass_count

PROMPTS = torch.tensor([[5], [9], [20]])
SIZE = (4, 6)


def paint(law=None, **settings):
    return Zipar(Settings(**settings)).paint(
        tiny.target("Llama"), PROMPTS, SIZE, seed=4, law=law, levels=16
    )


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("alone", [True, False])
def test_passes_are_those_of_the_formula(window, alone):
    made = paint(window=window, first_row_alone=alone)
    wanted = pass_count(*SIZE, window, first_row_alone=alone)
    assert made.passes.tolist() == [wanted] * 3
    formula = 2 * 6 + 2 * window if alone else 6 + 3 * window
    assert wanted == formula
    assert made.tokens.min() >= 0 and made.tokens.max() < 16


@pytest.mark.parametrize("law", [None, Law(), Law(temperature=0.7, top_k=5)])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_window_as_wide_as_a_row_is_raster_order_sample_for_sample(law, adaptive):
    plain = in_raster_order(tiny.target("Llama"), PROMPTS, SIZE, PlaceDraws(4, 3, law), 16)
    made = paint(law, window=99, adaptive=adaptive)
    assert torch.equal(made.tokens, plain)
    assert made.passes.tolist() == [24] * 3
    assert not torch.equal(paint(law, window=2).tokens, plain)


def test_images_do_not_know_their_neighbours():
    whole = paint(window=2, adaptive=True, law=Law())
    alone = [
        Zipar(Settings(window=2, adaptive=True)).paint(
            tiny.target("Llama"), PROMPTS[i : i + 1], SIZE, seed=4, law=Law(), levels=16
        )
        for i in range(3)
    ]
    assert torch.equal(whole.tokens, torch.cat([a.tokens for a in alone]))
    assert torch.equal(whole.passes, torch.cat([a.passes for a in alone]))


def canvas(**settings):
    draws = PlaceDraws(0, 1, Law())
    return _Canvas(Settings(**settings), draws, torch.tensor([[9]]), (3, 4), 5)


@pytest.mark.parametrize(("stand_in", "token"), [("above", 3), ("current", 1)])
def test_the_stand_in_by_hand(stand_in, token):
    """Row 2 begins when row 1 has two tokens; its first one follows (1, 3), which is not there."""
    grid = canvas(window=2, stand_in=stand_in)
    grid.tokens[0, 0] = torch.tensor([0, 2, 4, 3])
    grid.tokens[0, 1, :2] = torch.tensor([0, 1])
    grid.fed[0] = torch.tensor([4, 1, 0])
    tokens, places = grid.newest()
    assert places.tolist() == [[5, 7]]  # (1, 1), and the place before (2, 0)
    assert tokens.tolist() == [[1, token]]


def test_a_finished_row_is_fed_to_its_end_and_takes_the_place_of_the_stand_in():
    grid = canvas(window=2)
    grid.tokens[0, :2] = torch.tensor([[0, 2, 4, 3], [0, 1, 1, 2]])
    grid.tokens[0, 2, :2] = torch.tensor([4, 0])
    grid.fed[0] = torch.tensor([4, 3, 1])
    tokens, places = grid.newest()
    assert places.tolist() == [[7, 9]] and tokens.tolist() == [[2, 0]]
    logits = torch.zeros(1, 2, 5)
    logits[0, :, 3] = 9.0
    grid.write(logits, places)
    # what follows (1, 3) has long been there and stays
    assert grid.tokens[0, 2].tolist() == [4, 0, 3, -1]
    assert grid.fed.tolist() == [[4, 4, 2]]


def test_waiting_gives_the_law_of_the_later_pass():
    """Draw from p_k, judge by p_(k+1): what stands follows p_(k+1), and most stands at once."""
    n, old, new = 6000, torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    prompts = torch.zeros(n, 1, dtype=torch.int64)
    grid = _Canvas(Settings(window=2, adaptive=True), PlaceDraws(1, n), prompts, (3, 4), 3)
    grid.tokens[:, 0] = 0
    grid.tokens[:, 1, :2] = 0
    places = torch.full((n, 1), 7)
    grid.write(old.log().expand(n, 1, 3), places)
    assert (grid.tokens[:, 2] < 0).all()  # nothing stands yet
    grid.tokens[:, 1, 2] = 0
    grid.write(new.log().expand(n, 1, 3), places)
    first = grid.tokens[:, 2, 0]
    assert abs(float((first >= 0).float().mean()) - 0.7) < 0.02  # sum of min(old, new)
    later = torch.where(first >= 0, first, grid.waiting[:, 2])
    share = torch.bincount(later, minlength=3) / n
    assert (share - new).abs().max() < 0.02


def test_adaptive_windows_take_more_passes_than_fixed_ones_and_fewer_than_raster():
    passes = paint(window=2, adaptive=True).passes
    assert (passes > pass_count(*SIZE, 2)).all() and (passes <= 24 + 2).all()


@pytest.mark.parametrize("settings", [{"window": 0}, {"stand_in": "below"}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidInputError, match="zipar needs"):
        Zipar(dataclasses.replace(Settings(), **settings))


def test_the_claim_made_small():
    pytest.importorskip("sklearn")
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["passes, as a share of raster order"].passed
    assert gates["idea off: tokens unlike raster order"].passed
