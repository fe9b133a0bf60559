"""The README's tables say what the results in a folder say."""

from __future__ import annotations

import json

import pytest

from benchmarks.front_page import links_table, method_rows, methods_table, with_tables

README = (
    "before\n<!-- methods -->\nold\n<!-- /methods -->\n<!-- slow links -->\n<!-- /slow links -->\n"
)


def row(method, copies, *, layer="mean", seed=0, **changes):
    return {
        "trace": "gpt_oss_20b",
        "ep_size": 8,
        "profile_fraction": 0.2,
        "method": method,
        "layer": layer,
        "seed": seed,
        "lar": 0.25,
        "remote_copies": copies,
        "load_max_over_mean": 1.5,
        **changes,
    }


def test_a_row_names_the_best_published_placement_and_the_best_under_our_schedule():
    rows = [
        *(row("contiguous", copies, seed=seed) for seed, copies in enumerate((3.0, 5.0))),
        row("contiguous", 99.0, layer=3),
        row("exflow", 3.0),
        row("semmoe", 3.2),
        row("grace", 1.0),
        row("exflow+schedule", 2.8),
        row("semmoe+schedule", 2.6),
        row("semantic", 2.0, lar=0.5, load_max_over_mean=1.1),
    ]
    *_, last = methods_table(rows)
    assert [cell.strip() for cell in last.strip("|").split("|")] == [
        "gpt-oss-20b, 8",
        "4.00 (0.250; 1.50)",
        "–",
        "ExFlow 3.00 (0.250; 1.50), −25 %",
        "Sem-MoE 2.60 (0.250; 1.50), −35 %",
        "–",
        "**2.00 (0.500; 1.10), −50 %**",
    ]


def test_links_are_shown_in_shares_of_contiguous():
    both = {"hosts": 2, "link": "1 Gb/s", "layer_of_baseline": 0.7, "throughput_of_baseline": 1.4}
    rows = [
        {**both, "mode": "contiguous", "bytes_of_baseline": 1.0, "compute_share": 0.2},
        {**both, "mode": "semantic", "bytes_of_baseline": 0.66, "compute_share": 0.3},
        {"block": "link", "hosts": 2, "link": "1 Gb/s", "mbits": 957.0},
    ]
    assert list(links_table({"tiny": rows}))[2:] == [
        "| tiny | 2 | 1 Gb/s | 0.66 | 0.70 | 1.40 | 20% |"
    ]


def test_tables_are_written_between_their_comments_from_files_of_a_folder(tmp_path):
    empty = README.replace("old\n", "")
    assert with_tables(README, tmp_path) == empty
    rows = [row("contiguous", 4.0), row("semantic", 2.0, profile_fraction=0.8)]
    (tmp_path / "plan_here_202611.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "plan_bounds_202611.json").write_text(json.dumps({"rows": [{"level": "reached"}]}))
    assert method_rows(tmp_path) == rows[:1]
    shown = with_tables(README, tmp_path)
    assert "| gpt-oss-20b, 8 | 4.00 (0.250; 1.50) |" in shown
    assert "**–**" in shown
    with pytest.raises(ValueError, match="slow links"):
        with_tables(README.replace("<!-- /slow links -->", ""), tmp_path)
