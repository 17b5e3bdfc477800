"""The adapter to transformers: what ``dtype="auto"`` comes to."""

import pytest
import torch
import transformers as tf

import isthmus
from isthmus.models import hub


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_rounds_no_weights_on_a_cpu(dtype, tmp_path):
    config = tf.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = tf.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path)
    target = isthmus.load(tmp_path, device="cpu").target
    assert target.dtype == dtype
    for name, weight in model.state_dict().items():
        assert torch.equal(target.model.state_dict()[name], weight), name


def test_auto_by_device():
    assert hub.parse_dtype("auto", "cpu") == torch.float32
    assert hub.parse_dtype("auto", "cuda") == torch.bfloat16
