import json
import socket
import threading
import time

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from serving_start import Running

import isthmus
from isthmus.decoding.model import Prompt
from isthmus.errors import InvalidInputError
from isthmus.serving.server import Limits

PROMPT = "def fibonacci(n):"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def generate(prompt=PROMPT, seed=0, **options):
    """What the file of prompts gives."""
    found = isthmus.load().generate_many([Prompt(prompt, seed=seed)], drafter="none", **options)
    return next(found)[1]


def test_the_openai_client_lists_and_completes(client):
    assert [model.id for model in client.models.list()] == ["pycode-t"]
    assert client.models.retrieve("pycode-t").owned_by == "isthmus"
    out = client.completions.create(model="pycode-t", prompt=PROMPT, max_tokens=20, temperature=0)
    want = isthmus.load().generate(PROMPT, max_new_tokens=20, drafter="none")
    assert out.choices[0].text == want.text and out.choices[0].finish_reason == "length"
    assert out.usage.completion_tokens == 20 and out.usage.prompt_tokens == 9


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 5},
        {"temperature": 0.7, "top_p": 0.9, "seed": 6},
    ],
)
def test_a_stream_is_the_answer_and_both_are_those_of_generate(client, options):
    asked = {"model": "pycode-t", "prompt": PROMPT, "max_tokens": 24, **options}
    whole = client.completions.create(**asked).choices[0].text
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    parts = list(stream)
    assert "".join(c.text for part in parts for c in part.choices) == whole
    assert parts[-1].usage.completion_tokens == 24 and not parts[-1].choices
    assert parts[-2].choices[0].finish_reason == "length"
    assert whole == generate(max_new_tokens=24, **options).text


def test_several_prompts_and_choices(client):
    asked = {"model": "pycode-t", "prompt": ["a = ", "b = "], "n": 2, "max_tokens": 8, "seed": 3}
    out = client.completions.create(**asked, temperature=1)
    assert [c.index for c in out.choices] == [0, 1, 2, 3]
    prompts = ("a = ", "a = ", "b = ", "b = ")
    for i, (choice, prompt) in enumerate(zip(out.choices, prompts, strict=True)):
        assert choice.text == generate(prompt, seed=3 + i, max_new_tokens=8, temperature=1.0).text
    assert out.usage.completion_tokens == 32


