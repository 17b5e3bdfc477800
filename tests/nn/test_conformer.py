"""Conformers: against transformers' Parakeet, and deaf to padding."""

from typing import Any

import pytest
import torch
from transformers import ParakeetEncoder, ParakeetEncoderConfig

from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.nn.conformer import Conformer, from_parakeet, relative_positions

FRAMES = torch.tensor([90, 41, 3])


def ours(block: str = "conformer", **options: object) -> Conformer:
    torch.manual_seed(0)
    model = Conformer(
        16, 24, 2, 4, block=block, kernel=5, inner=40, factor=8, channels=6, **options  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def test_weights_of_parakeet_load_and_give_the_same() -> None:
    config = ParakeetEncoderConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        conv_kernel_size=5,
        subsampling_conv_channels=6,
        num_mel_bins=16,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = ParakeetEncoder(config).eval()
    for value in theirs.state_dict().values():
        if value.dtype.is_floating_point:
            value += 0.1 * torch.rand_like(value)
    model = ours(norm="batch", scale_input=True)
    model.load_state_dict(from_parakeet(theirs.state_dict()))
    features = torch.randn(3, 16, 90) * (torch.arange(90) < FRAMES[:, None])[:, None]
    mask = (torch.arange(90) < FRAMES[:, None]).long()
    wanted = theirs(features.transpose(1, 2), attention_mask=mask)
    found, lengths = model(features, FRAMES)
    assert lengths.tolist() == wanted.attention_mask.sum(1).tolist() == [12, 6, 1]
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[b, :length], wanted.last_hidden_state[b, :length])


@torch.no_grad()
def test_a_block_that_passes_on_is_its_last_norm() -> None:
    block: Any = ours().layers[0]
    x = torch.randn(2, 5, 24)
    told = relative_positions(5, 24, x), torch.ones(5, 5) > 0, torch.ones(2, 5) > 0
    assert not torch.allclose(block(x, *told), block.norm_out(x), atol=0.1)
    block.pass_on()
    torch.testing.assert_close(block(x, *told), block.norm_out(x))


@torch.no_grad()
@pytest.mark.parametrize("block", ["conformer", "e-branchformer"])
def test_padding_and_neighbours_change_nothing(block: str) -> None:
    model = ours(block)
    features = torch.randn(3, 16, 90)
    prefix = torch.randn(3, 2, 24)
    batch, lengths = model(features, FRAMES, prefix=prefix)
    junk = torch.cat([features, 100 * torch.randn(3, 16, 37)], 2)
    for b, frames in enumerate(FRAMES.tolist()):
        junk[b, :, frames:] = 100.0
    padded, _ = model(junk, FRAMES, prefix=prefix)
    for b, (frames, length) in enumerate(zip(FRAMES.tolist(), lengths.tolist(), strict=True)):
        row = features[b : b + 1, :, :frames]
        alone, _ = model(row, FRAMES[b : b + 1], prefix=prefix[b : b + 1])
        assert alone.shape[1] == length
        torch.testing.assert_close(batch[b, :length], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded[b, :length], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", ["conformer", "e-branchformer"])
def test_every_parameter_learns(block: str) -> None:
    model = ours(block).train()
    x, _lengths = model(torch.randn(3, 16, 90), FRAMES)
    (x * torch.randn(3, 12, 24)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if not name.endswith("k_proj.bias"):  # a softmax does not see it
            assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_what_is_called_between_changes_the_state() -> None:
    model, seen = ours(), []

    def between(number: int, x: torch.Tensor) -> torch.Tensor:
        seen.append(number)
        return torch.zeros_like(x) if number == 2 else x

    out, _ = model(torch.randn(1, 16, 40), torch.tensor([40]), between=between)
    assert seen == [1, 2] and not out.any()


def test_refusals() -> None:
    with pytest.raises(UnknownNameError, match="e-branchformer"):
        ours("branchformer")
    with pytest.raises(InvalidInputError, match="heads do not divide"):
        Conformer(16, 25, 1, 4)
    with pytest.raises(InvalidInputError, match="by 2, 4, 8"):
        Conformer(16, 24, 1, 4, factor=6)
    with pytest.raises(InvalidInputError, match="odd"):
        Conformer(16, 24, 1, 4, kernel=4)


@pytest.mark.parametrize("block", ["conformer", "e-branchformer"])
def test_a_row_alone_is_what_it_is_beside_longer_ones(block: str) -> None:
    """A row without padding is computed without masks."""
    torch.manual_seed(0)
    made = Conformer(16, 8, 2, 2, block=block, factor=4, channels=4, chunk=3).eval()
    x, frames = torch.randn(2, 16, 40), torch.tensor([25, 40])
    both, lengths = made(x, frames)
    alone, length = made(x[:1, :, :25], frames[:1])
    assert length.tolist() == lengths[:1].tolist()
    torch.testing.assert_close(alone[0], both[0, : length[0]])
