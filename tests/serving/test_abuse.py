"""What hostile or hasty clients do, and what it must not do to the others."""

import json
import socket
import subprocess
import sys
import time

import httpx
import pytest

import isthmus
from isthmus.serving.server import Limits

PROMPT = "def fibonacci(n):"
LONG = {"prompt": PROMPT, "max_tokens": 250, "ignore_eos": True}


def connect(running):
    return socket.create_connection(running.url.removeprefix("http://").split(":"), 20)


def head(length):
    lines = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    return f"{lines}\r\ncontent-length: {length}\r\n\r\n".encode()


def test_who_leaves_a_whole_answer_frees_the_place_while_tokens_still_come(serve):
    running = serve(limits=Limits(batch_size=2))
    body = json.dumps({**LONG, "max_tokens": 4000}).encode()
    with connect(running) as link:
        link.sendall(head(len(body)) + body)
        while not running.engine.running:
            time.sleep(0.01)
        (job,) = running.engine._jobs.values()
        heard = job.listener

        def slowly(job, tokens):  # on a busy machine all would be written before anybody looks
            time.sleep(0.01)
            heard(job, tokens)

        job.listener = slowly
        while not job.result.tokens:
            time.sleep(0.01)
    assert running.idle()
    assert job.result.finish_reason == "cancelled" and len(job.result.tokens) < 3500


def test_a_stream_shows_nothing_of_a_stop_string(served):
    asked = {"prompt": PROMPT, "max_tokens": 48, "seed": 1}
    for temperature in (0.0, 1.0):
        for stop in ("\n\n", ":\n", "return", "    "):
            body = {**asked, "temperature": temperature, "stop": [stop]}
            whole = served.post("/v1/completions", **body).json()["choices"][0]["text"]
            stream = served.post("/v1/completions", **body, stream=True).text
            events = [line[6:] for line in stream.splitlines() if line.startswith("data: {")]
            shown = "".join(json.loads(event)["choices"][0]["text"] for event in events)
            assert shown == whole and stop not in shown


def test_a_body_that_trickles_is_refused(serve):
    running = serve(limits=Limits(timeout_s=0.3))
    with connect(running) as link:
        link.sendall(head(100) + b'{"prompt"')
        answer = link.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive" in answer


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "half a \ud800 pair"},
        {"prompt": "x", "stop": "\ud800"},
        {"model": "\ud800", "prompt": "x"},
        {
            "prompt": "x",
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"enum": ["\ud800"]}},
            },
        },
        {"prompt": ["x"] * 3, "n": 16},
    ],
)
def test_no_text_and_no_number_of_choices_is_a_server_error(served, body):
    content = json.dumps(body).encode()  # with escapes, as httpx itself would not send them
    answer = httpx.post(
        f"{served.url}/v1/completions",
        content=content,
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"]


def test_the_seed_gives_the_text_of_isthmus_generate_whoever_drafts(served):
    model = isthmus.load()
    for seed in range(3):
        options = {"temperature": 0.9, "top_p": 0.95}
        answer = served.post("/v1/completions", prompt=PROMPT, max_tokens=32, seed=seed, **options)
        for drafter in ("none", "auto", "prompt-lookup", "token-recycling"):
            want = model.generate(
                PROMPT, max_new_tokens=32, seed=seed, drafter=drafter, **options
            ).text
            assert answer.json()["choices"][0]["text"] == want


def test_a_newcomer_does_not_wait_for_a_quarter_of_the_batch(serve):
    running = serve(limits=Limits(batch_size=16))
    engine = running.engine
    slow = [
        engine.prepare(PROMPT, lambda *a: None, max_new_tokens=600, ignore_end=True)
        for _ in range(14)
    ]
    engine.submit(slow)
    while not slow[0].result.tokens:
        time.sleep(0.005)
    quick = engine.prepare(PROMPT, lambda *a: None, max_new_tokens=4)
    engine.submit([quick])
    assert quick.done.wait(30)
    assert not any(job.done.is_set() for job in slow)
    for job in slow:
        job.cancel()
    assert running.idle()


def test_the_load_test_finds_everything_in_order():
    command = [sys.executable, "-m", "isthmus.cli.main", "bench", "serve", "--clients", "8"]
    command += ["--seconds", "2", "--requests", "8", "--max-tokens", "24", "--peer", "", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["load"]["wrong"] == []
    assert found["places_free"] and found["finished_when_told"]
    assert found["load"]["asked"]["honest"] == found["load"]["right"]["honest"] > 0
