"""Strategies by name: settings, composition with drafts and processors, and transformers' doors."""

import json
import re
import subprocess
import sys
from functools import cache

import pytest
import tiny
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as lp

from isthmus.api import load
from isthmus.decoding import strategies
from isthmus.decoding.acceptance import Match, Rejection
from isthmus.decoding.constraint import regex
from isthmus.decoding.drafters import ModelDrafter, PromptLookup
from isthmus.decoding.law import Law
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.decoding.reshape import Walk
from isthmus.decoding.strategies import STRATEGIES, law_options, make
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, UnknownNameError
from isthmus.roles import Context, Shape
from isthmus.testing.statistics import string_test

PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [3, 4], [9, 9, 8]]
MODEL = tiny.facade("Llama")
SOLE = [name for name, kind in STRATEGIES.items() if kind.alone]
SAMPLED = [
    name
    for name, kind in STRATEGIES.items()
    if name not in SOLE and make(name).pieces(MODEL).temperature > 0
]
CHOSEN = [name for name in STRATEGIES if name not in (*SAMPLED, *SOLE)]


def tokens(answers):
    return [r.tokens for r in answers]


def test_every_strategy_is_of_one_kind():
    assert set(SOLE) == {"beam", "diverse-beam", "stochastic-beam", "mbr"}
    assert {"sample", "top-k", "top-p", "min-p", "top-h", "typical", "mirostat"} <= set(SAMPLED)
    assert {"greedy", "contrastive-search", "dola", "fsd", "fsd-vec"} <= set(CHOSEN)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_same_seed_gives_the_same_text_alone_and_in_a_stream(name):
    once = MODEL.generate(PROMPTS, max_new_tokens=6, strategy=name, drafter="none", seed=4)
    again = MODEL.generate(PROMPTS, max_new_tokens=6, strategy=name, drafter="none", seed=4)
    assert tokens(once) == tokens(again)
    assert all(1 <= len(r.tokens) <= 6 for r in once)
    for r in once:
        assert bool(r.hypotheses) == (name in SOLE)
        if r.hypotheses:
            assert list(r.hypotheses[0].tokens) == r.tokens
            assert len(r.to_dict()["hypotheses"]) == len(r.hypotheses)


class Even(Walk[int]):
    """A constraint: the sum of all tokens stays even."""

    stage = "mask"

    def start(self, prompt):
        return int(prompt.sum())

    def advance(self, state, token):
        return state + token

    def apply(self, states, logits):
        odd = (torch.arange(logits.shape[-1]) + torch.tensor(states)[:, None]) % 2 == 1
        return logits.masked_fill(odd, -torch.inf)


@pytest.mark.parametrize("drafter", ["prompt-lookup", "token-recycling", "speculative-sampling"])
@pytest.mark.parametrize("name", CHOSEN)
def test_drafts_do_not_change_what_is_chosen(name, drafter):
    """Alone, behind a processor, and under a constraint."""
    for extra in ({}, {"repetition_penalty": 1.3}, {"reshapes": (Even(),)}):
        options = {"max_new_tokens": 12, "strategy": name, "ignore_end": True, **extra}
        if name == "dola" and "repetition_penalty" in extra:
            options["repetition_penalty"] = 1.5
        plain = MODEL.generate(PROMPTS, drafter="none", **options)
        drafted = MODEL.generate(PROMPTS, drafter=drafter, **options)
        assert tokens(plain) == tokens(drafted)
        if "reshapes" in extra:
            for prompt, answer in zip(PROMPTS, tokens(plain), strict=True):
                total = sum(prompt)
                for token in answer:
                    total += token
                    assert total % 2 == 0


