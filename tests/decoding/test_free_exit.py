"""FREE: its stack computes what the full model computes, its exact mode writes what it writes."""

import copy
import math

import pytest
import tiny
import torch

from isthmus.decoding.confidence import GRID, Calibrator, beta_by_moments, beta_density
from isthmus.decoding.split import SplitDecoder
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Taps
from isthmus.systems.speculative.free_exit import FreeExit, Settings, distillation, loss
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import IGNORED, tune


@pytest.fixture(scope="module")
def network():
    return four_layers("Bart")


def four_layers(kind):
    """A BART or mBART of four decoder layers in float64 whose answers do not end by themselves."""
    import transformers

    settings = tiny.network("Bart").config.to_dict() | {"decoder_layers": 4}
    settings.pop("model_type")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = getattr(transformers, f"{kind}Config")(**settings)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(3)
    model.lm_head.weight.data.mul_(6)  # else nothing is ever certain
    model.generation_config.eos_token_id = None
    return model.eval().double()


def answer(network, row=0, new=12, **settings):
    strategy = FreeExit(network, Settings(**{"exit_layer": 2, **settings}))
    return strategy.generate(tiny.prompts()[row], max_new_tokens=new)


def plain(network, row=0, new=12):
    ids = tiny.prompts()[row][None]
    out = network.generate(
        input_ids=ids, max_new_tokens=new, do_sample=False, num_beams=1, pad_token_id=0
    )
    return out[0].tolist()[-new:]


def test_without_exits_it_is_the_full_model(network):
    for row in range(3):
        result = answer(network, row, exits=False)
        assert result.tokens == plain(network, row) and result.lossless
        assert result.notes == ["48 layer calls, 48 layers of tokens"]


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.5])
@pytest.mark.parametrize("max_stack", [2, 16])
def test_exact_mode_writes_what_the_full_model_writes(network, threshold, max_stack):
    for row in range(3):
        result = answer(network, row, threshold=threshold, max_stack=max_stack, mode="exact")
        assert result.tokens == plain(network, row) and result.lossless


def test_an_end_token_is_verified_too(network):
    full = plain(network)
    network = copy.deepcopy(network)
    network.generation_config.eos_token_id = full[4]
    want = full[: full.index(full[4]) + 1]
    for threshold in (-1.0, 0.1, 0.4):
        result = answer(network, threshold=threshold, mode="exact")
        assert result.tokens == want and result.finish_reason == "stop"


