"""MEGABYTE: what each byte sees, both caches, what it costs, and a user's way through it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import isthmus
from isthmus.cli.main import main
from isthmus.decoding.patch_target import PatchTarget, written
from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError
from isthmus.laws.opcount import count
from isthmus.metrics.bits import bits_per_byte
from isthmus.models.byte_patches import BytePatches, PatchSizes, by_place, judged, nats_of
from isthmus.signals.tokenizer import FIRST_BYTE, byte_tokenizer, stream
from isthmus.systems.text.megabyte import Megabyte, PatchLearner, Settings, arms
from isthmus.testing import check_target, check_trained
from isthmus.training.data import Data, read
from isthmus.training.loop import Plan
from isthmus.training.system import train

BASE = PatchSizes(4, 8, 2, 2, 16, 2, 2, max_length=64, vocab_size=19)
VARIANTS = [
    replace(BASE, patch_size=p, rotary=rotary, kernels=kernels, overlap=overlap)
    for p, rotary, kernels, overlap in (
        (4, False, (), 0),
        (4, True, (3, 5, 7), 2),
        (4, False, (3, 5, 7), 4),
        (2, True, (), 1),
        (1, True, (3,), 1),
        (1, False, (), 0),
        (64, True, (), 0),
    )
] + [replace(BASE, global_model=False, rotary=True), replace(BASE, patch_size=1, local_layers=0)]


def network(sizes: PatchSizes) -> BytePatches:
    torch.manual_seed(1)
    made = BytePatches(sizes).double().eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made


@pytest.mark.parametrize("sizes", VARIANTS, ids=range(len(VARIANTS)))
@torch.no_grad()
def test_a_byte_is_seen_by_later_ones_only(sizes):
    """The classic error is one patch told of itself; every place is perturbed, T no multiple of P.

    A place sees everything before it, but without the global model its own patch alone.
    """
    made, length = network(sizes), 23
    ids = torch.randint(0, 19, (1, length))
    changed = ids.repeat(length, 1)
    changed.diagonal().copy_((ids[0] + 1) % 19)
    moved = (made(changed) - made(ids)).abs().amax(-1) > 1e-9  # [changed, seen at]
    place = torch.arange(length)
    wanted = place[:, None] < place
    if not sizes.global_model:
        wanted &= place[:, None] // 4 == place // 4
    assert torch.equal(moved, wanted)


@pytest.mark.parametrize("sizes", VARIANTS, ids=range(len(VARIANTS)))
@torch.no_grad()
def test_both_caches_say_what_one_forward_says(sizes):
    made = network(sizes)
    assert check_target(PatchTarget(made)) < 1e-12
    ids = torch.randint(0, 19, (2, 23))
    session, found = PatchTarget(made).session(2), []
    for token in ids[:, :-1].unbind(1):
        found.append(session.score(TokenTree.root(token)).logits)
        session.keep(torch.zeros(2, 1, dtype=torch.int64))
    torch.testing.assert_close(torch.cat(found, 1), made(ids)[:, 1:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_long_rows_of_unlike_length_fit_their_caches():
    made = network(replace(BASE, max_length=400, rotary=True))
    for first in range(96, 104):
        rows = [torch.randint(0, 19, (n,)) for n in (first + 2, first)]
        session = PatchTarget(made).session(2)
        session.prefill(rows)
        tree = TokenTree(torch.randint(0, 19, (2, 2)), chain_topology(2))
        got = session.score(tree).logits
        for row, tokens, found in zip(rows, tree.tokens, got, strict=True):
            whole = torch.cat([row, tokens, tokens[:1]])[None]
            torch.testing.assert_close(made(whole)[0, -2:], found, rtol=0, atol=1e-10)


def test_a_first_step_moves_more_than_the_pads():
    """A pad of zeros had a gradient so large that clipping it left nothing for the rest."""
    torch.manual_seed(0)
    made = Megabyte(replace(TINY, local_layers=2)).module
    made(torch.randint(0, 256, (2, 16))).logsumexp(-1).sum().backward()
    norms = {name: float(p.grad.norm()) for name, p in made.named_parameters()}
    pads = norms.pop("global_pad"), norms.pop("local_pad")
    assert min(pads) > 0 and max(pads) < max(norms.values())


def test_what_a_byte_target_refuses():
    target = PatchTarget(network(BASE))
    session = target.session(1)
    with pytest.raises(InvalidInputError, match="chains only"):
        session.score(TokenTree(torch.zeros(1, 3, dtype=torch.int64), Topology.of([-1, 0, 0])))
    with pytest.raises(InvalidInputError, match="no encoder inputs"):
        target.session(1, input_ids=torch.zeros(1, 1))
    with pytest.raises(InvalidInputError, match="1 to 64 bytes"):
        network(BASE)(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_length": 30}, "multiple of patch_size"),
        ({"overlap": 5}, "between 0 and patch_size"),
        ({"global_heads": 3}, "even parts"),
        ({"patch_size": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_go_together(change, says):
    with pytest.raises(InvalidInputError, match=says):
        replace(BASE, **change)


@pytest.mark.parametrize("sizes", [*VARIANTS, *arms(True).values()])
def test_flops_are_the_formula_s(sizes):
    """Counted on a forward here, and on forward and backward by torch's own counter."""
    length = sizes.max_length // 2
    made, ids = BytePatches(sizes), torch.zeros(2, length, dtype=torch.int64)
    whole = sizes.patch_size <= length
    convolved = sizes.kernels and sizes.global_model  # all but the last patch are
    counted = count(made, ids).flops / ids.numel()
    assert counted == pytest.approx(sizes.flops(length), rel=0.05 if convolved else 1e-9)
    if whole and not convolved and sizes.global_model:
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            made(ids).sum().backward()
        trained = counter.get_total_flops() / ids.numel()
        assert trained == pytest.approx(3 * sizes.flops(length), rel=0.02)


