"""The training script's data and its refusals; the training itself has distributed tests."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("finetune_deepspeed")


@pytest.fixture
def data(tmp_path):
    """Documents of 100, 20 (too short) and 300 tokens; each token's value is its position."""
    rows, first = [], 0
    for name, tokens in (("a", 100), ("b", 20), ("c", 300)):
        rows.append({"id": name, "kind": "k", "first": first, "tokens": tokens})
        first += tokens
    np.save(tmp_path / "train.npy", np.arange(first, dtype=np.uint16))
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_sequence_is_a_piece_of_one_document_and_all_pieces_come_once(script, data):
    chunks = script.Chunks(data, length=64, pad=9, seed=0)
    documents = [range(0, 100), range(120, 420)]
    seen = []
    for number in range(7):
        token_id, mask = chunks.batch(number, 1)
        real = token_id[mask.bool()].tolist()
        assert any(set(real) <= set(document) for document in documents)
        assert (token_id[~mask.bool()] == 9).all()
        seen += real
    assert sorted(seen) == [*range(0, 100), *range(120, 420)]


def test_the_order_of_sequences_depends_on_the_seed_alone(script, data):
    def order(seed):
        chunks = script.Chunks(data, length=64, pad=9, seed=seed)
        return [chunks.batch(number, 1)[0][0, 0].item() for number in range(7)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def arguments(script, data, config):
    (data / "ds.json").write_text(json.dumps(config))
    return [
        "--deepspeed",
        "--config",
        str(data / "ds.json"),
        "--data",
        str(data),
        "-o",
        str(data / "run"),
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"semantic_ep": {"enabled": True, "obserfe": {}}}, 'Did you mean "observe"'),
        ({"semantic_ep": {"enabled": False}}, "observation is off"),
        ({"semantic-ep": {"enabled": True}}, 'Write it as "semantic_ep"'),
        ({"semantic_ep": {"enabled": True}}, "no finished corpus here"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_before_anything_starts(
    script, data, capsys, config, message
):
    assert script.main(arguments(script, data, config)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (data / "run").exists()


def test_config_and_deepspeed_config_are_two_names_of_one_flag(script, data):
    for flag in ("--config", "--deepspeed_config"):
        args = script.parse_arguments(["--data", "d", "-o", "r", flag, "x.json"])
        assert args.deepspeed_config == "x.json"


def test_a_schedule_left_to_the_run_ends_with_it(script, data):
    schedule = {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 20},
    }
    args = script.parse_arguments(
        [*arguments(script, data, {"scheduler": schedule}), "--steps", "40"]
    )
    config = script.complete_config(args)
    assert config["scheduler"]["params"] == {"total_num_steps": 40, "warmup_num_steps": 10}
    assert config["semantic_ep"]["observe"]["output"] == str(data / "run" / "profile")
