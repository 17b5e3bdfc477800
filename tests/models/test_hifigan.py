"""HiFi-GAN: weights of transformers' vocoder give its numbers; levels, reach, and bad sizes."""

import pytest
import torch
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from isthmus.errors import InvalidInputError, MismatchError
from isthmus.models.hifigan import HiFiGANEncoder, HiFiGANGenerator, from_hub, level
from isthmus.models.seanet import folded

SIZES = ((5, 4, 2), (3, 7), (1, 3))


def test_weights_of_transformers_give_its_numbers() -> None:
    torch.manual_seed(0)
    config = SpeechT5HifiGanConfig(
        model_in_dim=6,
        upsample_initial_channel=32,
        upsample_rates=[2, 4, 5],
        upsample_kernel_sizes=[4, 8, 11],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        normalize_before=False,
        initializer_range=0.2,
    )
    theirs = SpeechT5HifiGan(config).eval()
    ours = HiFiGANGenerator(6, 4, *SIZES).eval()
    ours.load_state_dict(from_hub(theirs.state_dict()))
    z = torch.randn(2, 6, 9)
    wanted = theirs(z.transpose(1, 2))
    assert wanted.std() > 0.05 and torch.allclose(ours(z)[:, 0], wanted, atol=1e-5)
    assert torch.allclose(folded(ours)(z)[:, 0], wanted, atol=1e-5)
    with pytest.raises(MismatchError, match=r"encoder\.weight"):
        from_hub({"encoder.weight": torch.zeros(1, 1, 1)})


def nets() -> tuple[HiFiGANEncoder, HiFiGANGenerator]:
    torch.manual_seed(0)
    return HiFiGANEncoder(6, 4, *SIZES).eval(), HiFiGANGenerator(6, 4, *SIZES).eval()


def test_levels_stay_the_same_all_the_way() -> None:
    encoder, decoder = nets()
    x = 0.1 * torch.randn(4, 1, 4000)
    level(encoder, decoder, x)
    with torch.no_grad():
        z = encoder(x)
        y = decoder(z)
    assert z.shape == (4, 6, 100) and y.shape == x.shape
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    # tanh takes little off sounds of this level
    assert float(y.std()) == pytest.approx(float(x.std()), rel=0.05)
    assert not any(p._forward_hooks for net in (encoder, decoder) for p in net.modules())
    with pytest.raises(InvalidInputError, match="silent"):
        level(encoder, decoder, torch.zeros(1, 1, 400))


def test_the_reach_is_no_shorter_than_what_counts() -> None:
    """A gradient through the whole net ends within the reach, and not far from its end."""
    encoder, decoder = nets()
    z = torch.randn(1, 6, 101).double().requires_grad_()
    y = decoder.double()(z)
    (grad,) = torch.autograd.grad(y[0, 0, 50 * 40 : 51 * 40].sum(), z)
    seen = grad.abs().sum((0, 1)).nonzero()
    far = max(50 - int(seen.min()), int(seen.max()) - 50)
    assert decoder.reach - 2 <= far <= decoder.reach
    encoder.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in encoder.norms)
    x = torch.randn(1, 1, 101 * 40).double().requires_grad_()
    (grad,) = torch.autograd.grad(encoder.double()(x)[..., 50].sum(), x)
    seen = grad.abs().sum((0, 1)).nonzero() // 40
    far = max(50 - int(seen.min()), int(seen.max()) - 50)
    assert encoder.reach - 2 <= far <= encoder.reach


@pytest.mark.parametrize("bad", [((), (3,), (1,)), ((2,), (4,), (1,)), ((2, 0), (3,), (1,))])
def test_sizes_out_of_range_are_refused(bad: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"HiFi-GAN has|odd"):
        HiFiGANGenerator(6, 4, *bad)
