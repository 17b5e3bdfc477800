"""SEANet: streams give what the whole gives; weights of transformers' EnCodec give its numbers."""

import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from isthmus.errors import InvalidInputError, MismatchError
from isthmus.models.seanet import SEANetDecoder, SEANetEncoder, folded, from_hub, level
from isthmus.nn.quantize import RVQ


def nets(**how: object) -> tuple[SEANetEncoder, SEANetDecoder]:
    torch.manual_seed(0)
    a, b = (cls(4, 6, (2, 3, 4), **how) for cls in (SEANetEncoder, SEANetDecoder))  # type: ignore[arg-type]
    return a.eval(), b.eval()


@pytest.mark.parametrize("how", [{}, {"units": 2, "lstm": 1}, {"skip": False, "lstm": 0}])
@pytest.mark.parametrize("pieces", [(1,) * 10, (3, 0, 7), (10,), (2, 2, 6)])
def test_a_stream_gives_what_the_whole_gives(
    how: dict[str, object], pieces: tuple[int, ...]
) -> None:
    encoder, decoder = nets(**how)
    x = torch.randn(2, 1, 240)
    z = encoder(x)
    y = decoder(z)
    assert z.shape == (2, 6, 10) and y.shape == x.shape
    states, back = encoder.init_state(), decoder.init_state()
    zs, ys = [], []
    for piece in x.split([24 * n for n in pieces], -1):
        part, states = encoder.step(piece, states)
        zs.append(part)
        part, back = decoder.step(part, back)
        ys.append(part)
    assert torch.allclose(torch.cat(zs, -1), z, atol=1e-5)
    assert torch.allclose(torch.cat(ys, -1), y, atol=1e-5)


def test_a_step_leaves_the_state_before_it() -> None:
    encoder, _ = nets()
    x = torch.randn(1, 1, 48)
    first = encoder.step(x, encoder.init_state())[1]
    a, _ = encoder.step(x, first)
    b, _ = encoder.step(x, first)
    assert torch.equal(a, b)


def test_nothing_looks_ahead() -> None:
    encoder, decoder = nets()
    x = torch.randn(1, 1, 240)
    other = x.clone()
    other[..., 120:] = 0
    same = (encoder(x)[..., :5], encoder(other)[..., :5])
    assert torch.equal(*same)
    z = encoder(x)
    assert torch.allclose(decoder(z)[..., :120], decoder(z[..., :5]), atol=1e-6)


def test_folded_nets_give_the_same() -> None:
    encoder, _ = nets()
    x = torch.randn(1, 1, 48)
    alone = folded(encoder)
    assert torch.equal(encoder(x), encoder(x)), "the net itself is not touched"
    assert alone.layers[0].conv.bias is not encoder.layers[0].conv.bias
    assert torch.allclose(alone(x), encoder(x), atol=1e-6)
    assert not any("original" in name for name in alone.state_dict())


def test_only_causal_nets_stream() -> None:
    for how in ({"causal": False}, {"pad": "reflect"}):
        encoder, _ = nets(**how)
        with pytest.raises(InvalidInputError, match="causal"):
            encoder.init_state()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pad", ["reflect", "constant"])
def test_weights_of_transformers_give_its_numbers(causal: bool, pad: str) -> None:
    torch.manual_seed(0)
    config = EncodecConfig(
        target_bandwidths=[8.0],
        sampling_rate=1000,
        hidden_size=8,
        num_filters=4,
        upsampling_ratios=[4, 2],
        codebook_size=16,
        codebook_dim=8,
        num_lstm_layers=1,
        norm_type="weight_norm" if causal else "time_group_norm",
        use_causal_conv=causal,
        pad_mode=pad,
    )
    theirs = EncodecModel(config).eval()
    for part in theirs.quantizer.layers:
        part.codebook.embed.normal_()
    weights = from_hub(theirs.state_dict())
    how = {"lstm": 1, "causal": causal, "pad": pad}
    encoder, decoder = SEANetEncoder(4, 8, (2, 4), **how), SEANetDecoder(4, 8, (2, 4), **how)
    quantizer = RVQ(8, 16, theirs.quantizer.num_quantizers)
    for name, part in (("encoder", encoder), ("decoder", decoder), ("quantizer", quantizer)):
        own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(name)}
        part.load_state_dict(own)
        part.eval()
    x = torch.randn(2, 1, 200)
    with torch.no_grad():
        z = encoder(x)
        assert torch.allclose(z, theirs.encoder(x), atol=1e-5)
        codes = quantizer.encode(z)
        assert torch.equal(codes, theirs.quantizer.encode(z))
        q = quantizer.decode(codes)
        assert torch.allclose(q, theirs.quantizer.decode(codes), atol=1e-6)
        assert torch.allclose(decoder(q), theirs.decoder(q), atol=1e-5)


def test_other_weights_are_refused() -> None:
    with pytest.raises(MismatchError, match="no weight of an EncodecModel"):
        from_hub({"head.weight": torch.zeros(1)})


@torch.no_grad()
def test_a_start_by_level_keeps_the_sound_alive() -> None:
    draw = torch.Generator().manual_seed(0)
    loud = torch.tensor([0.02, 0.2]).repeat(4, 1).view(8, 1, 1)
    x = loud * torch.randn(8, 1, 8_000, generator=draw)
    torch.manual_seed(0)
    encoder, decoder = SEANetEncoder(4, 8, (4, 5), lstm=0), SEANetDecoder(4, 8, (4, 5), lstm=0)

    def tells() -> float:
        """How much of what the vectors vary by is between loud and soft sounds."""
        size = encoder(x).abs().mean(-1)  # [B, D]
        return float((size[1::2].mean(0) / size[::2].mean(0)).mean())

    level(encoder, decoder, x)
    z = encoder(x)
    assert float(z.std()) == pytest.approx(1, rel=1e-3)
    assert float(decoder(z).std()) == pytest.approx(float(x.std()), rel=1e-3)
    # 100 times the power shows; a net whose biases drown the sound says the same of both
    assert tells() > 3
    with pytest.raises(InvalidInputError, match="silent"):
        level(encoder, decoder, torch.zeros(1, 1, 400))
