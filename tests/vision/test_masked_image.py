"""Patches, masks and masked image modelling against hand values and transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from isthmus.errors import InvalidInputError
from isthmus.models.masked_image import MaskedImageModel, PixelDecoder, PixelTarget, painted
from isthmus.models.vision_transformer import VisionTransformer
from isthmus.nn.masking import random_mask
from isthmus.nn.patches import (
    PatchEmbed,
    grid_of,
    patchify,
    resize_positions,
    sincos2d,
    unpatchify,
)


@pytest.mark.parametrize("order", ["channel-last", "channel-first"])
@pytest.mark.parametrize("patch", [4, (2, 8)])
def test_patches_of_any_picture_go_back(order, patch):
    pictures = torch.randn(2, 3, 8, 24)
    tokens = patchify(pictures, patch, order)
    grid = grid_of((8, 24), patch)
    assert tokens.shape == (2, grid[0] * grid[1], pictures[0].numel() // (grid[0] * grid[1]))
    assert torch.equal(unpatchify(tokens, grid, patch, order), pictures)


def test_embedding_is_a_linear_layer_on_patches() -> None:
    torch.manual_seed(0)
    embed = PatchEmbed(3, 8, 4)
    pictures = torch.randn(2, 3, 8, 12)
    weight = embed.projection.weight.flatten(1)  # by (channel, row, column)
    wanted = patchify(pictures, 4, "channel-first") @ weight.T + embed.projection.bias
    torch.testing.assert_close(embed(pictures), wanted)
    bound = (6 / (8 + 48)) ** 0.5  # Xavier of the linear layer, not of the convolution
    assert 0.9 * bound < weight.abs().max() <= bound


def test_sizes_that_do_not_fit_name_the_nearest() -> None:
    with pytest.raises(InvalidInputError, match=r"height of 50 .*patches of 16.* 48 and 64"):
        grid_of((50, 64), 16)
    with pytest.raises(InvalidInputError, match=r"can: 16$"):
        grid_of((5, 16), 16)
    with pytest.raises(InvalidInputError, match="do not fill"):
        unpatchify(torch.zeros(1, 5, 12), (2, 3), 2)


def test_positions_are_those_of_transformers() -> None:
    theirs = build_2d_sinusoidal_position_embedding(3, 5, 16, cls_token=True)
    torch.testing.assert_close(sincos2d((3, 5), 16, class_token=True), theirs)
    turned = torch.cat([theirs[:, 8:], theirs[:, :8]], 1)
    torch.testing.assert_close(sincos2d((3, 5), 16, class_token=True, axis_first="column"), turned)
    with pytest.raises(InvalidInputError, match="4 divides"):
        sincos2d((2, 2), 6)


def test_positions_are_resized_along_the_grid() -> None:
    table = torch.arange(4.0).repeat(3)[:, None]  # the column, on a grid of 3 x 4
    found = resize_positions(table, (3, 4), (3, 8)).view(3, 8)
    assert resize_positions(table, (3, 4), (3, 4)) is table
    torch.testing.assert_close(found[0, 3] + found[0, 4], torch.tensor(3.0))
    assert torch.equal(found[0], found[2]) and found[0].diff().min() > 0


def test_masks_keep_an_exact_number_and_lead_back() -> None:
    mask = random_mask(5, 64, 16, torch.Generator().manual_seed(0))
    assert mask.is_dropped.sum(1).tolist() == [48] * 5
    assert len({tuple(row) for row in mask.is_dropped.int().tolist()}) == 5  # one draw a sample
    tokens = torch.randn(5, 64, 3)
    assert torch.equal(mask.order.gather(1, mask.restore), torch.arange(64).expand(5, -1))
    filled = mask.fill(mask.take(tokens), torch.zeros(3))
    wanted = tokens.masked_fill(mask.is_dropped[:, :, None], 0)
    assert torch.equal(filled, wanted)
    assert torch.equal(mask.take(tokens, "drop"), tokens.gather(
        1, mask.drop_ids[:, :, None].expand(-1, -1, 3)
    ))  # fmt: skip
    with pytest.raises(InvalidInputError, match="keep 1 to 64"):
        random_mask(1, 64, 0)


def model(**options) -> MaskedImageModel:
    torch.manual_seed(0)
    return MaskedImageModel(
        VisionTransformer(16, 2, 2, patch=4),
        PixelDecoder(16, 8, 1, 2, 48),
        PixelTarget(4),
        **options,
    )


def test_the_encoder_does_not_see_hidden_pixels() -> None:
    net, pictures = model(), torch.randn(2, 3, 16, 24)
    mask = random_mask(2, 24, 6, torch.Generator().manual_seed(0))
    tokens = patchify(pictures, 4)
    changed = torch.where(mask.is_dropped[:, :, None], torch.randn_like(tokens), tokens)
    other = unpatchify(changed, (4, 6), 4)
    assert torch.equal(net.encoder(pictures, mask), net.encoder(other, mask))
    assert net.encoder(pictures, mask).shape == (2, 7, 16)
    assert not torch.equal(net.encoder(pictures), net.encoder(other))
    inside = model(placeholder=True)
    seen = [inside.encoder(x, mask, inside.placeholder) for x in (pictures, other)]
    assert torch.equal(*seen) and seen[0].shape == (2, 25, 16)
    assert inside(pictures, mask).shape == (2, 24, 48)


def test_the_target_is_normalised_within_each_patch() -> None:
    target = PixelTarget(4)(torch.randn(2, 3, 8, 8) * 5 + 3)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 4))


def test_painting_with_what_a_model_does_not_know_must_be_asked_for() -> None:
    pictures = torch.rand(1, 3, 8, 8)
    mask = random_mask(1, 4, 1, torch.Generator().manual_seed(0))
    perfect = PixelTarget(4)(pictures)
    with pytest.raises(InvalidInputError, match="leak=True"):
        painted(pictures, perfect, mask, PixelTarget(4))
    whole = painted(pictures, perfect, mask, PixelTarget(4), leak=True)
    torch.testing.assert_close(whole, pictures)
    raw = PixelTarget(4, norm=False)
    grey = painted(pictures, torch.zeros(1, 4, 48), mask, raw)
    assert (grey == 0).sum() >= 3 * 48
    assert torch.equal(
        patchify(grey, 4)[0, mask.keep_ids[0]], patchify(pictures, 4)[0, mask.keep_ids[0]]
    )