@pytest.mark.parametrize("network", ["Bart", "Gemma3"])
@pytest.mark.parametrize("name", CHOSEN)
def test_drafts_change_nothing_on_other_kinds_of_models(name, network):
    """An encoder-decoder, and a model with a sliding window."""
    model, prompts = tiny.facade(network), [torch.tensor(p) for p in PROMPTS]
    options = {"max_new_tokens": 8, "strategy": name, "ignore_end": True}
    plain = model.generate(prompts, drafter="none", **options)
    assert tokens(plain) == tokens(model.generate(prompts, drafter="prompt-lookup", **options))
    alone = [model.generate(p, drafter="none", **options).tokens for p in prompts]
    assert tokens(plain) == alone


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sample", {"temperature": 0.8}),
        ("top-k", {"top_k": 3}),
        ("top-p", {"top_p": 0.8}),
        ("min-p", {"min_p": 0.2}),
        ("top-h", {"top_h": 0.7}),
        ("typical", {"typical": 0.8}),
        ("epsilon", {"epsilon": 0.12}),
        ("eta", {"eta": 0.2}),
    ],
)
@pytest.mark.parametrize("drawn", [False, True])
def test_drafts_do_not_change_what_is_drawn(name, settings, drawn):
    """Chi-square of whole answers, for chosen drafts and for drafts drawn from a model."""
    target = TableTarget(5, seed=2, sharpness=1.2, order=1, end_token=4)
    amateur = TableTarget(5, seed=7, sharpness=1.2, order=1)
    pieces = make(name, settings).pieces(MODEL)
    law = Law(**law_options(pieces, {}))
    drafter = ModelDrafter(amateur) if drawn else PromptLookup()
    policy = Fixed(drafter, Shape(2, 2, 1))
    rule = Rejection() if drawn else Match()
    found = string_test(policy, target=target, law=law, acceptance=rule)
    assert found.p > 1e-3 and found.impossible == 0
    assert found.acceptance_length > 1.0
    plain = TableTarget(5, seed=2, sharpness=1.2, order=1, end_token=4).truth(
        [0, 1, 2], 1, Law(temperature=1.0)
    )
    changed = target.truth([0, 1, 2], 1, law)
    assert any(abs(plain[a] - changed[a]) > 1e-6 for a in plain)


def test_truncations_come_in_transformers_order():
    settings = {
        "temperature": 0.9,
        "top_h": 0.9,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.02,
        "typical": 0.9,
        "epsilon": 0.01,
        "eta": 0.02,
    }
    law = Law(**law_options(make("sample", settings).pieces(MODEL), {}))
    chain = lp.LogitsProcessorList(
        [
            lp.TemperatureLogitsWarper(0.9),
            lp.TopHLogitsWarper(0.9),
            lp.TopKLogitsWarper(30),
            lp.TopPLogitsWarper(0.9),
            lp.MinPLogitsWarper(0.02),
            lp.TypicalLogitsWarper(0.9),
            lp.EpsilonLogitsWarper(0.01),
            lp.EtaLogitsWarper(0.02),
        ]
    )
    prepared = tiny.network("Llama")._get_logits_processor(
        GenerationConfig(
            do_sample=True,
            temperature=0.9,
            top_h=0.9,
            top_k=30,
            top_p=0.9,
            min_p=0.02,
            typical_p=0.9,
            epsilon_cutoff=0.01,
            eta_cutoff=0.02,
        ),
        input_ids_seq_length=1,
        encoder_input_ids=None,
        prefix_allowed_tokens_fn=None,
        logits_processor=lp.LogitsProcessorList(),
        device="cpu",
        model_kwargs={},
    )
    assert [type(p) for p in chain] == [type(p) for p in prepared]
    logits = 2 * torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0))
    context = Context(
        torch.ones(4, 4).long(), [1] * 4, [1] * 4, law, torch.Generator(), [*range(4)]
    )
    got = law.logits(logits, TokenTree.root(torch.ones(4).long()), context)[:, 0]
    assert torch.equal(got, chain(torch.ones(4, 1).long(), logits[:, 0]))


def test_many_prompts_and_streams():
    plain = {
        i: MODEL.generate(p, max_new_tokens=6, strategy="fsd").tokens for i, p in enumerate(PROMPTS)
    }
    many = MODEL.generate_many(PROMPTS, batch_size=2, max_new_tokens=6, strategy="fsd")
    assert {i: r.tokens for i, r in many} == plain
    beams = {
        i: MODEL.generate(p, max_new_tokens=6, strategy="beam", beams=2).tokens
        for i, p in enumerate(PROMPTS)
    }
    many = MODEL.generate_many(PROMPTS, max_new_tokens=6, strategy="beam", beams=2)
    assert {i: r.tokens for i, r in many} == beams


