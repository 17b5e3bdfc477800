"""``isthmus generate``: write text with a model, sooner and unchanged."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from isthmus.cli.output import print_json, quiet_transformers
from isthmus.errors import BrokenFileError, InvalidInputError


def generate(
    prompt: str = "",
    /,
    *,
    file: Annotated[
        Path | None, Parameter(name=["--file", "-f"], allow_leading_hyphen=True)
    ] = None,
    model: Annotated[str, Parameter(name=["--model", "-m"])] = "",
    drafter: Annotated[str, Parameter(name=["--drafter", "-d"])] = "auto",
    draft_model: str = "",
    num_draft_tokens: int | None = None,
    max_new_tokens: Annotated[int, Parameter(name=["--max-new-tokens", "-n"])] = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: tuple[str, ...] = (),
    json_schema: str = "",
    regex: str = "",
    grammar: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    choice: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True)] = (),
    lenient: bool = False,
    strategy: str = "",
    set: tuple[str, ...] = (),
    fuse: tuple[str, ...] = (),
    fuse_mode: str = "auto",
    seed: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    exact: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    input: Annotated[
        Path | None, Parameter(name=["--input", "-i"], allow_leading_hyphen=True)
    ] = None,
    output: Annotated[Path, Parameter(name=["--output", "-o"], allow_leading_hyphen=True)] = Path(
        "-"
    ),
    batch_size: int = 16,
    engine: Literal["local", "ray"] = "local",
    workers: int = 0,
) -> int:
    """Write text with a model, faster than plain decoding and with the same output.

    The prompt comes from the argument, from --file, or from standard input. Text is streamed as it
    is accepted; one line of statistics follows on standard error.

    With --input, every line of a file is answered, many at a time: {"prompt": "..."}, and where
    wanted "id", "max_new_tokens" and "seed". Answers are kept in OUTPUT.part as they finish, so
    that the same command goes on after an interruption, and appear as OUTPUT in the order of the
    input when all are there.

    Args:
        prompt: Text to continue (for encoder-decoder models: the source text).
        file: Read the prompt from a file instead; "-" is standard input.
        model: Folder or hub id of a checkpoint, or a reference model; default the embedded one.
        drafter: auto, none, prompt-lookup, a system such as token-recycling, or the folder of a
            drafter made by isthmus train.
        draft_model: Smaller model with the same vocabulary, for drafters that need one.
        num_draft_tokens: Draft tokens a round, instead of the drafter's default.
        max_new_tokens: Tokens to write at most.
        temperature: 0 is greedy decoding.
        top_k: Sample among the k most likely tokens; 0 is all.
        top_p: Sample within this much probability.
        min_p: Leave out tokens below this share of the most likely one.
        repetition_penalty: Above 1 makes repeated tokens less likely.
        stop: Strings that end the text; may be given several times.
        json_schema: The text has to be JSON that validates under this schema, a file or its text.
        regex: The text has to match this regular expression as a whole.
        grammar: The text has to follow the Lark grammar in this file.
        choice: The text has to be one of these; give the option once for each.
        lenient: Hold what can be held of a JSON Schema that cannot be held exactly, and say
            whether the answer validates.
        strategy: How tokens are chosen: contrastive-search, beam, top-p ...; help lists them.
        set: A setting of the strategy as key=value; may be given several times.
        fuse: A second model that speaks along, as MODEL or MODEL:weight; may be given several
            times. Models of one vocabulary are fused token by token, others by their bytes.
        fuse_mode: How: product, mixture, contrast, proxy, route, lead or next-byte; help lists
            them, and auto goes by the vocabularies.
        seed: Seed of the sampling.
        dtype: auto, float32, bfloat16, float16 or float64; int8 rounds the weights, which changes
            the model a little.
        device: auto, cpu, cuda, cuda:1 ...
        exact: The same numbers bit for bit, whoever drafts; slower where there is no fast forward.
        json: Print one JSON object and nothing else on standard output.
        input: Answer the prompts of a file of JSON lines; "-" is standard input.
        output: Where the answers of --input go; "-" is standard output.
        batch_size: Prompts of --input that are decoded together at most.
        engine: local, or ray: the prompts of --input are spread over a Ray cluster, the one at
            RAY_ADDRESS or one on this machine.
        workers: Workers of the cluster; 0 is one for each GPU, or one for each machine.
    """
    options: dict[str, Any] = {
        "drafter": drafter,
        "num_draft_tokens": num_draft_tokens,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": list(stop),
        "seed": seed,
    }
    constraint = _constraint(json_schema, regex, grammar, choice, lenient)
    if constraint is not None:
        options["constraint"] = constraint
    if strategy == "help":
        from isthmus.cli.strategies import strategies

        strategies()
        return 0
    options |= _strategy(strategy, set)
    if fuse_mode == "help":
        from isthmus.decoding.fuse import MODES

        for name, rule in MODES.items():
            print(f"{name:10} {rule}")
        return 0
    if fuse_mode != "auto" and not fuse:
        raise InvalidInputError("--fuse-mode goes with --fuse, which names the other model")
    places: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "draft_model": draft_model,
        "exact": exact,
    }
    if input is not None:
        if prompt or file is not None or json:
            raise InvalidInputError("with --input, give no prompt, no --file and no --json")
        if exact and batch_size > 1:
            raise InvalidInputError("--exact holds for one row at a time; add --batch-size 1")
        from isthmus.cli.batch import answer_file

        return answer_file(
            input,
            output,
            engine=engine,
            workers=workers,
            batch_size=batch_size,
            load={"source": model, **places},
            options=options,
            fuse=(fuse, fuse_mode),
        )
    if str(output) != "-" or engine != "local":
        raise InvalidInputError("--output and --engine go with --input, a file of prompts")
    text = _prompt(prompt, file)
    quiet_transformers()
    from isthmus.api import load

    loaded = load(model, **places)
    if fuse:
        options["fuse"] = fusion(fuse, fuse_mode, dtype=dtype, device=device)
    shown, code = 0, 0
    try:
        for piece in loaded.stream(text, **options):
            if not json:
                sys.stdout.write(piece)
                sys.stdout.flush()
                shown += len(piece)
    except KeyboardInterrupt:
        code = 130
    result = loaded.last
    if json:
        print_json(
            {
                "model": model or "embedded",
                "prompt": text,
                **result.to_dict(),
                "dtype": str(loaded.target.dtype).removeprefix("torch."),
                "device": str(loaded.target.device),
                "why_general": loaded.target.why_general,
            }
        )
        return code
    sys.stdout.write(result.text[shown:])  # what an interrupt kept back
    if not result.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    law = "" if result.lossless else ", lossless: no (the text may differ from plain decoding)"
    print(f"[{result.drafter}] {result.stats.line()}{law}", file=sys.stderr)
    return code


def _constraint(
    schema: str, pattern: str, grammar: Path | None, choice: tuple[str, ...], lenient: bool
) -> Any:
    """What the options ask for, or None."""
    given = [bool(schema), bool(pattern), grammar is not None, bool(choice)]
    if sum(given) > 1:
        raise InvalidInputError("give one of --json-schema, --regex, --grammar and --choice")
    if lenient and not schema:
        raise InvalidInputError("--lenient goes with --json-schema")
    if not any(given):
        return None
    from isthmus.decoding import constraint as kinds

    if schema:
        return kinds.json_schema(schema, lenient=lenient)
    if pattern:
        return kinds.regex(pattern)
    return kinds.choice(choice) if choice else kinds.grammar(Path(str(grammar)))


def _strategy(name: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """The strategy's name and its settings, once they are known to be right."""
    if settings and not name:
        raise InvalidInputError("--set goes with --strategy; `isthmus strategies` lists them")
    if not name:
        return {}
    from isthmus.decoding.strategies import make
    from isthmus.settings import pairs

    given = {name.replace("-", "_"): value for name, value in pairs(settings).items()}

    make(name, given)
    return {"strategy": name, **given}


def fusion(specs: Sequence[str], mode: str, *, dtype: str, device: str) -> Any:
    """The other models of a fusion, loaded."""
    from isthmus.api import load
    from isthmus.decoding.fuse import Fuse, parse

    pairs = parse(specs)
    loaded = [load(name, dtype=dtype, device=device) for name, _ in pairs]
    return Fuse(tuple(loaded), tuple(weight for _, weight in pairs), mode)


def _prompt(prompt: str, file: Path | None) -> str:
    if file is not None and prompt:
        raise InvalidInputError("give the prompt as an argument or with --file, not both")
    if file is not None and str(file) != "-":
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BrokenFileError(f"{file} cannot be read as text ({error})") from error
    if not prompt and (file is not None or not sys.stdin.isatty()):
        prompt = sys.stdin.read()
    if not prompt:
        raise InvalidInputError(
            "there is no prompt; give one as an argument, with --file, or on standard input"
        )
    return prompt
