"""Every system keeps the contract of the role that it says it plays."""

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isthmus import registry, testing
from isthmus.codecs.base import TrainedCodec
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.table import TableTarget
from isthmus.decoding.trained import TrainedDrafter
from isthmus.errors import UnsupportedModelError
from isthmus.roles import Shape, Signal
from isthmus.training.system import TrainedSystem
from isthmus.workbench.data import data

sys.path.insert(0, str(Path(__file__).parent / "decoding"))
import tiny

SYSTEMS = [info.slug for info in registry.systems()]
TRAINED = [slug for slug in SYSTEMS if issubclass(registry.load(slug), TrainedDrafter)]
WHOLE = [slug for slug in SYSTEMS if issubclass(registry.load(slug), TrainedSystem)]

#: A trained drafter must keep the contract on two of these; the first has an encoder. Each system's
#: own tests compare its output on the others.
ARCHITECTURES = ("Bart", "Llama", "GPT2")
ENOUGH = 2

#: A token, a chain and a tree; each system's own tests ask for more.
SHAPES = (Shape(1, 1, 1), Shape(3, 3, 1), Shape(7, 3, 3))


def make(system: Any) -> Any:
    """A system as it comes, with a small draft model where it needs one."""
    draft_model = TableTarget(11, seed=4, sharpness=1.5, order=2)
    if issubclass(system, ModelDrafter):
        return system(draft_model)
    if any(p.default is p.empty for p in inspect.signature(system).parameters.values()):
        target = TableTarget(11, seed=3, sharpness=2.0, order=2)
        return system.for_model(
            SimpleNamespace(target=target, draft_model=draft_model, tokenizer=None)
        )
    return system()


@pytest.mark.parametrize("slug", [s for s in SYSTEMS if s not in (*TRAINED, *WHOLE)])
def test_contract(slug: str) -> None:
    system: Any = registry.load(slug)
    role = getattr(system, "role", None)
    assert isinstance(role, str), f"{system.__name__} must say its role"
    if "drafter" in inspect.signature(system).parameters:
        pytest.skip("it leads a trained drafter; its own tests run the contract")
    if role == "drafter":
        testing.check_drafter(lambda: make(system), shapes=SHAPES)
    elif role == "acceptance":
        testing.check_acceptance(make(system))
    elif role == "policy":
        testing.check_policy(make(system))
    elif role == "codec":
        pytest.skip("what it codes is its own; its tests run the contract")
    elif role == "lens":
        pytest.skip("what it looks into is its own; its tests run the contract")
    elif role == "surgery":
        pytest.skip("what it can work on is its own; its tests run the contract")
    else:
        assert not hasattr(testing, f"check_{role}"), f"run the contract of {role} here"


@pytest.mark.parametrize("slug", TRAINED)
def test_contract_of_a_trained_drafter(slug: str) -> None:
    """Untrained weights draft badly, and everything they draft must be put right."""
    system: Any = registry.load(slug)
    kept = []
    for name in ARCHITECTURES:
        target = tiny.target(name)
        try:
            drafter = system(target).double()
        except UnsupportedModelError:
            continue
        inputs = {"input_ids": torch.arange(3, 12).view(3, 3)} if target.encoder_decoder else None
        testing.check_drafter(lambda d=drafter: d, target=target, shapes=SHAPES[1:], inputs=inputs)
        kept.append(name)
        if len(kept) == ENOUGH:
            break
    assert len(kept) >= ENOUGH, f"{slug} works on {kept} only"


@pytest.mark.parametrize("slug", WHOLE)
def test_contract_of_a_trained_system(slug: str) -> None:
    system: Any = registry.load(slug)
    records = data(system.scales["test"].data, system.reads)
    few = replace(records, train=records.train[:60], valid=records.valid[:20])
    testing.check_trained(system, few)


@pytest.mark.parametrize("slug", [s for s in WHOLE if issubclass(registry.load(s), TrainedCodec)])
def test_contract_of_a_codec(slug: str) -> None:
    """Untrained weights make large files, and everything in them must come back all the same."""
    system: Any = registry.load(slug)
    scale = system.scales["test"]
    records = data(scale.data, system.reads)
    few = replace(records, train=records.train[:60], valid=records.valid[:20])
    torch.manual_seed(0)
    codec = system.untrained(scale.settings, few)
    codec.module.eval()
    testing.check_codec(codec, [lambda: signal(few.valid[0], codec)], mutations=100)


def signal(record: Any, codec: Any) -> Signal:
    """A record as a signal: a picture, a few of them, its file, or half a second of sound."""
    medium = codec.medium
    if medium == "bytes":
        data = torch.frombuffer(bytearray(codec.tokens.file(record.picture())), dtype=torch.uint8)
        return Signal({"medium": "bytes", "dtype": "uint8", "shape": [len(data)]}, [data])
    if medium == "image":
        pixels = record.pixels()
        info = {"medium": "image", "dtype": "uint8", "shape": list(pixels.shape)}
        return Signal(info, [pixels])
    if medium == "video":
        frames = record.frames()[:3]
        shape = list(frames.shape)
        info = {"medium": "video", "dtype": "uint8", "shape": shape, "rate": "25/1"}
        return Signal(info, [frames])
    assert medium == "audio", f"make a signal of {medium} here"
    sound = getattr(record, "clean", getattr(record, "sound", record)).at(16_000)[None, :8000]
    info = {"medium": "audio", "dtype": "float32", "shape": list(sound.shape), "rate_hz": 16_000}
    return Signal(info, [sound])


@pytest.mark.parametrize("slug", TRAINED)
def test_an_untrained_drafter_is_refused_by_name(slug: str) -> None:
    with pytest.raises(Exception, match=f"isthmus train {slug}"):
        tiny.facade("Llama").policy(slug)