@cache
def embedded():
    """The embedded model, with itself as the amateur."""
    model = load()
    return Model(model.target, model.tokenizer, draft_model=model.target)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in ("top-k", "min-p", "eta")])
def test_constraints_hold_under_every_strategy(name):
    """Also where what the strategy finds plausible is not what the constraint allows."""
    model = embedded()
    wanted = regex("(foo|bar)[0-9]{3}")
    options = {"strategy": name, "constraint": wanted, "max_new_tokens": 12, "seed": 0}
    drafters = ("none",) if name in SOLE else ("none", "prompt-lookup")
    texts = [model.generate("x = ", drafter=d, **options).text for d in drafters]
    assert all(re.fullmatch(wanted.text, text) for text in texts)
    assert name in SAMPLED or len(set(texts)) == 1


def test_text_streams_where_it_can():
    model = load()
    for name in ("contrastive-search", "beam"):
        whole = model.generate("def add(a, b):", max_new_tokens=10, strategy=name)
        pieces = list(model.stream("def add(a, b):", max_new_tokens=10, strategy=name))
        assert "".join(pieces) == whole.text == model.last.text
        assert (len(pieces) > 1) == (name != "beam")


def test_settings_are_read_from_text():
    assert make("mirostat", {"version": "2", "tau": "2.5"}) == strategies.Mirostat(2.5, 1.0, 2)
    assert make("dola", {"layers": "0,2"}).layers == (0, 2)
    assert make("dola", {"layers": [0, 2], "norm": "true"}).norm is True
    assert make("beam", {"early_stopping": "true"}).early_stopping is True
    assert make("beam", {"early_stopping": True}).early_stopping is True
    assert strategies.describe((1, 2)) == "1,2"


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: make("contrastive-serch"), UnknownNameError, "contrastive-search"),
        (lambda: make("beam", {"beems": 3}), UnknownNameError, "beams"),
        (lambda: make("beam", {"beams": 2.5}), InvalidInputError, "whole number"),
        (lambda: make("beam", {"beams": True}), InvalidInputError, "whole number"),
        (lambda: make("fsd", {"alpha": True}), InvalidInputError, "a number"),
        (lambda: make("fsd", {"alpha": "much"}), InvalidInputError, "a number"),
        (lambda: make("mirostat", {"version": 3}), InvalidInputError, "one of 1, 2"),
        (lambda: make("dola", {"norm": "maybe"}), InvalidInputError, "true or false"),
        (lambda: make("dola", {"layers": 3}), InvalidInputError, "whole numbers"),
        (lambda: MODEL.generate([3], strategy="nucleus"), UnknownNameError, "isthmus strategies"),
        (
            lambda: MODEL.generate([3], strategy="greedy", k=3),
            UnknownNameError,
            "setting of greedy",
        ),
        (lambda: MODEL.generate([3], strategy="fsd", top_p=0.5), InvalidInputError, "decides"),
        (
            lambda: MODEL.generate([3], strategy="beam", drafter="pearl"),
            InvalidInputError,
            "drafts",
        ),
        (lambda: MODEL.generate([3], strategy="beam", stop=["x"]), InvalidInputError, "stop"),
        (lambda: MODEL.generate([3], strategy="fsd", law=Law()), InvalidInputError, "not both"),
        (lambda: MODEL.generate([3], strategy=make("fsd"), k=3), InvalidInputError, "made already"),
        (lambda: MODEL.generate([3], strategy="top-p", top_p=0.0), InvalidInputError, "above 0"),
        (lambda: MODEL.generate([3], strategy="sample", min_p=2.0), InvalidInputError, "at most 1"),
        (
            lambda: MODEL.generate([3], strategy="dola", layers="mid"),
            InvalidInputError,
            "low, high",
        ),
        (
            lambda: Model(MODEL.target).generate([3], strategy="contrastive-decoding"),
            InvalidInputError,
            "weaker model",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(call, error, word):
    with pytest.raises(error, match=word) as caught:
        call()
    assert "\n" not in str(caught.value)


# transformers' doors


@pytest.mark.parametrize("name", ["Llama", "Bart"])
def test_beams_through_custom_generate_are_those_of_transformers(name):
    network, ids = tiny.network(name), torch.tensor([[0, 0, 5, 6, 7], [3, 4, 9, 8, 9]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 8}
    want = network.generate(**given, num_beams=4, do_sample=False)
    got = network.generate(
        **given, do_sample=False, custom_generate=make("beam", {"beams": 4}).as_generate()
    )
    assert torch.equal(got, want)


def test_strategies_through_custom_generate():
    network, ids = tiny.network("Llama"), torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    want = MODEL.generate(ids[0], max_new_tokens=8, strategy="contrastive-search").tokens
    for drafter in ("none", "prompt-lookup"):
        run = make("contrastive-search").as_generate(drafter)
        got = network.generate(**given, do_sample=False, custom_generate=run)
        assert got[0, 7:].tolist() == want
    # what transformers prepared stands before the strategy
    want = MODEL.generate(
        ids[0], max_new_tokens=8, strategy="fsd", alpha=0.2, repetition_penalty=1.4
    ).tokens
    run = strategies.FSD(alpha=0.2).as_generate()
    got = network.generate(**given, do_sample=False, repetition_penalty=1.4, custom_generate=run)
    assert got[0, 7:].tolist() == want
    with pytest.raises(InvalidInputError, match="takes no drafts"):
        make("beam").as_generate("prompt-lookup")
    with pytest.raises(InvalidInputError, match='strategy="beam"'):
        network.generate(**given, num_beams=2, custom_generate=make("greedy").as_generate())


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ({}, strategies.Greedy()),
        ({"do_sample": True}, strategies.Sample(top_k=50)),
        (
            {"do_sample": True, "top_k": 0, "typical_p": 0.9, "temperature": 0.7},
            strategies.Sample(temperature=0.7, typical=0.9),
        ),
        ({"num_beams": 5, "early_stopping": True}, strategies.Beam(5, early_stopping=True)),
    ],
)
def test_flags_of_a_generation_config(flags, want):
    assert strategies.from_generation_config(GenerationConfig(**flags)) == want