def test_the_global_model_costs_less_the_longer_the_patch():
    """By hand: width 4, one layer, T 8. P = 2: (24 16 + 4 4 4) / 2 a byte across, 0 inside."""
    sizes = PatchSizes(2, 2, 1, 1, 4, 0, 1, max_length=8, vocab_size=10)
    assert sizes.flops(8) == (24 * 16 + 4 * 4 * 4) / 2 + 2 * 2 * 4 + 2 * 4 * 10
    assert sizes.flops(7) == pytest.approx(sizes.flops(8) * 8 / 7)  # the last patch is filled up


@torch.no_grad()
def test_strided_inference_takes_first_halves():
    made = network(replace(BASE, rotary=True))
    ids = torch.randint(0, 19, (2, 16))
    once, twice = nats_of(made, ids), nats_of(made, ids, strided=True)
    later = nats_of(made, ids[:, 2:])
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 8, 9, 12, 13])
    torch.testing.assert_close(twice[:, kept], once[:, kept])
    moved = torch.tensor([6, 7, 10, 11, 14, 15])
    torch.testing.assert_close(twice[:, moved], later[:, moved - 2])
    short = network(replace(BASE, patch_size=1))
    assert torch.equal(nats_of(short, ids, strided=True), nats_of(short, ids))


@torch.no_grad()
def test_a_long_text_is_judged_byte_by_byte_without_padding():
    made = network(replace(BASE, max_length=8))
    ids = torch.randint(0, 19, (21,))
    pieces = [nats_of(made, p[None])[0] for p in ids.split(8)]
    torch.testing.assert_close(judged(made, ids), torch.cat(pieces))
    assert len(judged(made, ids[:3])) == 3
    assert by_place(torch.arange(6.0), 2, 3) == by_place(torch.tensor([0.0, 1, 2, 3, 4, 5]), 2, 3)


def test_bytes_of_texts():
    tokenizer, text = byte_tokenizer(), "naïve 日本 🙂\n\tx"
    ids = tokenizer(text).input_ids
    assert bytes(i - FIRST_BYTE for i in ids) == text.encode() and tokenizer.decode(ids) == text
    assert stream([text]).tolist() == [*ids, tokenizer.eos_token_id]
    with pytest.raises(InvalidInputError, match="UTF-8"):
        stream(["good", "half a character \ud83d here"])


TINY = Settings(4, 8, 1, 2, 16, 1, 2, max_length=32, rotary=True, batch_size=8)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for n in range(4):
        (folder / f"{n}.txt").write_text("to be or not to be, that is the question. " * 12)
    return folder


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    plan = Plan(150, learning_rate=2e-2, validate_every=75)
    system = train(Megabyte, read("texts", [texts]), TINY, plan, out=out)
    found = system.record["validation"]
    assert found[-1]["bits_per_byte"] < 1.0  # of 8 before it has learnt
    assert found[-1].keys() >= {"first_in_patch", "last_in_patch"}
    return out


