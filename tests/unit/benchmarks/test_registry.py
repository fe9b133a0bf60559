"""Themes are found by file name, and results say where they come from."""

import json

import pytest

from benchmarks import registry
from benchmarks.plots import draw
from benchmarks.registry import Chart, Result, Table, markdown, themes, write_json
from benchmarks.run import main

RESULT = Result(
    theme="plan",
    protocol={"what": "nothing"},
    rows=[{"method": "a", "lar": 0.25}, {"method": "b", "lar": 0.5}],
    tables=[Table(title="All", rows=[{"method": "a", "lar": 0.25}])],
)


def test_only_themes_that_exist_are_listed_and_each_has_both_functions():
    assert "plan" in themes()
    for name in themes():
        module = registry.theme_module(name)
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_listing_themes_needs_one_line_of_summary_each():
    assert all(summary.endswith(".") for summary in themes().values())


def test_a_result_names_commit_command_environment_and_protocol():
    document = RESULT.document()
    assert document["environment"]["versions"]["numpy"]
    assert document["environment"]["cpus"] >= 1
    assert document["protocol"] == {"what": "nothing"}
    assert set(document) >= {"schema_version", "theme", "date", "commit", "command", "rows"}


def test_json_has_one_row_a_line(tmp_path):
    write_json(RESULT.document(), tmp_path / "deep" / "out.json")
    text = (tmp_path / "deep" / "out.json").read_text()
    assert json.loads(text)["rows"] == list(RESULT.rows)
    assert sum(line.strip().startswith('{"method"') for line in text.splitlines()) == 2


def test_floats_are_written_with_seven_digits_and_all_else_as_it_is(tmp_path):
    row = {"lar": 0.123456789, "tokens": 123456789, "layer": "mean", "steps": [1 / 3, None, True]}
    write_json(Result(theme="plan", protocol={}, rows=[row]).document(), tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert written == [{**row, "lar": 0.1234568, "steps": [0.3333333, None, True]}]


def test_json_of_no_rows_is_valid(tmp_path):
    empty = Result(theme="plan", protocol={}, rows=[])
    write_json(empty.document(), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == []


def test_markdown_has_a_line_for_each_row():
    assert markdown(RESULT.tables[0]).splitlines()[-1] == "| a | 0.25 |"


def test_charts_of_both_kinds_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    bars = Chart(
        title="bars", kind="bars", rows=RESULT.rows, x="method", y="lar", y_label="LAR",
        series="method",
    )  # fmt: skip
    points = [{"size": size, "seconds": size * 2.0} for size in (1, 10, 100)]
    lines = Chart(
        title="lines", kind="lines", rows=points, x="size", y="seconds", y_label="s", log=True
    )
    draw([bars, lines, bars], tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_theme_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["plans"])
    assert "plan" in capsys.readouterr().err


def test_an_error_of_a_theme_is_one_message_and_exit_code_2(capsys):
    assert main(["plan"]) == 2
    assert "--trace" in capsys.readouterr().err
