import hashlib
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semantic_ep.artifacts import MANIFEST
from semantic_ep.errors import ArtifactError, FingerprintError, SemanticEPError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.plan import Plan
from semantic_ep.report.build import build_report
from semantic_ep.report.semantics import visible
from tests.unit.report.synthetic_run import HIDDEN_BYTES, KINDS, RANKS, WORDS, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "study")


@pytest.fixture(scope="module")
def report(run):
    return build_report(run.path)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run.path, tmp_path / "study")


def rewrite_serve(directory, change):
    file = directory / "serve.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def number(report, identity):
    (found,) = [entry for entry in report["headline"]["numbers"] if entry["id"] == identity]
    return found


def test_the_four_numbers_are_those_that_serving_counted(run, report):
    modes = run.serve["modes"]
    for identity, field in (("lar", "lar"), ("remote_copies", "remote_copies")):
        entry = number(report, identity)
        assert entry["before"] == pytest.approx(np.mean(modes["contiguous"][field]))
        assert entry["after"] == pytest.approx(np.mean(modes["semantic"][field]))
        assert entry["source"].startswith("serve.json: modes.*")
    for side, mode in (("before", "contiguous"), ("after", "semantic")):
        sent = np.array(modes[mode]["bytes_dispatch"]) + np.array(modes[mode]["bytes_combine"])
        assert number(report, "wire_bytes")[side] == sent.sum() - np.trace(sent)
        load = np.array(modes[mode]["rank_load"])
        busiest = (load.max(axis=1) / load.mean(axis=1)).mean()
        assert number(report, "busiest_rank")[side] == pytest.approx(busiest)
    assert report["headline"]["answer"] == "yes"
    assert (
        "fewer all-to-all bytes on 4 ranks, with identical outputs"
        in (report["headline"]["sentence"])
    )


def test_what_stays_on_its_rank_is_no_traffic(copy):
    def add_local_bytes(data):
        for mode in data["modes"].values():
            mode["bytes_dispatch"][1][1] = 10**12

    before = build_report(copy)["serve"]["modes"]
    rewrite_serve(copy, add_local_bytes)
    after = build_report(copy)["serve"]["modes"]
    assert after["before"]["wire_bytes_total"] == before["before"]["wire_bytes_total"]


def test_other_links_are_predicted_from_the_busiest_rank_of_each_phase(run, report):
    for row in report["serve"]["links"]:
        for side, mode in (("before", "contiguous"), ("after", "semantic")):
            busiest = 0
            for phase in ("bytes_dispatch", "bytes_combine"):
                sent = np.array(run.serve["modes"][mode][phase])
                np.fill_diagonal(sent, 0)
                busiest += max(sent.sum(axis=0).max(), sent.sum(axis=1).max())
            expected = busiest / (1e9 * row["gigabytes_per_second"])
            assert row[f"{side}_seconds"] == pytest.approx(expected)
        assert row["saved_seconds"] > 0


def test_schedules_stay_between_floor_and_ceiling_on_held_out_routing(report):
    rows = {row["id"]: row["lar_mean"] for row in report["held_out"]["schedules"]}
    assert rows["contiguous"] == pytest.approx(1 / RANKS, abs=0.03)
    assert rows["contiguous"] + 0.2 < rows["tokens"] < rows["tokens_ceiling"]
    assert rows["contiguous"] + 0.2 < rows["requests"] <= rows["requests_ceiling"] + 0.01


def test_other_ep_degrees_are_planned_anew_and_other_links_predicted(run, report):
    table = report["what_if"]
    assert [row["ep_size"] for row in table["rows"]] == [2, 4, 8, 16]
    assert [row["planned"] for row in table["rows"]] == [False, True, False, False]
    for row in table["rows"]:
        # Whatever the degree: blind homes meet one in G experts, semantic ones more.
        assert row["lar"][0] == pytest.approx(1 / row["ep_size"], abs=0.06)
        assert row["lar"][1] > 1.4 * row["lar"][0]
        fast, slow = (row["seconds"][link] for link in ("ethernet_100g", "ethernet_25g"))
        rates = table["links"]["ethernet_100g"] / table["links"]["ethernet_25g"]
        assert slow == pytest.approx([rates * value for value in fast])
    # Rows are those that serving counted: a float32 vector there, and one back.
    assert not table["assumed"]
    assert table["bytes_of_copy"] == pytest.approx(2 * HIDDEN_BYTES, rel=1e-6)


