import argparse

import pytest

from benchmarks.bench_serve_phases import (
    BOTH,
    CONTIGUOUS,
    COPIES,
    DECODE,
    ONE,
    PREFILL,
    TWO,
    add_arguments,
    rows_of_cell,
    run,
)

LAYERS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 8, 10, 5


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*map(str, argv)])


def test_all_plans_serve_the_same_tokens_and_what_they_hold_is_told(quickstart):
    result = run(
        arguments(
            *("--run", quickstart, "--ranks", 2, "--rounds", 1),
            *("--prompt-tokens", PROMPT_TOKENS, "--new-tokens", NEW_TOKENS),
        )
    )
    rows = {(row["plan"], row["phase"]): row for row in result.rows}
    assert set(rows) == {
        (plan, phase)
        for plan in (CONTIGUOUS, ONE, COPIES, TWO)
        for phase in (PREFILL, DECODE, BOTH)
    }
    for plan in (CONTIGUOUS, ONE, COPIES, TWO):
        tokens = {phase: rows[plan, phase]["tokens"] for phase in (PREFILL, DECODE, BOTH)}
        assert tokens == {phase: rows[ONE, phase]["tokens"] for phase in tokens}
        assert tokens[PREFILL] == LAYERS * PROMPTS * PROMPT_TOKENS
        assert 0 < tokens[DECODE] <= LAYERS * PROMPTS * (NEW_TOKENS - 1)
        assert tokens[BOTH] == tokens[PREFILL] + tokens[DECODE]
        for phase in tokens:
            assert 0 < rows[plan, phase]["lar"] <= 1
    held = {plan: rows[plan, BOTH]["slots_per_rank"] for plan in (CONTIGUOUS, ONE, COPIES, TWO)}
    assert held[CONTIGUOUS] == held[ONE] == 4
    assert 4 <= held[TWO] == held[COPIES] <= 8


def test_what_generated_tokens_cost_is_what_prompts_alone_leave():
    def summary(tokens, lar, copies, sent, load):
        return {
            "rank_load": [load, load],
            "tokens_per_rank": tokens,
            "lar": [lar, lar],
            "remote_copies": [copies, copies],
            "bytes_dispatch": [[9, sent], [sent, 9]],
            "bytes_combine": [[0, sent], [0, 0]],
            "tokens_per_second": 7.0,
        }

    prompts = summary([30, 10], 0.5, 0.5, 100, [40, 40])
    whole = summary([40, 20], 0.6, 0.6, 180, [60, 60])
    rows = {row["phase"]: row for row in rows_of_cell("p", prompts, whole, slots_per_rank=4)}
    assert rows[DECODE]["tokens"] == 2 * 20
    assert rows[DECODE]["lar"] == pytest.approx((0.6 * 240 - 0.5 * 160) / 80)
    assert rows[DECODE]["remote_copies"] == pytest.approx((0.6 * 120 - 0.5 * 80) / 40)
    assert rows[DECODE]["mbytes_to_other_ranks"] == pytest.approx(3 * 80 / 1e6)
    assert rows[BOTH]["new_tokens_per_second"] == 7.0
    assert "new_tokens_per_second" not in rows[PREFILL]
