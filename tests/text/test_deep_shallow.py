"""Deep encoder, shallow decoder: where layers run, what is distilled, and mask-predict."""

import dataclasses

import pytest
import torch

import isthmus
from decoding.tiny import facade
from isthmus.decoding.fast import best_target
from isthmus.decoding.masked import mask_predict
from isthmus.decoding.model import Model
from isthmus.errors import InvalidInputError
from isthmus.models.encoder_decoder import shifted
from isthmus.models.masked_translation import MaskedTranslation
from isthmus.systems.text.deep_shallow import DeepShallow, Settings, network_config
from isthmus.training.data import Data, Pair
from isthmus.training.loop import Plan, Trainer
from isthmus.training.mask_predict import MaskedLearner, fill_in
from isthmus.training.sequence_distillation import sequence_distillation
from isthmus.training.system import train

TEST = DeepShallow.scales["test"].settings


@pytest.fixture(scope="module")
def data() -> Data[Pair]:
    records = [Pair(f"{a} and {b}", str(a + b)) for a in range(12) for b in range(12)]
    return Data(records[8:], records[:8], "sums")


@pytest.fixture(scope="module")
def system(data) -> DeepShallow:
    return train(DeepShallow, data, TEST, Plan(80, learning_rate=5e-3, validate_every=80))


def test_the_idea_off_halves_the_layers_and_a_half_without_any_is_refused():
    assert dataclasses.replace(TEST, encoder_layers=5, shallow=False).depths == (3, 3)
    assert network_config(Settings(shallow=False), 100).decoder_layers == 6
    with pytest.raises(InvalidInputError, match="12 encoder and 0 decoder layers"):
        Settings(decoder_layers=0)


@pytest.mark.parametrize(("encoder", "decoder"), [(4, 1), (2, 3)])
def test_encoder_layers_run_once_and_decoder_layers_at_every_token(system, encoder, decoder):
    chosen = dataclasses.replace(TEST, encoder_layers=encoder, decoder_layers=decoder)
    twin = DeepShallow.network(chosen, len(system.tokenizer)).eval().to_hf()
    calls = {"encoder": 0, "decoder": 0}

    def count(side):
        def hook(*_):
            calls[side] += 1

        return hook

    model = Model(twin, system.tokenizer, fast=False)
    for side in calls:
        for layer in getattr(twin.model, side).layers:
            layer.register_forward_hook(count(side))
    model.generate("3 and 4", max_new_tokens=7, drafter="none", ignore_end=True)
    assert calls == {"encoder": encoder, "decoder": 7 * decoder}