def test_other_ep_degrees_are_answered_by_the_rule_of_the_headline(report):
    for row in report["what_if"]["rows"]:
        fewer = row["remote_copies"][1] <= 0.95 * row["remote_copies"][0]
        assert row["worth_it"] == (fewer and row["busiest_rows"][1] <= row["busiest_rows"][0])
    planned = next(row for row in report["what_if"]["rows"] if row["planned"])
    assert planned["worth_it"] == (report["headline"]["answer"] == "yes")


def test_curves_join_the_loads_of_a_plan_and_policy_in_order(report):
    section = report["load_curves"]
    assert section["source"] == "serve_benchmark.json"
    assert section["baseline"] == ["contiguous", "round-robin"]
    cells = [(curve["plan"], curve["policy"]) for curve in section["curves"]]
    assert len(cells) == len(set(cells)) == 4
    for curve in section["curves"]:
        offered = [point["requests_per_second_offered"] for point in curve["points"]]
        assert offered == [2.0, 3.6, None]
        assert [point["ttft_p99_ms"] for point in curve["points"]] == [30.0, 60.0, 90.0]


def test_a_benchmark_of_something_else_is_refused(copy):
    file = copy / "serve_benchmark.json"
    file.write_text(file.read_text().replace('"theme": "serve"', '"theme": "plan"'))
    with pytest.raises(ArtifactError, match=r"serve_benchmark\.json.*theme"):
        build_report(copy)


def test_without_serving_the_size_of_a_row_is_assumed_and_said(copy):
    (copy / "serve.json").unlink()
    table = build_report(copy)["what_if"]
    assert (table["assumed"], table["bytes_of_copy"]) == (True, 2 * 4096 * 2)


def test_every_source_is_named_with_its_checksum(run, report):
    found = {entry["path"]: entry["sha256"] for entry in report["sources"]}
    artifacts = {f"{name}/{MANIFEST}" for name in ("profile", "holdout", "plan")}
    files = {"train.jsonl", "serve.json", "serve_benchmark.json", "data/tokenizer.json"}
    assert set(found) == files | artifacts
    for path, sha256 in found.items():
        assert hashlib.sha256((run.path / path).read_bytes()).hexdigest() == sha256
    for section in ("train", "observe", "plan", "serve"):
        assert report[section]["source"] in found


def test_a_slot_shows_the_load_of_the_expert_that_it_holds(run, report):
    placement = Plan.read(run.path / "plan").placement
    for layer, loads in enumerate(run.serve["modes"]["semantic"]["expert_load"]):
        for slot, expert in enumerate(placement.physical_to_logical_map[layer]):
            assert report["serve"]["modes"]["after"]["slot_load"][layer][slot] == loads[expert]


def test_the_words_of_a_kind_are_the_typical_tokens_of_its_rank(report):
    for rank, kind in enumerate(KINDS):
        (entry,) = [e for e in report["semantics"]["tokens"]["ranks"] if e["rank"] == rank]
        assert {token["text"] for token in entry["tokens"][:10]} <= set(WORDS[kind])
        assert report["semantics"]["subjects"][rank]["kind"] == kind
    shares = np.array(report["semantics"]["kinds"]["share"])
    assert shares.shape == (len(KINDS), RANKS)
    assert shares.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" def", "def"),
        ("        ", "␣×8"),
        ("\n\n", "⏎⏎"),
        ("a b", "a␣b"),
        ("", None),
        ("\ufffd", None),
    ],
)
def test_white_space_can_be_seen(text, shown):
    assert visible(text) == shown


def test_other_outputs_are_the_first_thing_said(copy):
    rewrite_serve(copy, lambda data: data["identical_outputs"].update(between_modes=False))
    headline = build_report(copy)["headline"]
    assert headline["answer"] == "no"
    assert headline["sentence"].startswith("Do not use this plan: outputs changed")


def test_routing_without_structure_is_not_worth_it(tmp_path):
    headline = build_report(make_run(tmp_path / "flat", affinity=0.0).path)["headline"]
    assert headline["answer"] == "no"
    assert headline["sentence"].startswith("Not worth turning on here")


def test_fewer_bytes_in_all_do_not_excuse_a_busier_rank(copy):
    def funnel(data):
        contiguous = data["modes"]["contiguous"]["bytes_dispatch"]
        sent = data["modes"]["semantic"]["bytes_dispatch"]
        for destination in range(1, RANKS):
            sent[0][destination] = 2 * contiguous[0][destination]
            for source in range(1, RANKS):
                sent[source][destination] //= 4

    rewrite_serve(copy, funnel)
    headline = build_report(copy)["headline"]
    assert headline["answer"] == "no"
    assert "fewer all-to-all bytes" in headline["sentence"]
    assert "the busiest rank sends or receives" in headline["sentence"]


