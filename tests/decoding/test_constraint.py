"""Constraints: what they allow, on trees as on a single path, with every kind of tokenizer."""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import isthmus
from isthmus.decoding.acceptance import Coupled
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.constrained import Constrained
from isthmus.decoding.constraint import (
    Compiler,
    DeadEnd,
    UnsupportedConstraint,
    choice,
    grammar,
    json_object,
    json_schema,
    narrowed,
    regex,
    validation_error,
)
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model, Prompt
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.roles import Constraint, Context, Reshape
from isthmus.testing.statistics import goodness_of_fit
from isthmus.workbench import schemas

COUNT = int(os.environ.get("ISTHMUS_SCHEMAS", "40"))
PERSON = schemas.record(
    "tags",
    name={"type": "string", "maxLength": 8},
    age=schemas.within(0, 120),
    tags=schemas.several(schemas.among("red", "green")),
)
TEXT = ['{"name":"ab","age":12,"tags":["red"]}', "yes yesterday no", 'def f(x):\n    return "ü" ']


def byte_level() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>", pad_token="<s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: a space in front of everything, and bytes for what is unknown."""
    made = Tokenizer(models.BPE(unk_token=None, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    made.train_from_iterator(TEXT * 4, trainer)
    saved = json.loads(made.to_str())
    for token in saved["added_tokens"]:
        token["special"] = token["content"] == "<s>"
    saved["added_tokens"] = saved["added_tokens"][:1]
    made = Tokenizer.from_str(json.dumps(saved))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>", pad_token="<s>")


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Model:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,  # padding beyond the tokenizer, as many models have it
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=0,
    )
    hub = LlamaForCausalLM(config).eval()
    hub.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return Model(hub, tokenizer)


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(KINDS[request.param]())


@pytest.fixture(scope="module")
def embedded() -> Model:
    return isthmus.load(dtype="float32", device="cpu")


def allowed(compiled: Constraint, state: object) -> list[int]:
    bits = compiled.mask([state]).numpy().view(np.uint8)
    return np.unpackbits(bits, bitorder="little").nonzero()[0].tolist()


def walk(compiled: Constraint, source: random.Random, steps: int) -> list[tuple[object, int]]:
    """A random path through a constraint: states and the tokens taken from them."""
    state, out = compiled.start(), []
    for _ in range(steps):
        tokens = [t for t in allowed(compiled, state) if t < compiled.size]
        token = source.choice(tokens)
        out.append((state, token))
        if token in compiled.ends:
            break
        state = compiled.advance(state, token)
    return out


def test_end_tokens_are_allowed_exactly_where_the_text_may_end(model: Model) -> None:
    for spec in (PERSON, choice(["yes", "yesterday", "no"]), regex("a{1,3}b?"), json_object()):
        compiled = model.compile(spec)
        assert isinstance(compiled, Constraint) and compiled.exact
        for seed in range(8):
            for state, _ in walk(compiled, random.Random(seed), 40):
                assert (0 in allowed(compiled, state)) == compiled.accepting(state)
                assert all(t < len(model.tokenizer) for t in allowed(compiled, state)[:-1])


def test_trees_and_rollback_equal_a_fresh_replay(model: Model) -> None:
    compiled = model.compile(PERSON)
    for seed in range(6):
        source = random.Random(seed)
        path = walk(compiled, source, 24)
        tokens = [token for _, token in path]
        cut = source.randrange(1, len(path))
        at, back = path[cut][0], path[cut - 1][0]
        assert allowed(compiled, compiled.rollback(at, 1)) == allowed(compiled, back)
        # a tree of right and wrong branches below the cut
        parents, names = [-1], [tokens[cut - 1]]
        for node in range(1, 12):
            parent = source.randrange(node)
            parents.append(parent)
            names.append(source.choice([source.randrange(model.target.vocab_size), *tokens]))
        masks = compiled.mask_tree(at, names, parents)
        for node in range(12):
            own, up = [], node
            while up > 0:
                own.append(names[up])
                up = parents[up]
            fresh = compiled.start()
            for token in [*tokens[:cut], *own[::-1]]:
                fresh = compiled.advance(fresh, token)
            assert torch.equal(masks[node : node + 1], compiled.mask([fresh]))


def test_forced_tokens_are_canonical_and_the_law(model: Model) -> None:
    compiled = model.compile(PERSON)
    state, written = compiled.start(), []
    while compiled.forced(state):
        chain = compiled.forced(state)
        assert allowed(compiled, state) == [chain[0]]
        written.append(chain[0])
        state = compiled.advance(state, chain[0])
    vocab = ByteVocab(model.tokenizer)
    text = b"".join(vocab.bytes(t) or b"?" for t in written)
    assert text and b'{"name":"'.startswith(text)
    assert written == vocab.encode(b'{"name":"')[: len(written)]


def test_answers_keep_the_constraint_with_every_tokenizer(model: Model) -> None:
    text = json.dumps(PERSON)
    for drafter in ("none", "prompt-lookup", "token-recycling"):
        for result in model.generate(
            ["yes", "no name"], constraint=PERSON, drafter=drafter, temperature=1.5, seed=1,
            max_new_tokens=200,
        ):  # fmt: skip
            assert result.finish_reason == "stop"
            assert validation_error(text, result.text) == ""
    options = ["yes", "yesterday", "no ü\n", 'q"\\']
    picked = {
        model.generate("x", constraint=choice(options), temperature=1.0, seed=s).text
        for s in range(12)
    }
    assert picked <= set(options) and len(picked) > 1


def test_an_answer_ends_with_the_constraint_where_end_tokens_are_ignored(model: Model) -> None:
    options = {"constraint": choice(["yes", "no"]), "seed": 2, "temperature": 1.0}
    result = model.generate("x", ignore_end=True, **options)
    assert result.text in ("yes", "no") and result.finish_reason == "stop"
    assert 0 not in result.tokens


def test_drafts_change_neither_the_text_nor_its_law(embedded: Model) -> None:
    for temperature in (0.0, 1.0):
        texts = {
            drafter: embedded.generate(
                "person = ",
                constraint=PERSON,
                drafter=drafter,
                acceptance=Coupled(4) if temperature else None,
                temperature=temperature,
            ).text
            for drafter in ("none", "prompt-lookup", "token-recycling", "auto")
        }
        assert len(set(texts.values())) == 1, texts


def test_the_trace_says_what_was_forced(embedded: Model) -> None:
    result = embedded.generate("person = ", constraint=PERSON, drafter="none", trace=True)
    forced = [r for r in result.rounds if r.drafter == "constraint"]
    assert forced and all(r.accepted == r.nodes for r in forced[:-1])
    assert {r.drafter for r in result.rounds} == {"constraint", "none"}
    assert result.stats.target_forwards < result.stats.new_tokens


def test_masked_sampling_is_the_renormalised_law(embedded: Model) -> None:
    spec = replace(choice(["a", "b", "(", "1"]), canonical=False)
    ids = embedded.encode("def f(")
    tokens = allowed(embedded.compile(spec), embedded.compile(spec).start())
    logits = embedded.target.forward(ids[None]).logits[0, -1]
    law = torch.softmax(logits[tokens], -1).tolist()
    seen = dict.fromkeys(tokens, 0)
    results = embedded.generate(
        [ids] * 600, constraint=spec, temperature=1.0, seed=0, drafter="prompt-lookup",
        max_new_tokens=1,
    )  # fmt: skip
    for result in results:
        seen[result.tokens[0]] += 1
    assert goodness_of_fit(list(seen.values()), [600 * p for p in law]) > 1e-4


def test_a_forbidden_node_of_a_drawn_tree_stays() -> None:
    """Its rejection is part of the law of what follows; only what is below it may go."""
    model = tiny_model(byte_level())
    compiled = model.compile(regex("[ab]{6}"))
    a, b, wrong = (model.tokenizer.convert_tokens_to_ids(c) for c in "abz")
    reshape = Constrained(compiled)
    assert isinstance(reshape, Reshape)
    law = Law(reshapes=[reshape])
    context = Context(torch.tensor([[5, 0, 0]]), [1], [1], law, torch.Generator(), [0])
    law.begin(context, model.target)
    tokens = torch.tensor([[5, a, wrong, b, wrong, a]])
    topology = Topology.of([-1, 0, 0, 1, 1, 2])
    chosen = reshape.prune(TokenTree(tokens, topology), context)
    assert chosen.tokens.tolist() == [[5, a, b]]
    q = torch.full((1, 6, model.target.vocab_size), 1.0 / model.target.vocab_size)
    drawn = reshape.prune(TokenTree(tokens, topology, None, "without", q), context)
    assert drawn.tokens.tolist() == [[5, a, wrong, b, wrong]]


def test_many_prompts_have_their_own_constraints(embedded: Model) -> None:
    prompts = [
        Prompt("x = ", constraint=choice(["yes", "no"])),
        Prompt("def f(", max_new_tokens=5),
        Prompt("x = ", constraint={"uniqueItems": True}),
        Prompt("x = "),
    ]
    results = dict(embedded.generate_many(prompts, batch_size=2, constraint=PERSON))
    assert results[0].text in ("yes", "no")
    assert results[2].finish_reason == "error" and "uniqueItems" in results[2].notes[0]
    assert validation_error(json.dumps(PERSON), results[3].text) == ""


@pytest.mark.parametrize(("temperature", "drafter"), [(1.5, "none"), (1.0, "token-recycling")])
def test_every_finished_answer_validates(embedded: Model, temperature: float, drafter: str) -> None:
    """ISTHMUS_SCHEMAS=200 runs the whole measurement."""
    asked = schemas.generated(COUNT)
    prompts = [Prompt("x = ", constraint=schema) for schema in asked]
    finished = 0
    for number, result in embedded.generate_many(
        prompts,
        temperature=temperature,
        drafter=drafter,
        num_draft_tokens=6,
        seed=3,
        max_new_tokens=120,
    ):
        assert result.finish_reason in ("stop", "length"), result.notes
        finished += result.finish_reason == "stop"
        if result.notes:
            assert "valid beginning" in result.notes[-1] and result.finish_reason == "length"
        else:  # a cut may fall where the text may end
            fault = validation_error(json.dumps(asked[number]), result.text)
            assert fault == "", (asked[number], result.text)
    assert finished > COUNT / 2


def test_a_cut_answer_is_a_valid_beginning(embedded: Model) -> None:
    whole = embedded.generate("x = ", constraint=PERSON, temperature=1.5, seed=5)
    compiled = embedded.compile(PERSON)
    for cut in range(1, len(whole.tokens)):
        part = embedded.generate(
            "x = ", constraint=PERSON, temperature=1.5, seed=5, max_new_tokens=cut
        )
        assert len(part.tokens) == cut
        state = compiled.start()
        for token in part.tokens:
            state = compiled.advance(state, token)
            assert state.alive
        assert part.finish_reason == "length"


def test_streams_yield_the_same_text(embedded: Model) -> None:
    pieces = list(embedded.stream("x = ", constraint=PERSON, seed=1))
    assert len(pieces) > 1
    assert "".join(pieces) == embedded.generate("x = ", constraint=PERSON, seed=1).text


def test_what_cannot_be_held_is_refused_unless_leniency_is_asked_for(embedded: Model) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "uniqueItems": True}
    with pytest.raises(UnsupportedConstraint, match="uniqueItems"):
        embedded.compile(schema)
    lenient = json_schema(schema, lenient=True)
    compiled = embedded.compile(lenient)
    assert not compiled.exact and "uniqueItems" in compiled.unheld
    result = embedded.generate("x = ", constraint=lenient, max_new_tokens=20, seed=0)
    assert "does not validate" in result.notes[-1] or "unfinished" in result.notes[-1]
    held = embedded.compile(json_schema(PERSON, lenient=True))
    assert held.exact  # nothing had to be given up


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (regex("("), "unclosed"),
        (regex("(?=a)b"), "look-around"),
        (grammar('begin: "a"'), "start"),
        (json_schema({"type": "nope"}), "nope"),
        (json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (json_schema(False), "false"),
        (json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "incompatible"),
    ],
)
def test_reasons_are_named(embedded: Model, spec: object, word: str) -> None:
    with pytest.raises(UnsupportedConstraint, match=word) as caught:
        embedded.compile(spec)
    assert len(str(caught.value).splitlines()) == 1


def test_sources_are_checked(tmp_path, embedded: Model) -> None:
    file = tmp_path / "s.json"
    file.write_text('{"type": "null"}')
    assert json_schema(file) == json_schema('{"type": "null"}') == json_schema(str(file))
    for bad in ('{"a":', "[]"):
        file.write_text(bad)
        with pytest.raises(InvalidInputError):
            json_schema(file)
    with pytest.raises(BrokenFileError, match="nowhere"):
        json_schema("nowhere.json")
    for nothing in ([], [""], "yes"):
        with pytest.raises(InvalidInputError):
            choice(nothing)
    with pytest.raises(InvalidInputError, match="complete law"):
        embedded.generate("x", law=Law(), constraint=PERSON)
    with pytest.raises(InvalidInputError, match="needs a tokenizer"):
        Model(embedded.target).compile(PERSON)


def test_a_dead_end_is_said_and_never_sampled_from(embedded: Model) -> None:
    def ban_everything(ids, scores):
        return torch.full_like(scores, -torch.inf)

    with pytest.raises(DeadEnd):
        embedded.generate("x", constraint=choice(["yes"]), processors=[ban_everything])


def test_a_vocabulary_that_cannot_write_it_is_refused() -> None:
    class Letters:
        def bytes(self, token):
            return [b"a", b"b", None][token] if token < 3 else None

        def encode(self, text):
            return [b"ab".index(c) for c in text]

    with pytest.raises(UnsupportedConstraint, match="vocabulary"):
        Compiler(Letters(), 4, [2]).compile(choice(["xyz"]))


def test_compiled_grammars_are_remembered(embedded: Model) -> None:
    assert embedded.compile(PERSON) is embedded.compile(json_schema(PERSON))
    assert embedded.compile(PERSON) is not embedded.compile(json_schema(PERSON, spaced=True))
    text = embedded.generate("x = ", constraint=json_schema(PERSON, spaced=True)).text
    assert '": ' in text and validation_error(json.dumps(PERSON), text) == ""


def test_quotes_do_not_slip_through_negated_classes(embedded: Model) -> None:
    schema = {"type": "string", "pattern": '^[^"\\\\]{1,3}$'}
    compiled = embedded.compile(schema)
    vocab = ByteVocab(embedded.tokenizer)
    for text, good in (('"ab"', True), ('"\\r\\""', False), ('"\\\\"', False), ('"ü"', True)):
        state = compiled.start()
        for token in vocab.encode(text.encode()):
            state = compiled.advance(state, token)
        assert (state.alive and compiled.accepting(state)) == good, text
    hidden = {"properties": {"enum": schema}}  # a property may be called like a keyword
    assert narrowed(hidden)["properties"]["enum"]["pattern"] != schema["pattern"]
    assert narrowed({"const": {"pattern": '[^"]'}}) == {"const": {"pattern": '[^"]'}}