def test_cached_decoding_equals_full_decoding(system):
    source = torch.tensor([system.tokenizer("11 and 7").input_ids])
    text = torch.zeros(1, 0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(10):  # the whole prefix again at every step
            ahead = torch.nn.functional.pad(text, (0, 1))
            logits = system.module(source, shifted(ahead, 0))
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    ours = system.model.generate(source[0], max_new_tokens=10, drafter="none", ignore_end=True)
    assert ours.tokens == text[0].tolist()


def test_a_student_learns_what_the_teacher_writes(system, data, tmp_path):
    repeated = Data([*data.train, data.train[0]], data.valid, "sums")
    teacher = Model(best_target(system.module.to_hf()), system.tokenizer)
    found = sequence_distillation(teacher, repeated, beams=3, max_new_tokens=6, batch_size=50)
    assert found.valid == data.valid and found.name == "sums, distilled"
    assert [p.source for p in found.train] == [p.source for p in repeated.train]
    assert found.train[0] == found.train[-1] and found.train != repeated.train
    for pair in found.train[::20]:
        alone = teacher.generate(pair.source, strategy="beam", beams=3, max_new_tokens=6)
        assert alone.finish_reason == "stop" and pair.target == alone.text
    greedy = sequence_distillation(teacher, data, beams=1, max_new_tokens=6)
    alone = teacher.generate(data.train[3].source, drafter="none", max_new_tokens=6)
    assert greedy.train[3].target == alone.text
    # what does not end is no translation
    assert sequence_distillation(teacher, data, beams=2, max_new_tokens=1).train == data.train

    system.save_pretrained(tmp_path / "teacher")
    settings = dataclasses.replace(TEST, teacher=str(tmp_path / "teacher"), beams=2)
    torch.manual_seed(1)
    student = DeepShallow.untrained(settings, data)
    learnt = student.learner(data, Plan(2))
    taught = isthmus.load(tmp_path / "teacher", dtype="float32")
    wanted = sequence_distillation(taught, data, beams=2, max_new_tokens=127).train
    ids = [student.tokenizer(p.target).input_ids for p in wanted]
    assert [target.tolist() for _, target in learnt.train] == ids
    assert learnt.identity["data"] != data.fingerprint
    nobody = dataclasses.replace(TEST, teacher=str(tmp_path / "nobody"))
    with pytest.raises(isthmus.errors.IsthmusError, match="nobody"):
        DeepShallow.untrained(nobody, data).learner(data, Plan(2))


def test_only_encoder_decoders_teach(system, data):
    with pytest.raises(InvalidInputError, match="at least 1, got 0"):
        sequence_distillation(system.model, data, beams=0)
    with pytest.raises(InvalidInputError, match="must be an encoder-decoder"):
        sequence_distillation(facade("Llama", "float32"), data)


def test_mask_predict_by_hand():
    # of 3 places the surest is written for good in the first pass, and so on; the fourth is padding
    seen = []
    surety = torch.tensor([[1.0, 3.0, 2.0, 0.0]])

    def fill(tokens):
        masked = tokens == 9
        seen.append(masked[0].tolist())
        logits = torch.zeros(1, 4, 10)
        logits[..., 1:8] = torch.eye(7)[len(seen) - 1] * surety[..., None] * 5
        logits[..., 9] = 100.0  # the mask itself is never written
        return logits

    places = torch.tensor([[True, True, True, False]])
    tokens, sure = mask_predict(fill, places, 3, mask_token=9)
    T, F = True, False  # noqa: N806
    assert seen == [[T, T, T, F], [T, F, T, F], [T, F, F, F]]
    assert tokens.tolist() == [[3, 1, 2, 0]]
    by_hand = sum(torch.log_softmax(torch.tensor([5 * s, *[0.0] * 8]), 0)[0] for s in (1, 3, 2)) / 3
    assert sure.item() == pytest.approx(float(by_hand), abs=1e-6)
    with pytest.raises(InvalidInputError, match="at least 1 pass"):
        mask_predict(fill, places, 0, mask_token=9)


def test_the_masked_decoder_sees_both_sides_and_no_padding():
    torch.manual_seed(0)
    network = MaskedTranslation(network_config(TEST, 40)).eval()
    source = torch.tensor([[5, 6, 7, 1]])
    memory = network.encode(source)
    target = torch.tensor([[3, network.mask_token, 4, 1]])
    first = network.fill(target, memory)
    other = network.fill(torch.tensor([[3, network.mask_token, 8, 1]]), memory)
    assert (first[0, 1] - other[0, 1]).abs().max() > 1e-3
    padded = network.fill(torch.nn.functional.pad(target, (0, 3)), memory)
    assert torch.allclose(padded[:, :4], first, atol=1e-5)
    wide = network.encode(torch.nn.functional.pad(source, (0, 3)))
    assert torch.allclose(network.lengths(wide), network.lengths(memory), atol=1e-5)


def test_mask_predict_learns_to_copy():
    letters = "01234567"  # a token each
    records = [Pair(a + b + c, a + b + c) for a in letters for b in letters for c in letters]
    data = Data(records[32:], records[:32], "copies")
    torch.manual_seed(0)
    tokenizer = DeepShallow.untrained(TEST, data).tokenizer
    network = MaskedTranslation(network_config(TEST, len(tokenizer)))
    learner = MaskedLearner(network, tokenizer, data, {}, tokens=512)
    with torch.no_grad():
        assert learner.validate() == learner.validate()
    state = Trainer(learner, Plan(300, learning_rate=5e-3, validate_every=150)).run()
    first, last = state.curve
    assert last["loss"] < first["loss"] < 3 and last["exact"] >= 0.5
    answers = fill_in(network.eval(), tokenizer, [p.source for p in data.valid], 4, batch_size=5)
    right = sum(a == p.target for a, p in zip(answers, data.valid, strict=True))
    assert right / len(answers) == last["exact"]
