"""MatFormer: cuts are the prefixes, files load in transformers, decoding is the plain one's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf

import isthmus
from isthmus.claims import Ruler
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.models.elastic_decoder import ElasticDecoder
from isthmus.systems.surgery.matformer import Matformer, Settings, claim, staircases
from isthmus.training.data import Data
from isthmus.training.loop import Plan
from isthmus.training.system import train

TEXTS = ["def add(a, b):\n    return a + b\n" * 8, "for i in range(9):\n    print(i)\n" * 8]
SETTINGS = Settings(16, 3, 2, 32, vocab_size=280, length=16, batch_size=4)
DATA = Data(TEXTS * 4, TEXTS, "snippets")
PLAN = Plan(4, learning_rate=1e-2, validate_every=4)


@pytest.fixture(scope="module")
def system() -> Matformer:
    """A nested decoder of three layers that has learnt next to nothing, weights well apart."""
    torch.manual_seed(0)
    made = Matformer.untrained(SETTINGS, DATA)
    for p in made.module.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    made.module.eval()
    return made


IDS = torch.arange(3, 51).view(2, 24)


def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("widths", [4, 16, 32, (4, 8, 32), (5, 31, 1)])
def test_a_cut_is_the_prefix_bit_for_bit(system: Matformer, widths: int | tuple[int, ...]) -> None:
    with system.decoder.at(widths):
        wanted = logits(system.module)
    small = system.decoder.cut(widths)
    assert torch.equal(logits(small), wanted)
    each = system.decoder.each(widths)
    assert [m.mlp.up_proj.out_features for m in small.model.layers] == list(each)
    assert all(type(m.mlp.down_proj) is torch.nn.Linear for m in small.model.layers)
    left_out = 3 * 16 * (3 * 32 - sum(each))
    counts = [sum(p.numel() for p in m.parameters()) for m in (system.module, small)]
    assert counts[0] - counts[1] == left_out


def test_the_whole_width_is_an_ordinary_llama(system: Matformer) -> None:
    plain = tf.LlamaForCausalLM(system.module.config).eval()
    plain.load_state_dict(system.module.state_dict())
    assert torch.equal(logits(plain), logits(system.module))
    assert torch.equal(logits(plain), logits(system.decoder.cut(32)))


def test_files_load_in_transformers_and_decode_through_the_engine(
    system: Matformer, tmp_path: Path
) -> None:
    system.export(8, tmp_path / "s")
    system.export((4, 8, 16), tmp_path / "mixed")
    small, mixed = (
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("s", "mixed")
    )
    assert small.config.intermediate_size == 8 and mixed.config.intermediate_size == 16
    assert torch.equal(logits(small), logits(system.decoder.cut(8)))
    torch.testing.assert_close(logits(mixed), logits(system.decoder.cut((4, 8, 16))))
    prompt = torch.tensor([5, 6, 7, 8])
    theirs = small.generate(
        prompt[None], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    )
    engine = isthmus.load(tmp_path / "s", dtype="float32")
    found = engine.generate(prompt, max_new_tokens=8, ignore_end=True)
    assert found.tokens == theirs[0, 4:].tolist()
    plain = system.model.generate(prompt, max_new_tokens=12, drafter="none", ignore_end=True)
    policy = isthmus.decoding.policy.Fixed(system.drafter(8), isthmus.roles.Shape(4, 4, 1))
    drafted = system.model.generate(prompt, max_new_tokens=12, drafter=policy, ignore_end=True)
    assert drafted.tokens == plain.tokens


def test_a_step_teaches_one_width_and_weight_beyond_it_stays(system: Matformer) -> None:
    learner = system.learner(DATA, PLAN)
    drawn = {learner.batch(part)[1] for part in range(40)}
    assert drawn == {(4,), (8,), (16,), (32,)}
    ids, _ = learner.batch(0)
    found = learner.loss((ids, (8,)))
    found.total.backward()
    mlp = system.module.model.layers[1].mlp
    assert (mlp.gate_proj.weight.grad[:8] != 0).any()
    assert not mlp.gate_proj.weight.grad[8:].any() and not mlp.down_proj.weight.grad[:, 8:].any()
    system.module.zero_grad()
    # the joint loss is the mean of those of all widths
    joint = replace(SETTINGS, joint=True)
    both = Matformer(joint, system.module, system.tokenizer).learner(DATA, PLAN)
    assert both.batch(0)[1] == (4, 8, 16, 32)
    with torch.no_grad():
        parts = [float(learner.loss((ids, (w,))).total) for w in (4, 8, 16, 32)]
        assert float(both.loss(both.batch(0)).total) == pytest.approx(sum(parts) / 4, rel=1e-5)


def test_switched_off_only_the_whole_width_is_taught() -> None:
    off = replace(SETTINGS, probabilities=(0.0, 0.0, 0.0, 1.0))
    made = train(Matformer, DATA, off, PLAN)
    assert set(made.record["validation"][-1]) == {"step", "loss", "loss of 32"}
    assert {made.learner(DATA, PLAN).batch(p)[1] for p in range(20)} == {(32,)}


def test_mixes_are_the_neighbours_only() -> None:
    found = staircases((1, 2, 4, 8), 6)
    assert len(found) == 19 and found == sorted(found, key=sum)
    assert all(tuple(sorted(each)) == each and max(each) <= 2 * min(each) for each in found)


def test_bad_settings_and_models_are_refused(system: Matformer, tmp_path: Path) -> None:
    for fractions in ((), (0.5,), (0.5, 0.25, 1.0), (0.01, 1.0)):
        with pytest.raises(InvalidInputError, match="fractions must rise to 1"):
            replace(SETTINGS, fractions=fractions)
    with pytest.raises(InvalidInputError, match="one probability of 0 or more for each of 4"):
        replace(SETTINGS, probabilities=(1.0, -1.0, 0.0, 0.0))
    with pytest.raises(InvalidInputError, match="one width for each of 3"):
        system.export((4, 8), tmp_path)
    gpt = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="no feed-forward of the Llama kind"):
        ElasticDecoder(gpt)


def test_the_claim_runs_at_test_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    found = claim(Ruler(), "test")
    assert [g.passed for g in found.gates if g.name.startswith("drafted answers")] == [True]
    losses = [(r.baseline, r.ours, r.off) for r in found.rows[:4]]
    assert all(v is not None and 3 < v < 7 for row in losses for v in row)
    assert losses[3][0] == losses[3][2]  # the whole width of the ordinary model is its twin