def test_chats_stop_strings_and_log_probabilities(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    asked = {"model": "pycode-t", "messages": messages, "temperature": 0}
    out = client.chat.completions.create(**asked, max_completion_tokens=10)
    plain = "system: Be brief.\nuser: Hello\nassistant:"
    want = isthmus.load().generate(plain, max_new_tokens=10, stop=["\nuser:"], drafter="none")
    assert out.choices[0].message.content == want.text
    stream = client.chat.completions.create(**asked, max_tokens=10, stream=True)
    deltas = [part.choices[0].delta for part in stream]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == want.text
    stopped = client.completions.create(
        model="pycode-t", prompt=PROMPT, temperature=0, max_tokens=30, stop=["self"], logprobs=2
    ).choices[0]
    assert "self" not in stopped.text and stopped.finish_reason == "stop"
    tokens = stopped.logprobs.tokens
    assert "".join(tokens).startswith(stopped.text)
    assert all(len(top) == 2 for top in stopped.logprobs.top_logprobs)
    assert all(p <= 0 for p in stopped.logprobs.token_logprobs)


def test_answers_keep_their_schema(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for seed in range(3):
        out = client.chat.completions.create(
            model="pycode-t",
            messages=[{"role": "user", "content": "A person:"}],
            response_format=wanted,
            max_tokens=120,
            seed=seed,
        ).choices[0]
        if out.finish_reason == "stop":
            found = json.loads(out.message.content)
            assert sorted(found) == ["age", "name"] and isinstance(found["age"], int)
    with pytest.raises(openai.BadRequestError, match="false"):
        client.completions.create(
            model="pycode-t",
            prompt="x",
            extra_body={
                "response_format": {"type": "json_schema", "json_schema": {"schema": False}}
            },
        )


def test_penalties_and_biases_change_what_they_should(client):
    base = {"model": "pycode-t", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    plain = client.completions.create(**base, logprobs=0).choices[0]
    repeated = max(plain.logprobs.tokens.count(t) for t in plain.logprobs.tokens)
    varied = client.completions.create(**base, logprobs=0, frequency_penalty=2).choices[0]
    assert max(varied.logprobs.tokens.count(t) for t in varied.logprobs.tokens) < repeated
    token = isthmus.load().encode(plain.text).tolist()[0]
    banned = client.completions.create(**base, logprobs=0, logit_bias={str(token): -100})
    assert banned.choices[0].text != plain.text


BAD = [
    ({"prompt": "x", "temperature": 9}, "temperature"),
    ({"prompt": "x", "nonsense": 1}, "nonsense"),
    ({"prompt": "x", "best_of": 5}, "best_of"),
    ({"prompt": "x", "n": 0}, "n: "),
    ({"prompt": ""}, "empty"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, -4]}, "prompt"),
    ({"prompt": [2**40]}, "prompt"),
    ({"prompt": [2**30]}, "outside the vocabulary"),
    ({"prompt": "x" * 20_000}, "shorten the prompt"),
    ({"prompt": "x", "max_tokens": 10_000}, "256 tokens at most"),
    ({"prompt": "x", "stop": [""]}, "stop string"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 1e9}}, "-100 to 100"),
    ({"prompt": "x", "response_format": {"type": "json_schema"}}, "json_schema"),
    ({}, "prompt"),
]


@pytest.mark.parametrize(("body", "words"), BAD)
def test_what_cannot_be_honoured_is_refused_in_one_line(served, body, words):
    answer = served.post("/v1/completions", **body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and words in error["message"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


RAW = [
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"prompt": "x", "temperature": NaN}', 400),
    (b"[" * 30_000, 400),
    (b"null", 400),
    (b"", 400),
    (b'{"prompt": "' + b"x" * 60_000 + b'"}', 413),
]


@pytest.mark.parametrize(("body", "status"), RAW)
@pytest.mark.parametrize("chunked", [False, True])
def test_malformed_bodies_are_no_server_errors(served, body, status, chunked):
    content = iter([body[:100], body[100:]]) if chunked else body
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_unknown_models_paths_and_methods(served):
    assert served.post("/v1/completions", prompt="x", model="gpt-9").status_code == 404
    assert served.post("/v1/nothing").status_code in (404, 405)
    assert httpx.get(f"{served.url}/v1/completions").status_code in (404, 405)
    assert httpx.get(f"{served.url}/v1/models/other").json()["error"]["code"] == 404


def test_another_sites_page_cannot_call_it_by_a_name_of_its_own(served):
    answer = httpx.get(f"{served.url}/health", headers={"host": "evil.example:80"})
    assert answer.status_code == 421
    page = httpx.get(f"{served.url}/")
    assert (
        "script-src 'self'" in page.headers["content-security-policy"] and page.status_code == 200
    )


def slow(running: Running, **options) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True, **options}
    return httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60)


