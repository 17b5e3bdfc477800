"""Vision systems: what they learn, their files, their commands, and transformers' twin of MAE."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf

from isthmus.cli.main import main
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.nn.masking import mask_by_noise
from isthmus.signals.image import MaskedFiles, read_image, read_mask, write_image, write_mask
from isthmus.systems.vision import mae
from isthmus.systems.vision.deeplabv3plus import Deeplabv3plus
from isthmus.systems.vision.mae import Mae
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.pictures import normalised
from isthmus.training.system import train
from isthmus.workbench.scene_masks import NAMED, SEGMENTS, THIN, masked_scenes

TINY = replace(Deeplabv3plus.scales["test"].settings, names=("dark", "light"), side=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Dark pictures with a light rectangle each, and their masks."""
    generator = torch.Generator().manual_seed(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(24):
        mask = torch.zeros(32, 48, dtype=torch.uint8)
        top, left = torch.randint(0, 16, (2,), generator=generator).tolist()
        mask[top : top + 16, left : left + 20] = 1
        noise = torch.randint(0, 80, (3, 32, 48), generator=generator)
        picture = (noise + 120 * mask).to(torch.uint8)
        write_image(tmp_path / "images" / f"{i:02}.png", picture)
        write_mask(tmp_path / "masks" / f"{i:02}.png", mask)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_picture_becomes_a_mask_from_the_command_line(folder, tmp_path, capsys):
    out, mask = tmp_path / "out", tmp_path / "mask.png"
    words = ["--scale", "test", "--steps", "60", "--set", 'names=["dark","light"]']
    words += ["--set", "side=32", "--set", "batch_size=4"]
    data = ["--data", str(folder)]
    assert call(capsys, "train", "deeplabv3plus", "-o", str(out), *words, *data)[0] == 0
    picture = str(folder / "images" / "05.png")
    code, said, _ = call(capsys, "run", str(out), picture, "-o", str(mask), "--json")
    record = json.loads(said)
    assert code == 0 and record["shares"].keys() <= {"dark", "light"}
    found, truth = read_mask(mask), read_mask(folder / "masks" / "05.png")
    assert found.shape == truth.shape == (32, 48)
    assert (found == truth).float().mean() > 0.9
    assert record["shares"]["light"] == pytest.approx(float((found == 1).float().mean()), abs=1e-3)
    for given, why in (("none.png", "is not there"), (str(out / "isthmus.json"), "no picture")):
        code, _, error = call(capsys, "run", str(out), given)
        assert code == 2 and why in error and error.count("\n") == 1
    code, _, error = call(capsys, "run", str(out), picture, "-o", str(tmp_path / "mask.jpg"))
    assert code == 2 and ".png" in error


def test_classes_out_of_range_name_the_picture(folder):
    path = folder / "masks" / "05.png"
    write_mask(path, torch.full((32, 48), 3))
    record = MaskedFiles(folder / "images" / "05.png", path)
    data = Data([record, record], [record])
    with pytest.raises(BrokenFileError, match=r"05\.png.* has class 3; there are 2 classes"):
        Deeplabv3plus(TINY).learner(data, Plan(1))
    with pytest.raises(InvalidInputError, match="batch_size must be 2"):
        replace(TINY, batch_size=1)


def test_unlabelled_pixels_teach_nothing(folder):
    record = MaskedFiles(folder / "images" / "05.png", folder / "masks" / "05.png")
    system = Deeplabv3plus(TINY)
    learner = system.learner(Data([record, record], [record]), Plan(1))
    pictures, masks = learner.batch(0)
    blank = torch.where(torch.rand(masks.shape) < 0.5, 255, masks)
    loss = learner.loss((pictures, blank))
    logits = system.module(normalised(pictures))
    law = logits.log_softmax(1).gather(1, masks[:, None])[:, 0]
    torch.testing.assert_close(loss.total, -law[blank != 255].sum())
    assert loss.weight == (blank != 255).sum() < masks.numel()


def test_a_network_written_and_read_says_the_same_at_any_size(tmp_path):
    system = Deeplabv3plus(replace(TINY, eval_scales=(0.75, 1.0), eval_flip=True))
    system.save_pretrained(tmp_path / "net")
    again = Deeplabv3plus.from_pretrained(tmp_path / "net")
    pictures = torch.randint(0, 256, (2, 3, 37, 53), dtype=torch.uint8)
    assert again.settings == system.settings
    assert torch.equal(again.predict(pictures), system.predict(pictures))
    law = system.probabilities(torch.zeros(1, 3, 37, 53))
    torch.testing.assert_close(law.sum(1) / 4, torch.ones(1, 37, 53))
    mirrored = system.predict(pictures.flip(-1)).flip(-1)  # both ways are averaged
    assert (mirrored == system.predict(pictures)).float().mean() > 0.99


def test_scenes_are_a_function_of_their_number():
    first, second = masked_scenes(2)
    assert torch.equal(first.picture(), masked_scenes(1)[0].picture())
    assert not torch.equal(first.picture(), second.picture())
    assert not torch.equal(first.mask(), masked_scenes(1, "held-out")[0].mask())
    with pytest.raises(InvalidInputError, match="count of 1 or more"):
        masked_scenes(0)
    for spec in (SEGMENTS, NAMED):
        masks = [scene.mask() for scene in masked_scenes(40, spec=spec)]
        assert all(mask.shape == (spec.side, spec.side) and mask.any() for mask in masks)
    thin = torch.tensor(THIN) + 1
    shown = [torch.isin(s.mask(), thin).any() for s in masked_scenes(100)]
    assert sum(map(int, shown)) >= 30
    for scene in masked_scenes(40, spec=NAMED):
        assert set(scene.mask().unique().tolist()) == {0, scene.name}


# MAE ------------------------------------------------------------------------------------------

SMALL = replace(Mae.scales["test"].settings, width=32, layers=2, decoder_width=16, decoder_layers=2)


def loss_of(system: Mae, pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    mask = mask_by_noise(noise, system.settings.kept)
    errors = system.module.errors(pictures, system.module(pictures, mask))
    return errors[mask.is_dropped].mean()


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_mae_is_transformers_twin_and_its_files_load_there(norm, tmp_path):
    torch.manual_seed(0)
    ours = Mae(replace(SMALL, norm_pixels=norm))
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = tf.ViTMAEForPreTraining.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pictures, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 64)
    wanted = theirs.eval()(pictures, noise=noise)
    torch.testing.assert_close(loss_of(ours, pictures, noise), wanted.loss)
    mask = mask_by_noise(noise, 16)
    torch.testing.assert_close(ours.module(pictures, mask), wanted.logits)
    assert torch.equal(mask.is_dropped, wanted.mask.bool())
    theirs.save_pretrained(tmp_path / "theirs")
    again = Mae.from_transformers(tmp_path / "theirs")
    assert again.settings == replace(ours.settings, area=(0.2, 1.0), batch_size=64)
    assert torch.equal(again.module(pictures, mask), ours.module(pictures, mask))
    with pytest.raises(BrokenFileError, match=r"config\.json cannot be read"):
        Mae.from_transformers(tmp_path)


def test_only_hidden_patches_teach():
    torch.manual_seed(0)
    system = Mae(SMALL)
    scenes = masked_scenes(8, spec=NAMED)
    learner = system.learner(Data(scenes, scenes), Plan(1))
    held: list[torch.Tensor] = []
    system.module.register_forward_hook(lambda m, a, out: (out.retain_grad(), held.append(out))[0])
    loss = learner.loss(learner.batch(0))
    loss.total.backward()
    taught = held[0].grad.abs().sum(-1) > 0
    assert taught.sum(1).tolist() == [48] * 8 and loss.weight == 8 * 48
    plain = Mae(replace(SMALL, mask_ratio=0.0))
    assert plain.learner(Data(scenes, scenes), Plan(1)).loss(learner.batch(0)).weight == 8 * 64
    assert mae.Settings().patches == 196 and mae.Settings().kept == 49
    with pytest.raises(InvalidInputError, match="mask_ratio"):
        replace(SMALL, mask_ratio=1.0)


def test_mae_learns_and_paints(tmp_path, capsys):
    """Flat pictures: hidden patches are known once one is seen."""
    (tmp_path / "in").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        colour = torch.randint(0, 256, (3, 1, 1), generator=generator, dtype=torch.uint8)
        write_image(tmp_path / "in" / f"{i:02}.png", colour.expand(3, 24, 24))
    out, painted = tmp_path / "out", tmp_path / "painted.png"
    sets = ["side=24", "norm_pixels=false", "width=32", "decoder_width=32"]
    words = ["train", "mae", "-o", str(out), "--scale", "test", "--steps", "150"]
    words += [w for s in sets for w in ("--set", s)] + ["--data", str(tmp_path / "in")]
    assert call(capsys, *words)[0] == 0
    code, said, _ = call(
        capsys, "run", str(out), str(tmp_path / "in" / "03.png"), "-o", str(painted)
    )
    assert code == 0 and "27 of 36 patches painted" in said and "borrow" not in said
    shown = read_image(painted)
    assert shown.shape == (3, 24, 72)
    true, _, ours = (shown[:, :, i : i + 24].float() for i in (0, 24, 48))
    assert (true - ours).abs().mean() < 30  # a constant grey is 64 away, on average
    told = json.loads((out / "isthmus.json").read_text())["training"]["validation"]
    assert told[-1]["squared_error"] < 0.3


def test_a_picture_that_borrows_the_true_brightness_says_so(tmp_path):
    write_image(tmp_path / "x.png", masked_scenes(1)[0].picture())
    answer = Mae(SMALL).run(str(tmp_path / "x.png"))
    assert "borrow" in answer.text and answer.record["hidden"] == 48


def test_the_seed_decides_what_is_learnt():
    scenes = masked_scenes(16, spec=NAMED)
    runs = [
        train(Mae, Data(scenes, scenes[:4]), SMALL, Plan(3, seed=seed, validate_every=3))
        for seed in (0, 0, 1)
    ]
    one, two, other = (next(iter(r.module.state_dict().values())) for r in runs)
    assert torch.equal(one, two) and not torch.equal(one, other)