def test_flags_that_left_the_core():
    config = GenerationConfig(num_beams=4)
    config.num_beam_groups, config.diversity_penalty = 2, 0.7
    assert strategies.from_generation_config(config) == strategies.DiverseBeam(4, 2, 0.7)
    config = GenerationConfig(top_k=4)
    config.penalty_alpha = 0.5
    assert strategies.from_generation_config(config) == strategies.ContrastiveSearch(4, 0.5)
    config = GenerationConfig()
    config.dola_layers = "low"
    assert strategies.from_generation_config(config).layers == "low"
    with pytest.raises(InvalidInputError, match="no counterpart"):
        strategies.from_generation_config(GenerationConfig(num_beams=2, do_sample=True))


# the command line

COMMAND = [sys.executable, "-m", "isthmus.cli.main"]


def run(*arguments):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300)


def test_the_command_line_lists_and_runs_strategies():
    done = run("strategies", "--json")
    listed = {row["strategy"]: row for row in json.loads(done.stdout)["strategies"]}
    assert set(listed) == set(STRATEGIES)
    assert listed["contrastive-search"]["settings"] == {"k": "5", "alpha": "0.6"}
    assert listed["beam"]["drafts"] is False and listed["beam"]["why_not"]
    assert run("generate", "--strategy", "help").stdout.startswith("strategy")
    words = ("generate", "def add(a, b):", "-n", "8", "--json", "--strategy", "fsd")
    got = json.loads(run(*words, "--set", "k=3").stdout)
    assert (
        got["tokens"]
        == load().generate("def add(a, b):", max_new_tokens=8, strategy="fsd", k=3).tokens
    )
    for extra, word in ((("--set", "j=3"), "setting of fsd"), (("--set", "k"), "name=value")):
        done = run(*words, *extra)
        assert done.returncode == 2 and word in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
