"""Latents as bytes: real sizes, other machines, desync, escapes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from isthmus.codecs.container import Frame
from isthmus.codecs.entropy import (
    GAUSSIAN,
    RATIO,
    HyperCoder,
    channels_of,
    factorised_tables,
    gaussian_table,
    scale,
)
from isthmus.codecs.rangecoder import decode_indexed, encode_indexed, estimate_bits
from isthmus.errors import BrokenFileError, DesyncError, InvalidInputError, IsthmusError
from isthmus.models.transform_codec import FRACTIONS, Hyperprior
from isthmus.nn.likelihood import SCALES, Factorised, scale_at
from isthmus.nn.whole_net import WholeConv

M, CZ = 6, 4


@pytest.fixture(scope="module")
def law() -> Hyperprior:
    torch.manual_seed(0)
    made = Hyperprior(M, CZ, 8).eval()
    for head in (made.prior.mean, made.prior.index):  # let it say something
        head.layers[0].conv.weight.data *= 20  # type: ignore[union-attr,operator]
    return made


def latents(seed: int = 0, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    y, past = (torch.randn(1, k * M, 16, 16, generator=draw) * spread for k in (1, 2))
    z = torch.randn(1, CZ, 4, 4, generator=draw) * 4
    return y.round().long(), z.round().long(), past.round().long()


def test_bytes_are_those_of_the_estimate_and_come_back(law: Hyperprior) -> None:
    coder = HyperCoder.freeze(law)
    again = HyperCoder.of(coder.tensors())
    y, z, past = latents()
    data = coder.compress(y, z, past)
    back, hyper = again.decompress(data, y.shape, past)
    assert torch.equal(back, y) and torch.equal(hyper, z)
    bits = coder.bits(y, z, past)
    assert bits - 64 <= len(data) * 8 <= 1.005 * bits + 64


def test_tables_cost_what_the_law_says(law: Hyperprior) -> None:
    """The bits that training sees, on the grid, and those of the file."""
    coder = HyperCoder.freeze(law)
    _, z, past = latents()
    units, index = coder.prior(z, past)
    noise = torch.randn(units.shape, generator=torch.Generator().manual_seed(5))
    y = (units / FRACTIONS + noise * scale_at(index.double())).round().long()
    with torch.no_grad():
        z_bits = law.factorised.bits(z.float()).sum()
        mean, s = law.prior(z.float(), past.float(), True)
        y_bits = law.conditional.bits(y.float(), mean, s).sum()
    assert coder.bits(y, z, past) == pytest.approx(float(z_bits + y_bits), rel=0.01)


def test_other_orders_of_channels_give_the_same_bytes(law: Hyperprior) -> None:
    """What a machine that sums in another order would do."""
    coder = HyperCoder.freeze(law)
    prior = coder.prior
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))

    def out(layer: WholeConv) -> WholeConv:
        parts = {n: getattr(layer, n)[order] for n in ("weight", "bias", "multiplier", "shift")}
        return replace(layer, **parts)

    def into(layer: WholeConv) -> WholeConv:
        return replace(layer, weight=layer.weight[:, order])

    moved = replace(
        prior,
        temporal=[out(prior.temporal[0]), into(prior.temporal[1]), *prior.temporal[2:]],
        fusion=[out(prior.fusion[0])],
        mean=[into(prior.mean[0])],
        index=[into(prior.index[0])],
    )
    y, z, past = latents()
    assert not torch.equal(moved.fusion[0].weight, prior.fusion[0].weight)
    assert HyperCoder(coder.tables, moved).compress(y, z, past) == coder.compress(y, z, past)


def test_another_place_in_the_table_is_a_desync(law: Hyperprior) -> None:
    coder = HyperCoder.freeze(law)
    y, z, past = latents()
    symbols = torch.cat([z.flatten(), y.flatten()])
    frame = Frame.of(symbols, coder.compress(y, z, past))
    head = coder.prior.index[0]
    flipped = replace(
        coder.prior, index=[replace(head, bias=head.bias + head.shift / head.multiplier)]
    )
    other = HyperCoder(coder.tables, flipped)
    y2, z2 = other.decompress(frame.payload, y.shape, past)
    with pytest.raises(DesyncError):
        frame.verify(torch.cat([z2.flatten(), y2.flatten()]))
    y3, z3 = coder.decompress(frame.payload, y.shape, past)
    frame.verify(torch.cat([z3.flatten(), y3.flatten()]))


def test_escapes(law: Hyperprior) -> None:
    coder = HyperCoder.freeze(law)
    y, z, past = latents()
    y[0, 0, 0, 0], y[0, 1, 2, 3], z[0, 0, 0, 0], past[0, 0, 0, 0] = 70_000, -9_999, 5_000, 1 << 20
    back, hyper = coder.decompress(coder.compress(y, z, past), y.shape, past)
    assert torch.equal(back, y) and torch.equal(hyper, z)


def test_damaged_bytes_raise_nothing_foreign(law: Hyperprior) -> None:
    coder = HyperCoder.freeze(law)
    y, z, past = latents()
    data = coder.compress(y, z, past)
    for bad in (data[:-3], data[:8], b"\xff" * len(data), b""):
        try:
            found = coder.decompress(bad, y.shape, past)
        except IsthmusError:
            continue
        assert found[0].shape == y.shape
    with pytest.raises(BrokenFileError, match="entropy model is damaged"):
        HyperCoder.of({k: v for k, v in coder.tensors().items() if k != "z.lows"})


def test_normal_tables_are_those_of_scipy() -> None:
    assert float(RATIO) == pytest.approx((256 / 0.11) ** (1 / 63), rel=1e-14)
    wanted = scale_at(torch.arange(SCALES).double())
    assert [scale(i) for i in range(SCALES)] == pytest.approx(wanted.tolist())
    assert len(GAUSSIAN) == SCALES * FRACTIONS and GAUSSIAN[9] is gaussian_table(1, 1)
    for index, part in ((0, 0), (0, 4), (7, 3), (20, 7), (40, 1), (63, 5)):
        table, law = gaussian_table(index, part), norm(part / FRACTIONS, scale(index))
        places = np.arange(table.low, table.low + table.size)
        mass = law.cdf(places + 0.5) - law.cdf(places - 0.5)
        got = table.counts[:-1] / 65536
        # a frequency is at least 1, which all others pay for
        assert np.abs(got - mass).max() <= (len(mass) + 2) / 65536
        cost = -(mass * np.log2(got)).sum() + (mass * np.log2(np.maximum(mass, 1e-30))).sum()
        assert cost < 0.01  # bits a symbol above the law's own
    with pytest.raises(InvalidInputError, match="tables of 64 scales"):
        gaussian_table(64)


def test_a_factorised_law_as_tables() -> None:
    torch.manual_seed(1)
    law = Factorised(3, init_scale=5.0).eval()
    tables = factorised_tables(law)
    values = torch.randint(-12, 12, (2, 3, 40), generator=torch.Generator().manual_seed(0))
    values[0, 0, 0] = 4000
    places = channels_of(values)
    data = encode_indexed(values, places, tables)
    assert np.array_equal(decode_indexed(data, places, tables), values.numpy())
    inside = values.clamp(-12, 12)
    bits = float(law.bits(inside.float()).sum().detach())
    assert estimate_bits(inside, places, tables) == pytest.approx(bits, rel=0.01)
    law.biases[0].data.fill_(float("nan"))
    with pytest.raises(InvalidInputError, match="not finite"):
        factorised_tables(law)


def test_a_coder_of_larger_steps_has_narrower_laws_nearer_to_0() -> None:
    torch.manual_seed(0)
    law = Hyperprior(6, 2, 8, temporal=False).eval()
    y = torch.randn(1, 6, 16, 16) * 20
    law.begin(y)
    z = law.h_a(y).round().detach()
    coder, none = HyperCoder.freeze(law), law.no_past(y)
    mean, index = coder.prior(z, none)
    far, places = coder.at(8).prior(z, none)  # steps of 2
    assert (far * 2 - mean).abs().max() <= 1
    assert torch.equal(places, (index - 6).clamp(0, 63))  # 1.131^5.63 = 2
    assert torch.equal(coder.at(0).prior(z, none)[0], mean)
    # what is coded so takes what the law in training says
    for level, step in ((-8, 0.5), (0, 1.0), (16, 4.0)):
        whole = (y / step).round().long()
        data = coder.at(level).compress(whole, z, none)
        back, _ = coder.at(level).decompress(data, whole.shape, none)
        assert torch.equal(back, whole)
        said = float(law(y, none, True, step)[1].detach().sum())
        exact = coder.at(level).bits(whole, z, none) - estimate_bits(*coder._z(z), coder.tables)
        assert exact == pytest.approx(said, rel=0.02)
