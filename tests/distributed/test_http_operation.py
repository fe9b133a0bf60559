"""Operating a server: what it measures, recording and another plan, fuzz, and many requests."""

import os
import re

import pytest

pytestmark = pytest.mark.distributed

httpx = pytest.importorskip("httpx")
psutil = pytest.importorskip("psutil")
pytest.importorskip("openai")
pytest.importorskip("fastapi")
prometheus = pytest.importorskip("prometheus_client.parser")

from semantic_ep.apply.checkpoint import checkpoint_fingerprint
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.policies import policy
from semantic_ep.plan.schedule import Schedule
from tests.distributed.http_server import KEY, Server, save_byte_model, wait_until
from tests.distributed.test_serve_engine import EXPERTS, LAYERS, contiguous
from tests.distributed.test_serve_group import save_plan

PROMPTS = ["Hello", "def main():", "What is it?", "0123456789"]
# The suite sends fewer; see docs/serving.md.
LEAK_REQUESTS = int(os.environ.get("LEAK_REQUESTS", "200"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("http") / "tiny"
    save_byte_model(path)
    return path


@pytest.fixture(scope="module")
def admin_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("admin")


@pytest.fixture(scope="module")
def server(model, admin_dir):
    plan = save_plan(admin_dir / "first", model, contiguous(2))
    server = Server(model, 2, "--plan", str(plan), "--admin-dir", str(admin_dir))
    yield server
    server.close()


def metrics(server):
    """Value by (name, what distinguishes the series)."""
    answer = server.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    found = {}
    for family in prometheus.text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            name = sample.name.removeprefix("semantic_ep:")
            found[name, *labels.values()] = sample.value
    return found


def idle(server):
    # Ranks tell their counters twice a second.
    def all_told():
        now = metrics(server)
        running = now["num_requests_running",] + now["num_requests_waiting",]
        return not running and now["generation_tokens_total",] == expected_tokens(now)

    def expected_tokens(now):
        return now["request_generation_tokens_sum",]

    wait_until(all_told, seconds=30)
    return metrics(server)


def ask(server, prompts=PROMPTS):
    answer = server.post(prompt=prompts, max_tokens=6, temperature=0, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def test_metrics_tell_what_was_served_and_what_crossed_links(server):
    ask(server)
    told = idle(server)
    assert told["prompt_tokens_total",] == sum(map(len, PROMPTS))
    assert told["generation_tokens_total",] == 6 * len(PROMPTS)
    assert told["request_success_total", "length"] == len(PROMPTS)
    assert told["request_success_total", "abort"] == 0
    assert told["time_to_first_token_seconds_count",] == len(PROMPTS)
    assert told["inter_token_latency_seconds_count",] == 5 * len(PROMPTS)
    assert told["request_time_per_output_token_seconds_count",] == len(PROMPTS)
    assert told["e2e_request_latency_seconds_count",] == len(PROMPTS)
    mean = told["e2e_request_latency_seconds_sum",] / len(PROMPTS)
    assert told["time_to_first_token_seconds_sum",] / len(PROMPTS) <= mean
    assert told["kv_cache_usage_perc",] == 0
    assert 0 < told["local_activation_rate",] < 1
    assert 0 < told["remote_copies",] < 1
    assert 0.5 <= told["balance",] <= 1
    assert told["exchange_bytes_total", "node"] > 0
    assert told["exchange_bytes_total", "network"] == 0
    passed = sum(map(len, PROMPTS)) + 5 * len(PROMPTS)
    computed = [told["rank_computed_activations_total", str(rank)] for rank in range(2)]
    assert sum(computed) == 2 * LAYERS * passed
    assert ("routing_drift",) not in told


def test_what_each_rank_holds_and_took_to_load_is_told(server):
    said = re.search(
        r"experts of ([\d.]+) of ([\d.]+) MB.*peak memory of the ranks (.*) MB", server.said()
    )
    held, total, peak = said.groups()
    assert float(total) == pytest.approx(2 * float(held), abs=0.1)
    assert all(float(megabytes) > 50 for megabytes in peak.split(" / "))


def test_served_routing_becomes_a_profile_and_its_plan_is_taken_over(server, model, admin_dir):
    refused = server.http.post("/stop_expert_distribution_record")
    assert refused.status_code == 400
    assert "not being recorded" in refused.json()["error"]["message"]
    assert server.http.post("/start_expert_distribution_record").status_code == 200
    before = ask(server)
    assert server.http.get("/stop_expert_distribution_record").json()["status"] == "stopped"
    dumped = server.http.post("/dump_expert_distribution_record").json()
    assert dumped["tokens"] == sum(map(len, PROMPTS)) + 5 * len(PROMPTS)

    profile = RoutingProfile.read(admin_dir / dumped["profile"])
    placement = policy("semantic-requests").place(profile, ep_size=2, seed=0)
    Plan(
        placement=placement,
        schedule=Schedule.from_profile(profile, placement),
        verdict={},
        fingerprint=checkpoint_fingerprint(model),
    ).save(admin_dir / "second")
    body = {"plan": "second", "profile": dumped["profile"]}
    moved = server.http.post("/reload_plan", json=body)
    assert moved.status_code == 200, moved.text
    assert 0 < moved.json()["experts_moved"] <= LAYERS * EXPERTS
    assert ask(server) == before
    told = idle(server)
    assert told["plan_reloads_total",] == 1
    # The same text was served under the new plan, and nothing else.
    assert told["routing_drift",] < 1e-6
    ask(server, ["zzzzzzzzzzzzzzzzzzzzzzzzzzzzz"])
    assert idle(server)["routing_drift",] > 1e-3


def test_a_profile_that_cannot_be_written_is_no_fault_of_the_client(server, admin_dir):
    aside = admin_dir.with_name("aside")
    assert server.http.post("/start_expert_distribution_record").status_code == 200
    admin_dir.rename(aside)
    admin_dir.write_text("in the way")
    try:
        answer = server.http.post("/dump_expert_distribution_record")
    finally:
        admin_dir.unlink()
        aside.rename(admin_dir)
    assert answer.status_code == 507, answer.text
    assert "cannot write this profile" in answer.json()["error"]["message"]
    # What was counted is not lost.
    assert server.http.post("/dump_expert_distribution_record").json()["tokens"] == 0
    assert server.http.post("/stop_expert_distribution_record").status_code == 200


@pytest.mark.parametrize(
    "body",
    [{"plan": "../first"}, {"plan": "/first"}, {"plan": ".."}, {"plan": "nowhere"}, {}]
    + [{"plan": "first", "decode_plan": name} for name in ("first", "../first", "nowhere")],
    ids=str,
)
def test_plans_are_read_from_the_admin_directory_only(server, body):
    answer = server.http.post("/reload_plan", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_log_probabilities_are_those_of_the_tokens_that_were_chosen(server):
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 5, "temperature": 0, "logprobs": 2}
    whole = server.openai.completions.create(**asked).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.top_logprobs) >= 1
    for own, top in zip(whole.token_logprobs, whole.top_logprobs, strict=True):
        assert own == max(top.values()) <= 0
    parts = [e.choices[0].logprobs for e in server.openai.completions.create(**asked, stream=True)]
    joined = [value for part in parts if part for value in part.token_logprobs]
    assert joined == pytest.approx(whole.token_logprobs, abs=1e-4)
    assert [at for part in parts if part for at in part.text_offset] == whole.text_offset

    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4}
    told = server.openai.chat.completions.create(**chat, logprobs=True, top_logprobs=3, seed=1)
    for token in told.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= token.top_logprobs[0].logprob
        assert bytes(token.bytes).decode() == token.token
    plain = server.openai.chat.completions.create(**chat, seed=1)
    assert plain.choices[0].logprobs is None


def test_when_kv_space_runs_out_sequences_wait_or_are_computed_again(server):
    before = metrics(server)["num_preemptions_total",]
    # The scheduler expects short answers by now: together these need more than there is.
    long = server.post(prompt="a", max_tokens=300, ignore_eos=True, n=16, temperature=0)
    assert long.status_code == 200, long.text
    assert long.json()["usage"]["completion_tokens"] == 16 * 300
    assert len({choice["text"] for choice in long.json()["choices"]}) == 1
    told = idle(server)
    assert told["num_preemptions_total",] > before
    assert told["kv_cache_usage_perc",] == 0


def test_no_request_that_the_document_allows_or_forbids_makes_the_server_fail(server):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from schemathesis import GenerationMode

    headers = {"Authorization": f"Bearer {KEY}"}
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    document.config.generation.update(modes=list(GenerationMode))
    operations = [found.ok() for found in document.get_all_operations()]
    assert {operation.path for operation in operations} >= {
        "/v1/completions",
        "/v1/chat/completions",
        "/metrics",
        "/reload_plan",
    }
    for operation in operations:
        cases = st.one_of([operation.as_strategy(generation_mode=m) for m in GenerationMode])

        @settings(
            max_examples=40 if operation.method.upper() == "POST" else 3,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def never_fails(case):
            # Long answers would only take time.
            if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
                case.body["max_tokens"] = min(case.body["max_tokens"], 4)
            answer = case.call(headers=headers, timeout=60)
            assert answer.status_code < 500, (case.body, answer.text)
            if answer.status_code >= 400 and "error" not in answer.json():
                raise AssertionError(answer.text)

        never_fails()
    assert server.ready()


@pytest.mark.timeout(600 + LEAK_REQUESTS // 4)
def test_memory_stays_flat_over_many_short_requests(server):
    rank = psutil.Process(server.ranks[0].pid)

    def serve(count):
        for number in range(count):
            stream = number % 4 == 0
            answer = server.post(prompt="Hello" * (1 + number % 7), max_tokens=2, stream=stream)
            assert answer.status_code == 200, answer.text

    serve(LEAK_REQUESTS // 4)
    before = rank.memory_info().rss
    serve(LEAK_REQUESTS)
    assert rank.memory_info().rss - before < 8e6
    assert idle(server)["kv_cache_usage_perc",] == 0
