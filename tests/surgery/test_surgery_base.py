"""Sites are told by what they compute; plans belong to one model; statistics leave padding out."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from isthmus.errors import (
    BrokenFileError,
    InvalidInputError,
    MismatchError,
    UnknownNameError,
    UnsupportedModelError,
)
from isthmus.surgery.base import (
    Change,
    Cost,
    Plan,
    Report,
    Steps,
    check_budget,
    fingerprint,
    hidden,
    matrix,
    sites,
    write_matrix,
)
from isthmus.surgery.calibration import (
    AbsMean,
    Calibration,
    Gram,
    Quantiles,
    Reservoir,
    TopKMarkers,
    capture,
    sequential,
)

IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
} | IDS
PAIR = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}


def llama(layers=2, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": layers})).eval()


def bart():
    torch.manual_seed(0)
    config = BartConfig(vocab_size=40, d_model=16, **PAIR, **IDS, decoder_start_token_id=1)
    config.forced_eos_token_id = None
    return BartForConditionalGeneration(config).eval()


MODELS = {
    "llama": llama,
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_inner=24, **IDS)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **{k: v for k, v in SMALL.items() if k != "intermediate_size"},
            ffn_dim=24,
            word_embed_proj_dim=16,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=40,
            d_model=16,
            num_layers=2,
            num_heads=2,
            d_kv=8,
            d_ff=24,
            feed_forward_proj="gated-gelu",
            pad_token_id=2,
            decoder_start_token_id=2,
        )
    ),
    "bart": bart,
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, ffn_hidden_size=24
        )
    ),
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=40,
            d_model=16,
            max_source_positions=20,
            **PAIR,
            **IDS,
            decoder_start_token_id=1,
        )
    ),
}


def texts(model, seed=0, rows=3, length=7):
    """Random samples, the last row padded."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return Calibration((batch,), "random", seed)


@pytest.mark.parametrize("name", MODELS)
def test_feed_forward_layers_are_found_and_compute_what_the_model_computes(name):
    model = MODELS[name]().eval()
    found = sites(model, "ffn")
    assert len(found) == (4 if model.config.is_encoder_decoder else 2)
    assert {s.axes["hidden"] for s in found} == {24} and {s.axes["model"] for s in found} == {16}
    assert len(sites(model, "attention")) == (6 if model.config.is_encoder_decoder else 2)
    assert [s.layer for s in sites(model, "block")][:2] == [0, 1]
    assert all(matrix(model.get_submodule(s.path)).ndim == 2 for s in sites(model, "linear"))


def test_experts_and_state_spaces_are_sites_of_their_own():
    kinds = {"num_key_value_heads": 2, "num_local_experts": 4}
    moe = MixtralForCausalLM(MixtralConfig(**SMALL, **kinds)).eval()
    assert sites(moe, "moe")[0].axes == {"experts": 4, "model": 16, "hidden": 24}
    mamba = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1
        )
    ).eval()
    assert [s.path for s in sites(mamba, "ssm")] == [f"backbone.layers.{i}.mixer" for i in (0, 1)]
    with pytest.raises(UnsupportedModelError, match=r"no ffn .*mixer.in_proj.*paths="):
        sites(mamba, "ffn")


def test_a_layer_that_computes_something_else_is_refused():
    model = llama()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, a, out: out + 1)
    before = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp computes something else"):
        sites(model, "ffn")
    before.remove()
    with pytest.raises(UnknownNameError, match="kind of site"):
        sites(model, "fnn")
    with pytest.raises(UnknownNameError, match="module"):
        sites(model, "linear", paths=["model.layers.9"])
    with pytest.raises(UnsupportedModelError, match="is no linear"):
        sites(model, "linear", paths=["model.norm"])


def test_paths_work_in_any_module():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    found = sites(net, "linear", paths=["0", "2"])
    assert [s.axes for s in found] == [{"in": 9, "out": 2}, {"in": 8, "out": 3}]
    x = torch.randn(5, 1, 4, 4)
    stats = capture(net, found, Calibration(({"input": x},)), Gram)
    patches = torch.nn.functional.unfold(x, 3).transpose(1, 2).reshape(-1, 9).double()
    assert torch.allclose(stats["0"].hessian, 2 * patches.T @ patches / len(patches))


def test_a_transposed_matrix_is_written_the_right_way_round():
    model = MODELS["gpt2"]().eval()
    part = model.transformer.h[0].mlp.c_fc
    value = torch.randn(24, 16)
    write_matrix(part, value)
    x = torch.randn(2, 16)
    assert torch.allclose(part(x), x @ value.T + part.bias, atol=1e-6)
    with pytest.raises(InvalidInputError, match="does not fit"):
        write_matrix(part, value.T)


def test_statistics_leave_padding_out():
    model = llama()
    data = texts(model)
    found = [s for s in sites(model, "linear") if s.path.endswith("down_proj")]
    stats = capture(model, found, data, Gram)
    means = capture(model, found, data, AbsMean)
    ffn = sites(model, "ffn")
    marks = capture(model, ffn, data, lambda: TopKMarkers(3), where="hidden")
    rows = capture(model, ffn, data, lambda: Reservoir(100), where="hidden")
    inputs = capture(model, ffn, data, lambda: Reservoir(100))
    for site, layer in zip(found, ffn, strict=True):
        x = rows[layer.path].rows
        assert len(x) == 3 * 7 - 3 == stats[site.path].count == data.tokens
        assert torch.allclose(stats[site.path].hessian, 2 * x.T.double() @ x.double() / len(x))
        assert torch.allclose(means[site.path].value, x.double().abs().mean(0))
        assert torch.allclose(hidden(model, layer, inputs[layer.path].rows), x, atol=1e-6)
        top = marks[layer.path]
        assert top.markers().sum(1).eq(3).all()
        assert torch.allclose(top.rate, top.markers().double().mean(0))


