"""Rows of the plan_sensitivity theme, in tables and charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.registry import Chart, Row, Table, mean_of


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table a trace and study; of domains, a matrix a figure."""
    means = [row for row in rows if row["layer"] == "mean"]
    for trace, study in dict.fromkeys((row["trace"], row["study"]) for row in means):
        here = [row for row in means if (row["trace"], row["study"]) == (trace, study)]
        title = f"{trace}: {study}, mean over planned layers and splits"
        if study == "domains":
            yield Table(title=f"{title}, LAR; columns counted on", rows=_matrix(here, "lar"))
            yield Table(title=f"{title}, remote copies saved", rows=_matrix(here, "saved"))
            continue
        table = []
        for setting in dict.fromkeys(row["setting"] for row in here):
            same = [row for row in here if row["setting"] == setting]
            table.append(
                {
                    study: setting,
                    "profiled tokens": round(mean_of(same, "profiled_tokens")),
                    "lar": f"{mean_of(same, 'lar'):.3f}",
                    "floor": f"{1 / same[0]['ep_size']:.3f}",
                    "remote copies": f"{mean_of(same, 'remote_copies'):.3f}",
                    "contiguous": f"{mean_of(same, 'contiguous_remote_copies'):.3f}",
                    "saved": f"{mean_of(same, 'saved'):.1%}",
                    "load max/mean": f"{mean_of(same, 'load_max_over_mean'):.2f}",
                }
            )
        yield Table(title=title, rows=table)


def _matrix(rows: Sequence[Row], figure: str) -> list[Row]:
    """One row a domain planned on, one column a domain counted on."""
    targets = list(dict.fromkeys(row["counted_on"] for row in rows))
    return [
        {
            "planned on": source,
            **{
                target: f"{value:.1%}" if figure == "saved" else f"{value:.3f}"
                for target in targets
                for value in [
                    mean_of(
                        [r for r in rows if (r["setting"], r["counted_on"]) == (source, target)],
                        figure,
                    )
                ]
            },
        }
        for source in dict.fromkeys(row["setting"] for row in rows)
    ]


def charts(rows: Sequence[Row]) -> Iterator[Chart]:
    """What each study says of remote copies saved."""
    means = [row for row in rows if row["layer"] == "mean"]
    for study, x, label in (
        ("profile size", "profiled_tokens", "remote copies saved"),
        ("EP degree", "ep_size", "remote copies saved"),
        ("ablations", "setting", "remote copies saved"),
        ("search", "setting", "remote copies saved"),
    ):
        here = [row for row in means if row["study"] == study]
        if here:
            yield Chart(
                title=study,
                kind="bars" if x == "setting" else "lines",
                rows=here,
                x=x,
                y="saved",
                series="trace",
                y_label=label,
            )
    here = [row for row in means if row["study"] == "domains"]
    if here:
        yield Chart(
            title="domains: bars are what was planned on",
            kind="bars",
            rows=here,
            x="counted_on",
            y="saved",
            series="setting",
            y_label="remote copies saved",
        )
