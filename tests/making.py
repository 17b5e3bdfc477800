"""What the tests of several folders make."""

from collections.abc import Callable
from pathlib import Path

MakeSystem = Callable[..., Path]


def untaught_coder(folder: Path, dtype: str = "float32") -> Path:
    """A tiny model of code that has learnt nothing, with its tokenizer, in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from isthmus.folders import EMBEDDED
    from isthmus.workbench.tokenizer import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    load_tokenizer(EMBEDDED / "pycode-t").save_pretrained(folder)
    return folder
