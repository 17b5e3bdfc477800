"""SpecAugment: how much is masked, and where."""

import torch

from isthmus.nn.spec_augment import SpecAugment


def test_masks_stay_within_length_and_size() -> None:
    augment = SpecAugment(freq_masks=2, freq_width=8, time_masks=3, time_share=0.1)
    frames = torch.tensor([100, 40, 5])
    widths, taken = set(), torch.zeros(3)
    for seed in range(200):
        x = augment(torch.ones(3, 20, 100), frames, torch.Generator().manual_seed(seed))
        gone = x == 0
        bands, times = gone.all(2), gone.all(1)
        assert torch.equal(gone, bands[:, :, None] | times[:, None])
        for b, count in enumerate(frames.tolist()):
            assert not times[b, count:].any()
            assert times[b].sum() <= 3 * int(0.1 * count) and bands[b].sum() <= 16
        widths.add(int(bands[0].sum()))
        taken += times.float().sum(1)
    assert {0, 8} <= widths and max(widths) > 8
    # U[0, 10] three times over 100 frames: a little under 15 because they overlap
    assert 12 < taken[0] / 200 < 15 and taken[2] == 0
    assert not torch.equal(bands[0], bands[1])


def test_the_mean_of_what_is_valid_fills() -> None:
    x = torch.zeros(1, 2, 10)
    x[:, :, :4] = torch.tensor([1.0, 2.0, 3.0, 6.0])
    x[:, :, 4:] = 99.0
    augment = SpecAugment(freq_masks=1, freq_width=2, time_masks=0, fill_mean=True)
    found = {float(v) for s in range(9) for v in augment(
        x, torch.tensor([4]), torch.Generator().manual_seed(s))[0, :, 0]}  # fmt: skip
    assert found == {1.0, 3.0}
