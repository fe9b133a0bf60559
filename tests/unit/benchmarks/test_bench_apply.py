from __future__ import annotations

import argparse

from benchmarks import bench_apply


def test_every_method_is_measured_in_every_round_for_both_forms(tmp_path) -> None:
    parser = argparse.ArgumentParser()
    bench_apply.add_arguments(parser)
    flags = ["--layers", "2", "--experts", "4", "--hidden", "8", "--inner", "4", "--rounds", "2"]
    result = bench_apply.run(parser.parse_args([*flags, "--directory", str(tmp_path)]))
    measured = {(row["form"], row["method"], row["round"]) for row in result.rows}
    assert measured == {
        (form, method, number)
        for form in ("per expert", "fused")
        for method in ("copy", "apply", "undo")
        for number in (0, 1)
    }
    # Router 4 x 8 and three matrices 4 x 8 for each of 4 experts, in 2 layers, bf16.
    assert {row["bytes"] for row in result.rows} == {2 * 2 * (4 * 8 + 4 * 3 * 4 * 8)}
    assert all(row["slowest"] <= row["mb_per_second"] for row in result.tables[0].rows)
    assert not list(tmp_path.iterdir())
