"""Runs inside a peer's own Python: loads its engine once, then decodes what it is asked to.

It imports nothing of isthmus, so that a peer's environment holds the peer alone. Requests and
answers are JSON, one line each; what a library prints goes to standard error.

    {"engine", "task", "checkpoint", "export", "precision", "threads"}  ->  {"about"}
    {"prompt", "max_new_tokens"}    ->  {"tokens", "seconds"}             of the task "generate"
    {"batches", "max_new_tokens"}   ->  {"tokens", "seconds" of each}     of the task "translate"

An answer ``{"error"}`` ends the worker. The checkpoint is converted by the peer's own converter on
first use and kept under ``export``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

Generate = Callable[[list[int], int], list[int]]
"""Greedy decoding: token ids and how many to write, end tokens like any other."""

Translate = Callable[[list[list[int]], int], list[list[int]]]
"""The same for a batch of sources."""


def transformers(checkpoint: Path, export: Path, precision: str, threads: int) -> Generate:
    """Plain ``generate`` of transformers, in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, precision)).eval()

    def generate(prompt: list[int], budget: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=budget,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    return generate


def ctranslate2(checkpoint: Path, export: Path, precision: str, threads: int) -> Generate:
    """CTranslate2's generator on what its converter for transformers makes."""
    import ctranslate2 as ct2

    def convert(out: Path) -> None:
        ct2.converters.TransformersConverter(str(checkpoint)).convert(
            str(out), quantization=precision
        )

    kept(export, convert)
    engine = ct2.Generator(
        str(export), device="cpu", compute_type=precision, intra_threads=threads, inter_threads=1
    )
    words = json.loads((export / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompt: list[int], budget: int) -> list[int]:
        [result] = engine.generate_batch(
            [[words[token] for token in prompt]],
            max_length=budget,
            end_token=[],
            include_prompt_in_result=False,
        )
        tokens: list[int] = result.sequences_ids[0]
        return tokens

    return generate


def ctranslate2_pairs(checkpoint: Path, export: Path, precision: str, threads: int) -> Translate:
    """CTranslate2's translator on what the parts of its converter for transformers make."""
    import ctranslate2 as ct2

    kept(export, lambda out: write_pairs(checkpoint, out, precision))
    engine = ct2.Translator(
        str(export), device="cpu", compute_type=precision, intra_threads=threads, inter_threads=1
    )

    def translate(sources: list[list[int]], budget: int) -> list[list[int]]:
        found = engine.translate_batch(
            [[str(token) for token in source] for source in sources],
            beam_size=1,
            end_token=[],
            min_decoding_length=budget,
            max_decoding_length=budget,
        )
        return [[int(token) for token in each.hypotheses[0]] for each in found]

    return translate


def write_pairs(checkpoint: Path, out: Path, precision: str) -> None:
    """Write a Marian or T5 checkpoint for CTranslate2, its tokens named by their numbers.

    The converter's own way drops the last row of Marian's vocabulary, where most checkpoints have
    their padding, and begins with an embedding of zeros. Here all rows stay and the decoder
    begins with its start token, as it does in transformers.

    Raises:
        ValueError: It is another kind of model.
    """
    import torch
    from ctranslate2.converters.transformers import BartLoader, T5Loader
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float32)
    kind = model.config.model_type
    if kind == "marian":
        model.config.normalize_before = model.config.normalize_embedding = False
        loader = BartLoader()
    elif kind == "t5":
        loader = T5Loader()
    else:
        raise ValueError(f"Marian and T5 models are converted here, not {kind!r}")
    with torch.no_grad():
        spec = loader.get_model_spec(model)
    words = [str(token) for token in range(model.config.vocab_size)]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    start = str(model.generation_config.decoder_start_token_id)
    spec.config.bos_token = spec.config.decoder_start_token = start
    spec.config.eos_token = spec.config.unk_token = str(model.config.eos_token_id)
    spec.config.add_source_bos = spec.config.add_source_eos = False
    spec.validate()
    spec.optimize(quantization=precision)
    out.mkdir()
    spec.save(str(out))


def openvino(checkpoint: Path, export: Path, precision: str, threads: int) -> Generate:
    """OpenVINO GenAI's pipeline on what Optimum Intel exports; ``int8`` quantises weights only."""
    import numpy as np
    import openvino_genai as genai
    from openvino import Tensor

    def convert(out: Path) -> None:
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        main_export(
            str(checkpoint),
            out,
            task="text-generation-with-past",
            ov_config=OVConfig(
                dtype={"float32": "fp32", "float16": "fp16"}.get(precision, precision)
            ),
            convert_tokenizer=False,
        )

    kept(export, convert)
    # as it comes, a prompt that was seen before is looked up instead of computed
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    engine = genai.LLMPipeline(
        str(export),
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_NUM_THREADS=threads,
        INFERENCE_PRECISION_HINT="f32",
    )

    def generate(prompt: list[int], budget: int) -> list[int]:
        ids = np.array([prompt], dtype=np.int64)
        inputs = genai.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids)))
        out = engine.generate(inputs, max_new_tokens=budget, ignore_eos=True, do_sample=False)
        tokens: list[int] = out.tokens[0]
        return tokens

    return generate


