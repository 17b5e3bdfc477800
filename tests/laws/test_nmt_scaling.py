import numpy as np
import pytest

from isthmus.errors import InvalidInputError
from isthmus.laws.fit import fit
from isthmus.systems.laws.nmt_scaling import NmtScaling, Settings, claim, parameters
from isthmus.training.loop import Plan
from isthmus.workbench import dates, numbers, origins

TINY = Settings(
    depths=(1, 2, 3),
    hidden_size=16,
    num_attention_heads=1,
    intermediate_size=16,
    vocab_size=300,
    batch_tokens=256,
)


def made(**changes):
    data = origins.pairs(40, "source-natural")
    tests = {"held-out": origins.pairs(8, "source-natural", held_out=True)}
    settings = Settings(**{**vars(TINY), **changes})
    return NmtScaling(data, tests, settings, Plan(2, validate_every=2, save_every=2))


def planted(system, powers=(0.3, 0.6), floor=0.2):
    """Records that follow a known law exactly."""
    records = []
    for config in system.configs():
        network = system.network(**config)
        e, d = parameters(network.encoder), parameters(network.decoder)
        loss = floor + 40 * e ** -powers[0] * d ** -powers[1]
        records.append({"encoder": e, "decoder": d, "loss": loss, "compute": e + d})
    return [record | {"diverged": False} for record in records]


def test_the_law_of_planted_losses_is_found_and_its_split_is_the_best():
    system = made(depths=(1, 2, 4, 8))
    law = fit(system.runs(planted(system)), "product", draws=0)
    assert law.values["alpha:encoder"].value == pytest.approx(0.3, rel=0.02)
    assert law.values["alpha:decoder"].value == pytest.approx(0.6, rel=0.02)
    total = 40_000.0
    shares = np.linspace(0.05, 0.95, 181)
    sizes = {"encoder": shares * total, "decoder": (1 - shares) * total}
    best = shares[np.argmin([v.value for v in law.predict(sizes)])]
    assert law.split(total)["encoder"] / total == pytest.approx(best, abs=0.005)


def test_the_total_size_alone_does_not_tell_such_losses():
    system, off = made(depths=(1, 2, 4, 6)), made(depths=(1, 2, 4, 6), bivariate=False)
    records = planted(system, powers=(0.1, 0.9))
    laws = [fit(each.runs(records), "product", draws=0) for each in (system, off)]
    assert laws[0].r2 > 0.999 > 0.95 > laws[1].r2


def test_sizes_count_neither_embeddings_nor_the_output_matrix():
    system = made()
    network = system.network(2, 1)
    block = 4 * 16 * 16 + 3 * 16 * 16  # attention, gated feed-forward
    extra = 16  # a norm a sublayer, and one at the end; 32 buckets of positions
    assert parameters(network.encoder) == 2 * (block + 2 * extra) + extra + 32
    assert parameters(network.decoder) == block + 4 * 16 * 16 + 3 * extra + extra + 32
    again = system.network(2, 1)
    assert all(
        map(
            np.array_equal,
            *([p.detach().numpy() for p in n.parameters()] for n in (network, again)),
        )
    )


def test_a_sweep_trains_the_grid_and_is_gone_on_with(tmp_path):
    system = made()
    sweep = system.sweep(tmp_path / "runs.jsonl")
    sweep.run(system.configs()[:2])
    records = sweep.run(system.configs())
    assert len(records) == 9
    first, last = records[0], records[-1]
    assert last["encoder"] == pytest.approx(3 * first["encoder"], rel=0.05)
    assert last["compute"] > 1.5 * first["compute"]
    assert first["loss"] == first["loss:held-out"] > 0
    assert sweep.run(system.configs(), budget_s=0) == records


def test_the_claim_runs():
    found = claim(None, "test")
    assert found.slug == "nmt-scaling"
    assert len(found.rows) == 3


def test_too_few_depths_are_refused():
    with pytest.raises(InvalidInputError, match="three depths"):
        Settings(depths=(2, 2, 4))


def test_origins_are_held_out_in_both_directions():
    iso = {pair.target for pair in origins.pairs(200, "source-natural", held_out=True)}
    for told in iso:
        if "-" in told:
            assert dates.is_held_out(dates.datetime.date.fromisoformat(told))
        else:
            assert numbers.is_held_out(int(told))
    noisy = origins.pairs(50, "machine-made")
    plain = {each.source for each in origins.pairs(50, "source-natural")}
    assert sum(pair.source in plain for pair in noisy) < 10