def test_it_goes_on_with_a_text_like_the_plain_loop(folder, capsys):
    system = Megabyte.from_pretrained(folder)
    assert main(["run", str(folder), "to be or ", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["text"] == "to be or " + said["continuation"] and said["bytes"] == 16
    prompt = stream(["to be or "])[:-1].long()
    plain = written(system.module, prompt, len(prompt) + 16)
    assert byte_tokenizer().decode(plain) == said["text"]
    # the network without any cache
    ids = prompt
    for _ in range(16):
        nothing = torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            logits = system.module(torch.cat([ids, nothing])[None])
        ids = torch.cat([ids, logits[0, -1].argmax()[None]])
    assert torch.equal(ids, plain)
    long = system.run("x" * 1000)
    assert long.record["read"] == 16 and long.record["bytes"] <= 16
    assert system.bits("to be or not to be") < system.bits("qqqqqqqqqqqqqqqqqq")


def test_the_engine_s_features_work_on_it(folder, capsys):
    model = isthmus.load(folder)
    plain = model.generate("not ", max_new_tokens=20, drafter="none")
    drafted = model.generate("not ", max_new_tokens=20, drafter="prompt-lookup")
    assert plain.tokens == drafted.tokens
    many = model.generate(["not ", "to be or not t"], max_new_tokens=9, drafter="none")
    assert many[0].tokens == plain.tokens[:9]
    held = model.generate("not ", max_new_tokens=20, constraint={"enum": ["yes", "no"]})
    assert json.loads(held.text) in ("yes", "no")
    assert model.generate("not ", max_new_tokens=20, stop=["o"]).text.count("o") == 0
    assert main(["generate", "-m", str(folder), "-d", "prompt-lookup", "-n", "9", "not "]) == 0
    assert capsys.readouterr().out.rstrip("\n") == byte_tokenizer().decode(plain.tokens[:9])
    beam = model.generate("not ", max_new_tokens=6, strategy="beam")
    assert len(beam.tokens) <= 6


def test_bad_input(folder, tmp_path, capsys):
    with pytest.raises(InvalidInputError, match="empty"):
        Megabyte.from_pretrained(folder).run("")
    with pytest.raises(InvalidInputError, match="of its own"):
        isthmus.load(folder, dtype="bfloat16")
    with pytest.raises(InvalidInputError, match="draft model"):
        isthmus.load(folder, draft_model="pycode-s")
    (tmp_path / "latin.txt").write_bytes(b"first line\ncaf\xe9\n")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BrokenFileError, match=r"latin.txt, line 2: not UTF-8"):
        read("texts", [tmp_path / "latin.txt"])
    assert main(["train", "megabyte", "--data", str(tmp_path / "empty.txt"), "-o", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(InvalidInputError, match="fewer than one piece of 32"):
        PatchLearner(Megabyte(TINY), Data(["short"], ["short"]), 0)
    weights = folder / "model.safetensors"
    held = weights.read_bytes()
    weights.write_bytes(held[:-9])
    with pytest.raises(IsthmusError, match="cut short"):
        isthmus.load(folder)
    weights.write_bytes(held)


def test_every_extra_keeps_the_contract(texts):
    extras = replace(TINY, rotary=False, kernels=(3, 5, 7), overlap=2, strided=True)
    check_trained(Megabyte, read("texts", [texts]), settings=extras)


def test_a_text_without_bytes_has_no_bits():
    with pytest.raises(InvalidInputError, match="without bytes"):
        bits_per_byte(1.0, 0)


def test_pieces_follow_from_seed_and_number(texts):
    data = read("texts", [texts])
    learner = Megabyte(TINY).learner(data, Plan(1))
    known = stream(data.train).tolist()
    batch = learner.batch(5)
    assert batch.shape == (8, 32) and not torch.equal(batch, learner.batch(6))
    first = batch[0].tolist()
    assert any(known[i : i + 32] == first for i in range(len(known)))
    assert learner.loss(batch).total.item() == pytest.approx(
        F.cross_entropy(learner.module(batch).flatten(0, 1), batch.flatten()).item() * 256, rel=1e-5
    )


def test_arms_differ_by_the_idea_alone():
    all_of = arms(True)
    ours, flat = all_of["ours"], all_of["flat"]
    assert (flat.patch_size, flat.byte_size, flat.global_layers, flat.local_layers) == (1, 96, 3, 0)
    length = ours.max_length
    assert abs(ours.flops(length) / flat.flops(length) - 1) < 0.02
    for name, other in itertools.islice(all_of.items(), 2, None):
        same = {k for k in vars(ours) if getattr(ours, k) == getattr(other, k)}
        changed = {"patch_size", "byte_size", "overlap"} if "one" in name else {"global_model"}
        assert vars(ours).keys() - same == changed, name
        assert other.global_size == ours.global_size
