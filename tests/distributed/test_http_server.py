"""A server of real ranks, asked by real clients."""

import json
import os
import signal
import threading
import time

import pytest

pytestmark = pytest.mark.distributed

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.distributed.http_server import BEYOND, Server, save_byte_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("http") / "tiny"
    save_byte_model(path)
    return path


@pytest.fixture(scope="module")
def server(model):
    server = Server(model, 1)
    yield server
    server.close()


def test_the_openai_client_gets_the_same_text_in_one_piece_and_in_many(server):
    client = server.openai
    assert [found.id for found in client.models.list()] == ["tiny"]
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.usage.prompt_tokens == 5
    assert 1 <= whole.usage.completion_tokens <= 24
    usage = {"include_usage": True}
    events = list(client.completions.create(**asked, stream=True, stream_options=usage))
    assert "".join(c.text for e in events for c in e.choices) == whole.choices[0].text
    assert events[-1].usage == whole.usage
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason

    text = whole.choices[0].text
    middle = text[len(text) // 2]
    stopped = client.completions.create(**asked, stop=middle).choices[0]
    assert stopped.text == text[: text.index(middle)]
    assert stopped.finish_reason == "stop"

    two = client.completions.create(**asked | {"prompt": ["Hello", "Hi"]}, n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text == text


def test_the_openai_client_holds_a_conversation(server):
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Who?"}],
        "max_completion_tokens": 12,
        "seed": 3,
    }
    whole = server.openai.chat.completions.create(**asked)
    assert whole.usage.prompt_tokens == len("user: Who?\n")
    events = list(server.openai.chat.completions.create(**asked, stream=True))
    pieces = [choice.delta.content or "" for event in events for choice in event.choices]
    assert "".join(pieces) == whole.choices[0].message.content


def test_a_prompt_that_begins_alike_is_computed_in_part_and_answered_the_same(model, server):
    text = "You are a helpful assistant. "  # 29 tokens: a block and a part of one
    prompts = [text + "Why?", text + "Who are you?", text + "Why?", "Say: " + text]
    asked = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    without = Server(model, 1, "--semantic-ep-serve-prefix-cache", "false")
    try:
        want = [without.post(prompt=prompt, **asked).json() for prompt in prompts]
        told = without.http.get("/metrics").text
    finally:
        without.close()
    assert 'prefix_cache_queries_total{model_name="tiny"} 0.0' in told
    got = [server.post(prompt=prompt, **asked).json() for prompt in prompts]
    assert [g["choices"] for g in got] == [w["choices"] for w in want]
    for answers, cached in ((want, [0, 0, 0, 0]), (got, [0, 16, 32, 0])):
        usage = [answer["usage"] for answer in answers]
        assert [u["prompt_tokens"] for u in usage] == [33, 41, 33, 34]
        assert [u["prompt_tokens_details"]["cached_tokens"] for u in usage] == cached

    client = server.openai
    include = {"stream_options": {"include_usage": True}, "model": "tiny", "stream": True}
    *_, last = client.completions.create(prompt=prompts[:2], n=2, **include, max_tokens=1)
    # Each prompt once, as in the number of its tokens.
    assert last.usage.prompt_tokens_details.cached_tokens == 32 + 32
    messages = [{"role": "user", "content": text * 2}]
    for _ in range(2):
        chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    assert chat.usage.prompt_tokens_details.cached_tokens == 64
    assert chat.usage.prompt_tokens == len(f"user: {text * 2}\n") == 65


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": ""}, 400, "invalid_value"),
        ({"prompt": []}, 400, "invalid_value"),
        ({"prompt": "a", "max_tokens": -1}, 400, "invalid_value"),
        ({"prompt": "a", "max_tokens": "5"}, 400, "invalid_value"),
        ({"prompt": "a", "max_tokens": 513}, 400, "invalid_value"),
        ({"prompt": [10**6]}, 400, "invalid_value"),
        ({"prompt": "a", "temprature": 1}, 400, "invalid_value"),
        ({"prompt": "a", "logprobs": 21}, 400, "invalid_value"),
        ({"prompt": "a", "best_of": 2}, 400, "invalid_value"),
        ({"prompt": "\ud800"}, 400, None),
        ({"prompt": "a", "n": 100}, 400, None),
        ({"prompt": "a", "model": "other"}, 404, "model_not_found"),
        ({"prompt": "a" * 5 * 2**20}, 413, "body_too_large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_body_is_refused_in_the_shape_that_clients_know(server, body, status, code):
    content = json.dumps({"model": "tiny", **body})
    answer = server.http.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["code"] == code


def test_a_text_with_a_token_that_the_model_lacks_is_refused(server):
    chat = {"messages": [{"role": "user", "content": BEYOND}]}
    for path, body in (
        ("/v1/completions", {"prompt": f"a{BEYOND}"}),
        ("/v1/completions", {"prompt": ["a", BEYOND]}),
        ("/v1/chat/completions", chat),
    ):
        answer = server.post(path, **body)
        assert answer.status_code == 400, answer.text
        assert "not in the vocabulary" in answer.json()["error"]["message"]
    assert server.post(prompt="a", max_tokens=1).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[1]"])
def test_bodies_that_are_no_json_object_are_refused(server, content):
    answer = server.http.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_only_probes_are_open_without_a_key(server):
    for path, status in (("/health", 200), ("/ready", 200), ("/v1/models", 401)):
        assert httpx.get(server.url + path).status_code == status
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_extreme_sampling_settings_do_not_stop_the_engine(server):
    for extreme in ({"temperature": 5e-324}, {"top_k": 2**31 - 1}, {"top_p": 5e-324}):
        answer = server.post(prompt="a", max_tokens=2, **extreme)
        assert answer.status_code == 200, answer.text
    assert server.ready()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_leaves_its_place_to_others(server, stream):
    # As many sequences as may be under way together.
    slow = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 16, "stream": stream}
    with httpx.Client(base_url=server.url, headers=server.http.headers, timeout=0.5) as client:
        asked = client.build_request("POST", "/v1/completions", json={"model": "tiny", **slow})
        if stream:
            answer = client.send(asked, stream=True)
            lines = answer.iter_lines()  # kept: collecting the iterator would close the stream
            assert next(lines).startswith("data: {")
            full = server.post(prompt="a", max_tokens=1)
            assert full.status_code == 429, full.text
            assert int(full.headers["Retry-After"]) >= 1
            answer.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(asked)
    start = time.monotonic()
    while server.post(prompt="a", max_tokens=1).status_code == 429:
        assert time.monotonic() - start < 20
        time.sleep(0.05)


def _in_background(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def test_in_attention_tp_answers_are_the_same_and_end_with_an_error_when_a_rank_is_killed(
    model, server
):
    alone = server
    server = Server(model, 2, "--semantic-ep-serve-attention", "tp")
    try:
        asked = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "temperature": 0}
        short = asked | {"max_tokens": 12}
        assert server.post(**short).json()["choices"] == alone.post(**short).json()["choices"]
        thread, answers = _in_background(lambda: server.post(**asked))
        time.sleep(0.3)
        server.ranks[1].send_signal(signal.SIGKILL)
        start = time.monotonic()
        thread.join(60)
        assert answers[0].status_code == 503, answers[0].text
        assert "died or stopped answering" in answers[0].json()["error"]["message"]
        assert server.ranks[0].wait(60) == 2
        assert time.monotonic() - start < 60
        assert not server.ready()
        assert "error: " in server.said(0)
    finally:
        server.close()


# The last one: it ends the server that the tests above share.
def test_sigterm_lets_requests_finish_and_refuses_new_ones(server):
    asked = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}
    thread, answers = _in_background(lambda: server.post(**asked))
    time.sleep(0.2)
    os.kill(server.ranks[0].pid, signal.SIGTERM)
    os.kill(server.ranks[0].pid, signal.SIGTERM)
    late = server.post(prompt="a")
    assert late.status_code == 503
    assert late.json()["error"]["code"] == "draining"
    thread.join(60)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 400
    assert server.ranks[0].wait(30) == 0, server.said(0)