def test_a_price_in_balance_is_said(copy):
    def overload(data):
        for load in data["modes"]["semantic"]["rank_load"]:
            load[0] *= 3

    rewrite_serve(copy, overload)
    assert "busiest rank computes" in build_report(copy)["headline"]["notes"][0]


@pytest.mark.parametrize("kept", ["train.jsonl", "profile", "plan", "serve.json"])
def test_a_stage_alone_makes_a_report_that_names_the_others_as_not_run(run, tmp_path, kept):
    source = run.path / kept
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / kept)
    report = build_report(tmp_path)
    done = [stage["source"].split("/")[0] for stage in report["stages"] if stage["done"]]
    assert done == [kept]
    assert report["headline"]["answer"] == ("yes" if kept in ("plan", "serve.json") else "unknown")


def test_a_diverged_training_run_is_shown(copy):
    (copy / "train.jsonl").write_text('{"step": 0, "loss": 9.1}\n{"step": 1, "loss": NaN}\n')
    train = build_report(copy)["train"]
    assert (train["first_loss"], train["last_loss"]) == (9.1, None)


def test_an_empty_directory_says_what_it_lacks(tmp_path):
    with pytest.raises(ArtifactError, match=r"nothing to report on here\. Allowed: train\.jsonl"):
        build_report(tmp_path)


def spoil(path, value):
    def change(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(("modes", "semantic", "lar"), [0.5]), r"semantic\.lar has shape \(1,\), expected"),
        (
            spoil(("modes", "semantic", "lar", 0), 1.5),
            r"modes\.semantic\.lar\.0: .*less than or eq",
        ),
        (spoil(("modes", "semantic", "lar", 0), None), r"modes\.semantic\.lar\.0: .*valid number"),
        (spoil(("modes", "contiguous", "rank_load", 0), [1]), "rank_load has shape rows of 2 len"),
        (spoil(("modes", "contiguous", "bytes_dispatch", 0, 1), -5), "greater than or equal to 0"),
        (spoil(("modes",), {}), "modes lack contiguous, semantic"),
        (spoil(("model",), {"layers": 3}), "not a model fingerprint"),
    ],
)
def test_a_malformed_serving_result_is_refused_with_its_place(copy, change, message):
    rewrite_serve(copy, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        build_report(copy)
    assert "serve.json: not what the stage writes" in str(caught.value)


def paths_of(value, path=()):
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield (*path, key)
            yield from paths_of(value[key], (*path, key))


GARBAGE = st.sampled_from([None, "x", -1, 1e400, [], {}, True, 2**70, [[[]]]])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), value=GARBAGE)
def test_garbage_anywhere_in_the_serving_result_is_a_clean_error_or_harmless(
    tmp_path, run, data, value
):
    path = data.draw(st.sampled_from(sorted(paths_of(run.serve), key=str)))
    spoiled = json.loads(json.dumps(run.serve))
    spoil(path, value)(spoiled)
    (tmp_path / "serve.json").write_text(json.dumps(spoiled))
    try:
        json.dumps(build_report(tmp_path), allow_nan=False)
    except SemanticEPError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_serving_result_that_is_no_object_is_refused(copy, content):
    (copy / "serve.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"serve\.json"):
        build_report(copy)


def test_a_broken_training_log_names_its_line(copy):
    (copy / "train.jsonl").write_text('{"step": 0, "loss": 9.1}\n{"step": 1, "lo')
    with pytest.raises(ArtifactError, match=r"train\.jsonl:2: not JSON"):
        build_report(copy)
    (copy / "train.jsonl").write_text("\n")
    with pytest.raises(ArtifactError, match="no step was logged"):
        build_report(copy)


def test_an_altered_plan_is_refused(copy):
    (file,) = (copy / "plan").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="truncated or altered"):
        build_report(copy)


def test_stages_of_different_models_are_not_mixed(copy):
    profile = RoutingProfile.read(copy / "profile")
    rewrite_serve(copy, lambda data: data["model"].update(tokenizer_sha256="f" * 64))
    assert profile.fingerprint.tokenizer_sha256
    with pytest.raises(FingerprintError, match=r"serve\.json belongs to another model.*tokenizer"):
        build_report(copy)


def test_a_tokenizer_of_another_model_is_not_used(copy):
    (copy / "data" / "tokenizer.json").write_text("{}")
    assert "not in the run directory" in build_report(copy)["semantics"]["tokens"]["missing"]
