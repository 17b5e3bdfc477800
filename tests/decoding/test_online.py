import json
import threading
import time

import pytest
import tiny
import torch

import isthmus
from isthmus.decoding.model import Prompt
from isthmus.decoding.online import BusyError, Online, wait
from isthmus.errors import InvalidInputError


def ignore(job, tokens):
    pass


def prompts():
    return [p.tolist() for p in tiny.prompts((9, 13, 6, 11, 7))]


@pytest.fixture
def engine():
    made = Online(tiny.facade("Llama"), batch_size=4, queue=8)
    yield made
    made.stop()


def ask(engine, prompt, listener=ignore, **options):
    job = engine.prepare(prompt, listener, max_new_tokens=12, ignore_end=True, **options)
    engine.submit([job])
    return job


OPTIONS = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 20, "seed": 4},
    {"repetition_penalty": 1.3},
    {"temperature": 1.3, "top_p": 0.8, "seed": 5},
]


def alone(prompt, seed=0, **sampling):
    model = tiny.facade("Llama")
    asked = [Prompt(prompt, seed=seed)]
    found = model.generate_many(
        asked, max_new_tokens=12, drafter="none", ignore_end=True, **sampling
    )
    return next(found)[1].tokens


def test_each_answer_is_that_of_its_own_law_whoever_shares_the_batch(engine):
    for _ in range(3):
        jobs = [ask(engine, p, **o) for p, o in zip(prompts(), OPTIONS, strict=True)]
        for job, prompt, options in zip(jobs, prompts(), OPTIONS, strict=True):
            assert wait(job, 20).tokens == alone(prompt, **options), options


def test_tokens_come_as_they_are_accepted_and_the_end_is_told(engine):
    told = []
    job = ask(engine, prompts()[0], lambda job, tokens: told.append(list(tokens)))
    wait(job, 20)
    time.sleep(0.05)
    flat = [token for some in told for token in some]
    assert flat == job.result.tokens and told[-1] == [] and [] not in told[:-1]
    assert job.result.finish_reason == "length"


def test_log_probabilities_are_the_models_own(engine):
    job = ask(engine, prompts()[1], logprobs=3, temperature=0.9, seed=1)
    tokens = wait(job, 20).tokens
    assert [entry.token for entry in job.logprobs] == tokens
    ids = torch.tensor([[*prompts()[1], *tokens]])
    with torch.no_grad():
        laws = torch.log_softmax(tiny.network("Llama")(ids).logits[0].float(), -1)
    for i, entry in enumerate(job.logprobs):
        law = laws[len(prompts()[1]) + i - 1]
        assert entry.logprob == pytest.approx(float(law[tokens[i]]), abs=1e-4)
        assert [t for t, _ in entry.top] == law.topk(3).indices.tolist()


def test_a_cancelled_request_frees_its_place_and_disturbs_nobody():
    engine = Online(tiny.facade("Llama"), batch_size=2, queue=8)
    release = threading.Event()
    slow = engine.prepare(
        prompts()[0], lambda job, t: release.wait(5), max_new_tokens=60, ignore_end=True
    )
    engine.submit([slow])
    others = [ask(engine, p) for p in prompts()[1:4]]
    others[2].cancel()
    slow.cancel()
    release.set()
    assert wait(slow, 20).finish_reason == "cancelled" and len(slow.result.tokens) < 60
    assert wait(others[2], 20).finish_reason == "cancelled" and not others[2].result.tokens
    for job, prompt in zip(others[:2], prompts()[1:3], strict=True):
        assert wait(job, 20).tokens == alone(prompt)
    deadline = time.time() + 5
    while engine.running and time.time() < deadline:
        time.sleep(0.01)
    assert engine.running == engine.waiting == 0
    engine.stop()


def test_a_full_line_is_refused_and_takes_requests_again_later():
    engine = Online(tiny.facade("Llama"), batch_size=1, queue=1)
    release = threading.Event()
    first = ask(engine, prompts()[0], lambda job, tokens: release.wait(5))
    while not engine.running:
        time.sleep(0.01)
    second = ask(engine, prompts()[1])
    with pytest.raises(BusyError, match="ask again later"):
        ask(engine, prompts()[2])
    release.set()
    assert wait(first, 20).tokens and wait(second, 20).tokens
    assert wait(ask(engine, prompts()[2]), 20).tokens == alone(prompts()[2])
    engine.stop()


def test_stopping_finishes_what_was_taken():
    engine = Online(tiny.facade("Llama"), batch_size=2)
    jobs = [ask(engine, p) for p in prompts()]
    engine.stop()
    assert [len(job.result.tokens) for job in jobs] == [12] * 5
    with pytest.raises(BusyError, match="shutting down"):
        ask(engine, prompts()[0])


def test_a_batch_that_fails_does_not_end_the_engine(engine, caplog):
    def fail(ids, scores):
        raise RuntimeError("out of memory, say")

    broken = wait(ask(engine, prompts()[0], processors=[fail]), 20)
    assert broken.finish_reason == "error" and "out of memory" in broken.notes[-1]
    assert wait(ask(engine, prompts()[1]), 20).tokens == alone(prompts()[1])


def test_a_listener_that_fails_ends_its_own_request_only(engine, caplog):
    def fail(job, tokens):
        raise RuntimeError("gone")

    jobs = [ask(engine, prompts()[0], fail), ask(engine, prompts()[1])]
    assert wait(jobs[0], 20).finish_reason == "error"
    assert wait(jobs[1], 20).tokens == alone(prompts()[1])


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 500, {}, "shorten the prompt"),
        ([1, 2], {"temperature": -1.0}, "temperature must be within"),
        ([1, 10**6], {}, "outside the vocabulary"),
    ],
)
def test_bad_requests_are_refused_before_they_reach_the_line(engine, prompt, options, words):
    with pytest.raises(InvalidInputError, match=words):
        ask(engine, prompt, **options)


def test_constraints_hold_for_their_own_request_only():
    engine = Online(isthmus.load(), batch_size=4)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    free = engine.prepare("def add(a, b):", ignore, max_new_tokens=12)
    bound = engine.prepare("x = ", ignore, max_new_tokens=40, constraint=schema, temperature=1.0)
    engine.submit([free, bound])
    assert wait(free, 60).text == isthmus.load().generate("def add(a, b):", max_new_tokens=12).text
    assert list(json.loads(wait(bound, 60).text)) == ["n"]
    engine.stop()