def test_the_stack_gives_the_states_of_the_full_model(network):
    """Keys and states after a flush equal a run of everything through all layers; copies do not."""
    split = SplitDecoder(network, 2)
    source = tiny.prompts()[1]
    tokens = torch.tensor([[1, 9, 8, 7, 6, 5]])
    full = split.session(source)
    with torch.no_grad():
        want = full.deep(full.shallow(tokens))
        stacked = split.session(source)
        one_by_one = [stacked.shallow(tokens[:, i : i + 1]) for i in range(6)]
        first = stacked.deep(torch.cat(one_by_one[:4], 1))
        got = torch.cat([first, stacked.deep(torch.cat(one_by_one[4:], 1))], 1)
        copied = split.session(source)
        for i in range(5):
            copied.copy_up(copied.shallow(tokens[:, i : i + 1]))
        last = copied.deep(copied.shallow(tokens[:, 5:]))
    assert float((got - want).abs().max()) < 1e-9
    for a, b in zip(
        full.cache.self_attention_cache.layers,
        stacked.cache.self_attention_cache.layers,
        strict=True,
    ):
        assert float((a.keys - b.keys).abs().max()) < 1e-9
    assert float((last - want[:, 5:]).abs().max()) > 1e-3
    target = tiny.HubTarget(network)
    encoded = target.encode(input_ids=source[None])
    whole = target.forward(tokens, encoded=encoded, taps=Taps(final=True)).features
    assert float((whole.final - want).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", ["Bart", "MBart"])
def test_copied_keys_are_those_of_the_first_deep_layer(kind):
    """That layer reads the shallow states, so there a copy is no approximation."""
    split = SplitDecoder(four_layers(kind), 2)
    tokens = torch.tensor([[1, 9, 8, 7]])
    deep, copied = split.session(tiny.prompts()[0]), split.session(tiny.prompts()[0])
    with torch.no_grad():
        deep.deep(deep.shallow(tokens))
        copied.copy_up(copied.shallow(tokens))
    layers = [s.cache.self_attention_cache.layers for s in (deep, copied)]
    for name in ("keys", "values"):
        first, second = (getattr(each[2], name) for each in layers)
        assert float((first - second).abs().max()) < 1e-9
        first, second = (getattr(each[3], name) for each in layers)
        assert float((first - second).abs().max()) > 1e-3


def test_the_mechanism_matters(network):
    always, never = answer(network, threshold=-1.0, max_stack=99), answer(network, exits=False)
    assert always.notes == ["24 layer calls, 24 layers of tokens"]
    assert always.stats.target_forwards == 0 and never.stats.target_forwards == 12
    assert not always.lossless
    some = answer(network, threshold=0.2)
    shallow = sum(r.drafter == "shallow" for r in some.rounds)
    assert 0 < shallow < 12
    # each token 2 shallow layers; each run of the deep ones 2, whatever the stack holds
    deep = some.stats.target_forwards
    assert some.notes[0].startswith(f"{24 + 2 * deep} layer calls")


def test_moments_recover_known_laws():
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(6000, 7, generator=generator, dtype=torch.float64).sort(1).values
    # the third smallest of seven uniform numbers has the law Beta(3, 5)
    alpha, beta = beta_by_moments(u[:, 2].tolist())
    assert abs(alpha - 3) < 0.25 and abs(beta - 5) < 0.4
    total = sum(beta_density((i + 0.5) / 500, 3, 5) for i in range(500)) / 500
    assert math.isclose(total, 1.0, rel_tol=1e-4)


def test_the_threshold_separates_right_from_wrong():
    calibrator = Calibrator()
    assert calibrator.threshold(0.4, 0.8) == 0.8, "nothing is known yet"
    calibrator.agreed += [0.8, 0.85, 0.9, 0.95, 0.97]
    calibrator.differed += [0.1, 0.2, 0.3, 0.4, 0.45]
    found = calibrator.threshold(0.4, 0.8)
    assert found in GRID and 0.4 < found < 0.85
    assert calibrator.threshold(0.999, 0.8) >= found, "more certainty, a higher threshold"


def test_an_adaptive_threshold_moves(network):
    strategy = FreeExit(network, Settings(exit_layer=2, threshold=0.05, adaptive=True))
    for row in range(3):
        strategy.generate(tiny.prompts()[row], max_new_tokens=16)
    seen = strategy.calibrator
    assert len(seen.agreed) + len(seen.differed) > 2
    assert strategy.threshold != 0.05


def test_distillation_by_hand():
    states = [torch.full((1, 1, 2), float(v)) for v in (0.0, 5.0, 9.0, 4.0)]
    mask = torch.ones(1, 1, dtype=torch.bool)
    # deep layers 2 and 4: layer 4 (4.0) is closest to layer 2 (5.0), layer 2 to itself
    assert float(distillation(states, 2, mask)) == 0.5
    # with the top one closest to layer 1, nothing above layer 1 is left for the other
    states[3] = torch.full((1, 1, 2), 1.0)
    assert float(distillation(states, 2, mask)) == (1.0 + 25.0) / 2


def test_training_makes_the_exit_agree(network):
    model = copy.deepcopy(network).float()
    split = SplitDecoder(model, 1)
    sources = torch.randint(3, 40, (128, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = model.generate(
            input_ids=sources, max_new_tokens=6, do_sample=False, num_beams=1, pad_token_id=0
        )[:, 1:]
    both = torch.cat([sources, torch.where(answers == 0, IGNORED, answers)], 1)

    def value(rows, _):
        return loss(split, rows[:, :6], rows[:, 6:], 0, 1)

    before = float(value(both, None).detach())
    losses = tune(model, both, value, Recipe(steps=12, batch_size=32, learning_rate=1e-3))
    assert losses[-1] < before


def test_bad_input_is_refused(network):
    with pytest.raises(InvalidInputError, match="mode"):
        Settings(mode="fast")
    with pytest.raises(InvalidInputError, match="exit"):
        FreeExit(network, Settings(exit_layer=4))
    with pytest.raises(InvalidInputError, match="greedily"):
        FreeExit(network).generate(tiny.prompts()[0], max_new_tokens=3, temperature=0.5)
    for name in ("Llama", "T5", "Whisper"):
        with pytest.raises(UnsupportedModelError):
            FreeExit(tiny.network(name))