def llama_cpp(checkpoint: Path, export: Path, precision: str, threads: int) -> Generate:
    """llama.cpp on a GGUF file that its ``gguf`` package writes."""
    from llama_cpp import Llama

    kept(export, lambda out: write_gguf(checkpoint, out, precision))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    engine = Llama(
        str(export),
        n_ctx=config["max_position_embeddings"],
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def generate(prompt: list[int], budget: int) -> list[int]:
        engine.reset()  # or it would look up a prompt that it has just seen
        tokens: list[int] = []
        for token in engine.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True):
            tokens.append(token)
            if len(tokens) == budget:
                break
        return tokens

    return generate


def write_gguf(checkpoint: Path, out: Path, precision: str) -> None:
    """Write a Llama checkpoint of one safetensors file as GGUF.

    Raises:
        ValueError: The checkpoint is no Llama, or one with scaled positions or extra weights.
    """
    import gguf
    import numpy as np

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise ValueError(f"GGUF files are written of Llama models, not {config['model_type']!r}")
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        raise ValueError(f"GGUF files are written without rope scaling, not {rope['rope_type']!r}")
    kinds = {
        "float32": gguf.GGMLQuantizationType.F32,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "float16": gguf.GGMLQuantizationType.F16,
        "int8": gguf.GGMLQuantizationType.Q8_0,
    }
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_token_merges(merges)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, x in tensors(checkpoint / "model.safetensors"):
        for part, count in (("q_proj", heads), ("k_proj", config["num_key_value_heads"])):
            if name.endswith(f"{part}.weight"):
                # it rotates neighbours, transformers rotates halves
                x = x.reshape(count, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        kind = kinds[precision] if x.ndim == 2 else gguf.GGMLQuantizationType.F32
        to = names.get_name(name, try_suffixes=(".weight",))
        if to is None:
            raise ValueError(f"GGUF has no place for the weight {name!r}")
        writer.add_tensor(to, gguf.quants.quantize(np.ascontiguousarray(x), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and float32 arrays of a safetensors file, also of bfloat16 that numpy does not know."""
    import numpy as np

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, mode="r", offset=8 + length)
    for name, about in header.items():
        if name == "__metadata__":
            continue
        raw = data[slice(*about["data_offsets"])]
        if about["dtype"] == "BF16":
            x = (raw.view("<u2").astype("<u4") << 16).view("<f4")
        else:
            x = raw.view({"F32": "<f4", "F16": "<f2"}[about["dtype"]]).astype("<f4")
        yield name, x.reshape(about["shape"])


ENGINES = {
    "transformers": (transformers, "transformers"),
    "ctranslate2": (ctranslate2, "ctranslate2"),
    "openvino": (openvino, "openvino-genai"),
    "llama.cpp": (llama_cpp, "llama-cpp-python"),
}
"""How to load each engine, and the package whose version is reported."""


TRANSLATORS = {"ctranslate2": (ctranslate2_pairs, "ctranslate2")}
"""The same for models that translate."""


def kept(export: Path, convert: Callable[[Path], object]) -> None:
    """Make an export once, as a whole: under another name first."""
    if export.exists():
        return
    export.parent.mkdir(parents=True, exist_ok=True)
    new = export.with_name(f".{export.name}-{os.getpid()}")
    try:
        convert(new)
        new.rename(export)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        new.unlink(missing_ok=True)


def main() -> None:
    """Serve requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the channel is for answers only

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        asked = json.loads(sys.stdin.readline())
        translates = asked["task"] == "translate"
        table: Any = TRANSLATORS if translates else ENGINES
        load, package = table[asked["engine"]]
        run: Any = load(
            Path(asked["checkpoint"]), Path(asked["export"]), asked["precision"], asked["threads"]
        )
        answer({"about": f"{package} {version(package)}"})
        for line in sys.stdin:
            asked = json.loads(line)
            parts = asked["batches"] if translates else [asked["prompt"]]
            tokens, seconds = [], []
            for part in parts:
                start = time.perf_counter()
                tokens.append(run(part, asked["max_new_tokens"]))
                seconds.append(time.perf_counter() - start)
            if translates:
                answer({"tokens": [text for part in tokens for text in part], "seconds": seconds})
            else:
                answer({"tokens": tokens[0], "seconds": seconds[0]})
    except Exception as error:  # whatever a peer raises reaches the user as one line
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