def test_a_client_that_leaves_frees_its_place(served):
    for _ in range(6):
        with slow(served) as answer:
            next(answer.iter_lines())
    assert served.idle()
    socket_ = socket.create_connection(served.url.removeprefix("http://").split(":"))
    body = json.dumps({"prompt": PROMPT, "max_tokens": 250, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    socket_.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    socket_.close()
    assert served.idle()
    out = served.post("/v1/completions", prompt=PROMPT, max_tokens=8, temperature=0).json()
    assert out["choices"][0]["text"] == generate(max_new_tokens=8).text


def test_a_full_line_is_answered_with_429(serve):
    running = serve(limits=Limits(batch_size=1, queue=1))
    with slow(running, max_tokens=1000) as first:
        lines = first.iter_lines()  # kept: a stream that nobody holds is closed
        next(lines)
        body = {"prompt": "x", "max_tokens": 1}
        second = threading.Thread(target=running.post, args=("/v1/completions",), kwargs=body)
        second.start()
        until = time.time() + 10
        while not running.engine.waiting and time.time() < until:
            time.sleep(0.005)
        answer = running.post("/v1/completions", prompt="x", max_tokens=1)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
    second.join(30)
    assert running.idle()
    assert running.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200


def test_a_time_limit(serve):
    running = serve(limits=Limits(timeout_s=0.05))
    asked = {"prompt": PROMPT, "max_tokens": 1000, "ignore_eos": True}
    answer = running.post("/v1/completions", **asked)
    assert answer.status_code == 504 and "0.05 s" in answer.json()["error"]["message"]
    streamed = running.post("/v1/completions", **asked, stream=True).text
    assert '"code": 504' in streamed or '"code":504' in streamed
    assert running.idle()


def test_the_key_is_asked_for(serve):
    running = serve(api_key="sesame")
    assert running.post("/v1/completions", prompt="x").status_code == 401
    assert httpx.get(f"{running.url}/health").status_code == 200
    for key, status in (("sesame", 200), ("sesam", 401), ("sesame1", 401), ("x", 401)):
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == status
    good = openai.OpenAI(base_url=f"{running.url}/v1", api_key="sesame")
    assert good.models.list().data
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="no").models.list()


def test_shutting_down_finishes_streams(serve):
    running = serve()
    with slow(running) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.server.should_exit = True
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"length"' in rest[-2]


def test_metrics_and_logs_tell_without_the_prompt(served):
    secret = "xyzzy_secret"
    served.post("/v1/completions", prompt=secret, max_tokens=4)
    text = httpx.get(f"{served.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["isthmus_generated_tokens_total"]) > 4
    assert float(values["isthmus_requests_running"]) == 0
    assert (
        values['isthmus_request_seconds_bucket{le="+Inf"}']
        == values["isthmus_request_seconds_count"]
    )
    line = json.loads(served.logs[-1])
    assert (
        line["new_tokens"] == 4 and line["status"] == 200 and line["endpoint"] == "text_completion"
    )
    assert not any(secret in entry for entry in served.logs) and secret not in text


def test_a_slow_reader_holds_nobody_up(served):
    with slow(served, max_tokens=250) as answer:
        lines = answer.iter_lines()
        next(lines)  # and no more for now
        start = time.perf_counter()
        out = served.post("/v1/completions", prompt=PROMPT, max_tokens=8, temperature=0).json()
        assert out["choices"][0]["text"] == generate(max_new_tokens=8).text
        assert time.perf_counter() - start < 10


def test_many_at_once_get_their_own_answers(served):
    found = {}

    def ask(seed):
        options = {"temperature": float(seed % 3) / 2, "seed": seed, "max_tokens": 12}
        while True:
            answer = served.post("/v1/completions", prompt=PROMPT, **options)
            if answer.status_code != 429:
                found[seed] = answer.json()["choices"][0]["text"], options
                return
            time.sleep(0.05)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 24
    for seed, (text, options) in found.items():
        want = generate(seed=seed, max_new_tokens=12, temperature=options["temperature"])
        assert text == want.text


def test_limits_out_of_range():
    with pytest.raises(InvalidInputError, match="timeout_s must be positive"):
        Limits(timeout_s=0)


def test_no_request_that_the_description_allows_makes_a_server_error(served):
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    tried = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def probe(case):
            answer = case.call(timeout=30)
            assert answer.status_code < 500, answer.text

        probe()
        tried.append(operation.label)
    assert {"POST /v1/completions", "POST /v1/chat/completions", "GET /metrics"} <= {*tried}
    assert served.idle()
