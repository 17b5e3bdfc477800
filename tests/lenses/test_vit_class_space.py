"""Class space: identities on a head made by hand, gradients by another way, refusals."""

import pytest
import torch
import transformers as tf
from torch import nn

from isthmus.claims import Ruler
from isthmus.errors import InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.lenses.class_space import gaps_by_chance, identifiability, object_gap
from isthmus.lenses.trace import Intervene, Site, Trace
from isthmus.models.picture_classifier import Eye
from isthmus.signals.image import write_image
from isthmus.systems.lenses.vit_class_space import Settings, VitClassSpace, claim
from isthmus.testing import check_lens
from isthmus.workbench import shape_names


@pytest.fixture(scope="module")
def eye():
    shown = shape_names.shape_model(shape_names.tiny())
    with torch.no_grad():  # nearly untrained weights say nearly nothing
        for p in shown.parameters():
            p.mul_(3) if p.ndim == 2 else None
    return Eye(shown, tuple(shown.names), shown.side)


def hub_vit():
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.ViTForImageClassification(config).eval()


def pixels(side=16, count=3):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_ranks_share_ties():
    logits = torch.tensor([[[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])
    told = [identifiability(logits, torch.tensor([c]))[0].tolist() for c in range(4)]
    assert told == [[1.0, 0.625], [0.5, 0.625], [0.75, 0.625], [0.25, 0.625]]


def test_the_gap_leaves_the_class_token_out_and_shuffles_find_none():
    values = torch.zeros(2, 30, 10)
    values[:, :, 0] = 9.0  # the class token
    where = torch.zeros(30, 9, dtype=torch.bool)
    where[:, :3] = True
    values[1, :, 1:4] = 0.5
    assert object_gap(values, where).tolist() == [0.0, 0.5]
    assert max(gaps_by_chance(values, where, 50)) < 0.25


def test_the_last_class_token_reads_as_the_model_writes(eye):
    for inside, given in ((eye.model, pixels(48)), (hub_vit(), pixels())):
        lens = VitClassSpace()
        found = lens.read(inside, given)
        with torch.no_grad():
            logits = inside(pixel_values=given).logits
        assert torch.allclose(found.logits[-1, :, 0], logits, atol=1e-5)
        assert found.error < 1e-5 and max(found.sums) < 1e-5
        target = torch.tensor([1, 0, 3])
        rank = (logits > logits.gather(1, target[:, None])).sum(1)
        got = identifiability(found.logits, target)[-1, :, 0]
        assert got.tolist() == (1 - rank / logits.shape[1]).tolist()
        blind = VitClassSpace(Settings(project=False)).read(inside, given)
        assert not torch.allclose(blind.logits, found.logits) and blind.error < 1e-5
        assert not any(m._forward_hooks for m in inside.modules())


def test_relevance_is_what_small_changes_of_the_pattern_do():
    inside, given = hub_vit().double(), pixels(count=1).double()
    lens = VitClassSpace()
    wiring = lens.know(inside, given)
    got = lens.relevance(inside, given, torch.tensor([2]), wiring)[0]
    norm, rows, _ = lens.classes(wiring)
    total = torch.zeros(16, dtype=torch.float64)
    for i, path in enumerate(wiring.sites.stacks[""].layers):
        attention = wiring.layers[i].heads
        seen = wiring.trace({"pixel_values": given})[0]
        pattern, step = seen[f"pattern.{i}"], 1e-6
        value = attention.values(
            wiring.model.get_submodule(attention.source.module)(_read(wiring, seen, i))
        )
        for h in range(4):
            for s in range(1, 17):
                added = step * value[:, s, h]  # what a little more weight on s adds to head h

                def change(mixed, h=h, added=added):
                    mixed = mixed.clone()
                    mixed[:, 0, 8 * h : 8 * h + 8] += added
                    return mixed

                outs = []
                for how in ({}, {attention.mixed: change}):
                    with Intervene(inside, how), torch.no_grad():
                        outs.append(_class_of(inside, path, given, norm, rows[2]))
                slope = (outs[1] - outs[0]) / step
                total[s - 1] += (slope * pattern[0, h, 0, s]).clamp(min=0)
    assert torch.allclose(got, total, atol=1e-5, rtol=1e-3)
    plain = VitClassSpace(Settings(project=False)).relevance(
        inside, given, torch.tensor([2]), wiring
    )
    seen = wiring.trace({"pixel_values": given})[0]
    want = sum(seen[f"pattern.{i}"][0, :, 0, 1:].sum(0) for i in range(2))
    assert torch.allclose(plain[0], want)


def _read(wiring, seen, i):
    """What the values of layer i are made from."""
    site = Site(wiring.layers[i].heads.source.module, "in")
    with torch.no_grad(), Trace(wiring.model, {"x": site}) as again:
        wiring.model(pixel_values=pixels(count=1).double())
    return again["x"]


def _class_of(inside, path, given, norm, row):
    with Trace(inside, {"x": Site(path)}) as seen:
        inside(pixel_values=given)
    return float(norm(seen["x"][:, 0]) @ row)


def test_the_contract_pictures_and_files(eye, tmp_path):
    lens = VitClassSpace()
    check_lens(lens, eye, "1")
    found = lens.explain(eye, "1")
    page = found.html()
    assert page.count("<figure>") == 6 and "data:image/png;base64," in page
    write_image(tmp_path / "a.png", shape_names.shapes(2).pictures[1])
    again = lens.explain(eye, str(tmp_path / "a.png"))
    assert (again.arrays[next(iter(again.arrays))].values == found.arrays[
        next(iter(found.arrays))
    ].values).all()  # fmt: skip
    assert VitClassSpace(Settings(block=1)).explain(eye, "1").params["block"] == 1


def test_what_cannot_be_read_is_refused(eye):
    with pytest.raises(InvalidInputError, match="no picture file"):
        VitClassSpace().explain(eye, "nowhere.png")
    with pytest.raises(InvalidInputError, match="none of 1 to 2"):
        VitClassSpace(Settings(block=9)).explain(eye, "1")
    handle = eye.model.head.register_forward_hook(lambda m, a, out: out.roll(1, -1))
    with pytest.raises(MismatchError, match="last class token"):
        VitClassSpace().explain(eye, "1")
    handle.remove()
    inside = hub_vit()
    inside.classifier = nn.Sequential(inside.classifier, nn.Tanh(), nn.Linear(5, 5))
    with pytest.raises(UnsupportedModelError, match=r"not read a class token.*tanh, classifier\.2"):
        VitClassSpace().know(inside, pixels())


def test_the_claim_runs_and_its_identities_hold():
    found = claim(Ruler(), "test")
    assert [gate.passed for gate in found.gates[:2]] == [True, True]