def test_the_decoder_has_padding_of_its_own():
    model = bart()
    (batch,) = texts(model).batches
    longer = torch.randint(3, 40, (3, 9))
    batch = dict(batch) | {"decoder_input_ids": longer, "labels": longer}
    batch["decoder_attention_mask"] = torch.ones_like(longer)
    stats = capture(model, sites(model, "linear"), Calibration((batch,)), Gram)
    counts = {path.removeprefix("model."): gram.count for path, gram in stats.items()}
    assert counts["encoder.layers.0.fc1"] == 18 and counts["decoder.layers.0.fc1"] == 27
    assert counts["decoder.layers.0.encoder_attn.k_proj"] == 18
    assert counts["decoder.layers.0.encoder_attn.q_proj"] == 27


def test_layer_by_layer_sees_what_was_changed_before():
    model = llama(3)
    data, found = texts(model), sites(model, "ffn")
    dense = {k: r.rows for k, r in capture(model, found, data, lambda: Reservoir(99)).items()}
    for i, (here, made) in enumerate(sequential(model, found, data, lambda: Reservoir(99))):
        (site,) = here
        rows = made[site.path].rows
        assert torch.equal(rows, dense[site.path]) == (i == 0)
        write_matrix(model.get_submodule(site.parts["down"]), torch.zeros(16, 24))
    again = {k: r.rows for k, r in capture(model, found, data, lambda: Reservoir(99)).items()}
    assert torch.equal(rows, again[site.path])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_quantiles_and_draws():
    kept = Quantiles()
    kept.add(torch.arange(5.0)[:, None])
    kept.add(torch.arange(5.0, 11.0)[:, None])
    assert kept.quantile(0.25) == 2.5 and kept.quantile(1.0, centre=5.0) == 5.0
    some = Reservoir(40, seed=1)
    for i in range(0, 4000, 100):
        some.add(torch.arange(i, i + 100.0)[:, None])
    assert len(some.rows) == 40 and abs(float(some.rows.mean()) - 2000) < 600
    assert len(set(some.rows.flatten().tolist())) == 40


def test_the_loss_is_that_of_transformers():
    model = llama()
    (batch,) = texts(model).batches
    labels = torch.where(batch["attention_mask"].bool(), batch["labels"], -100)
    given = {k: v for k, v in batch.items() if k != "labels"}
    wanted = float(model(**given, labels=labels).loss.detach())
    assert texts(model).loss(model) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(InvalidInputError, match="no labels"):
        Calibration((given,)).loss(model)


def test_overlap_is_found_at_any_offset():
    ids = torch.randint(0, 1000, (1, 400))
    one = Calibration(({"input_ids": ids[:, :256], "attention_mask": ids[:, :256] * 0 + 1},), "a")
    part = ids[:, 137:393]
    two = Calibration(({"input_ids": part, "attention_mask": part * 0 + 1},), "b")
    assert 0.3 < one.overlap(two) < 0.6
    with pytest.raises(MismatchError, match="in both"):
        one.check_apart(two)
    other = torch.randint(0, 1000, (1, 256))
    one.check_apart(Calibration(({"input_ids": other, "attention_mask": other * 0 + 1},)))


def test_a_plan_survives_its_files_and_refuses_another_model(tmp_path):
    model = llama()
    kept = {"mask": torch.tensor([True, False])}
    plan = Plan("m", 0.5, fingerprint(model), "data", {"n": 2}, 3, {"loss": [1.0]}, kept)
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.key == plan.key and torch.equal(again.tensors["mask"], kept["mask"])
    again.check(copy.deepcopy(model), "m")
    with pytest.raises(MismatchError, match="plan again"):
        again.check(llama(seed=1), "m")
    with pytest.raises(MismatchError, match="one of m"):
        again.check(model, "other")
    (tmp_path / "plan.safetensors").write_bytes(b"x" * 9)
    with pytest.raises(BrokenFileError, match="altered or cut short"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"method": "m"}))
    with pytest.raises(BrokenFileError, match="no whole plan"):
        Plan.load(tmp_path)


def test_finished_pieces_are_taken_up_again(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": torch.ones(2)}

    for key in ("a", "a", "b"):
        assert Steps(tmp_path, key).do("layer 0", make)["x"].sum() == 2
    assert len(calls) == 2
    next(iter(tmp_path.iterdir())).write_bytes(b"cut")
    Steps(tmp_path, "a").do("layer 0", make)
    Steps(tmp_path, "b").do("layer 0", make)
    assert len(calls) == 3


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, float("nan"), float("inf")])
def test_an_impossible_budget_is_refused(budget):
    with pytest.raises(InvalidInputError, match="share of weights that is kept"):
        check_budget(budget, "weights")


def test_costs_add_up():
    report = Report("m", (Change("a", Cost.of(nn.Linear(3, 2)), Cost(2, 2, 2, 16.0)),) * 2)
    assert report.before == Cost(16, 16, 12, 32.0) and report.after == Cost(4, 4, 4, 16.0)
    assert json.loads(json.dumps(report.to_dict()))["after"]["parameters"] == 4
