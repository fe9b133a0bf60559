"""The page and its pictures: valid, self-contained, legible, and alive in a real browser."""

import io
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest

from semantic_ep.cli import EXIT_ERROR, EXIT_OK, main
from semantic_ep.report.build import build_report
from semantic_ep.report.plots import DARK, LIGHT, draw, relative_luminance
from semantic_ep.report.units import amount, change, duration, link_name, percent
from semantic_ep.tracking import METRICS_FILE
from tests.unit.report.synthetic_run import make_run
from tests.wandb_offline import OfflineRun

VOID = {"meta", "link", "img", "source", "br", "hr", "input"}
PICTURES = {
    *("lar_by_layer", "bytes_between_ranks", "expert_load"),
    *("training_loss", "load_curves"),
}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "study").path


@pytest.fixture(scope="module")
def output(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("out") / "report"
    assert main(["report", str(run), "-o", str(directory)]) == EXIT_OK
    return directory


class StrictParser(HTMLParser):
    """Checks nesting and attributes, and collects what tests ask for."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    parser = StrictParser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_self_contained_and_small(output):
    page = (output / "report.html").read_text()
    parser = parsed(page)
    tags = [tag for tag, _ in parser.tags]
    assert (tags.count("h1"), tags.count("title"), tags.count("script")) == (1, 1, 0)
    assert all(link.startswith("data:") for link in parser.links)
    assert not [word for word in ("http", "@import", "url(") if word in page]
    assert all(attrs.get("alt") for tag, attrs in parser.tags if tag == "img")
    assert len(page) < 3_000_000


def test_text_of_tokens_cannot_become_markup(output):
    page = (output / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page


def test_the_first_screen_holds_verdict_four_numbers_and_a_picture(run, output):
    page = (output / "report.html").read_text()
    first = page[: page.index("<h2>")]
    report = build_report(run)
    assert report["headline"]["sentence"] in first
    assert first.count('<div class="card">') == 4
    for entry in report["headline"]["numbers"]:
        assert amount(entry["after"], entry["unit"]) in first
        assert amount(entry["before"], entry["unit"]) in first
    assert first.count("<img") == 1
    # Whether it pays on the user's own EP degree and link.
    for row in report["what_if"]["rows"]:
        assert f'<th scope="row">{row["ep_size"]}' in first
    for link in report["what_if"]["links"]:
        assert f'<th scope="col">{link_name(link)} ' in first
    assert first.count("<td>yes</td>") + first.count("<td>no</td>") == len(
        report["what_if"]["rows"]
    )


def test_the_page_names_the_best_baseline_and_both_bounds(run, output):
    page = (output / "report.html").read_text()
    plan = build_report(run)["plan"]
    assert escape(plan["best_baseline"]["summary"], quote=False) in page
    for name in ("floor_lar", "ceiling_lar"):
        assert percent(plan["bounds"][name]) in page[page.index("Floor of the LAR") :]


def test_report_json_is_what_the_page_is_drawn_from(run, output):
    written = json.loads((output / "report.json").read_text())
    built = json.loads(json.dumps(build_report(run)))
    written.pop("made")
    built.pop("made")
    assert written == built


@pytest.mark.parametrize("kept", ["train.jsonl", "profile", "plan", "serve.json"])
def test_a_run_with_one_stage_draws_a_page_that_says_so(run, tmp_path, kept):
    source = run / kept
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / kept)
    assert main(["report", str(tmp_path)]) == EXIT_OK
    page = (tmp_path / "report.html").read_text()
    parsed(page)
    assert page.count("<b>not run</b>") == 3


def test_all_pictures_are_drawn_in_both_themes_and_differ(run):
    from matplotlib.image import imread

    report = build_report(run)
    light, dark = draw(report, LIGHT), draw(report, DARK)
    assert set(light) == set(dark) == PICTURES
    for name in PICTURES:
        bright, dim = imread(io.BytesIO(light[name])), imread(io.BytesIO(dark[name]))
        assert bright.shape == dim.shape
        assert bright.shape[1] > 1000
        assert bright[0, 0, :3].mean() > 0.9 > 0.2 > dim[0, 0, :3].mean()
        assert bright[:, :, :3].std() > 0.02


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_text_and_series_stand_out_from_the_surface(theme):
    def luminance(colour):
        return relative_luminance(tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))

    def contrast(first, second):
        bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    for text in (theme.ink, theme.muted):
        assert contrast(text, theme.surface) >= 4.5
    for series in (theme.after, theme.ceiling):
        assert contrast(series, theme.surface) >= 3
    assert contrast(theme.before, theme.after) >= 1.8
    steps = [luminance(colour) for colour in theme.heat]
    assert steps in (sorted(steps), sorted(steps, reverse=True))


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.523, "share", "52%"),
        (0.004, "share", "0.4%"),
        (1.3582, "copies", "1.36"),
        (1.139, "ratio", "1.14×"),
        (115_900_000, "bytes", "116 MB"),
        (999, "bytes", "999 B"),
        (2_345_678_000_000_000, "bytes", "2,346 TB"),
    ],
)
def test_amounts_carry_their_unit(value, unit, shown):
    assert amount(value, unit) == shown


def test_changes_are_relative_but_points_for_shares():
    assert change(-0.421, "bytes") == "−42%"
    assert change(0.389, "share") == "+39 points"
    assert change(-0.001, "ratio") == change(0.004, "ratio") == "±0%"
    assert change(None, "bytes") == "n/a"
    assert percent(0) == "0%"


def test_json_prints_the_truth_and_writes_nothing(run, capsys):
    before = sorted(path.name for path in run.iterdir())
    assert main(["report", str(run), "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out)["run"] == "study"
    assert sorted(path.name for path in run.iterdir()) == before


def test_several_runs_are_compared_on_one_page(run, tmp_path, capsys):
    flat = make_run(tmp_path / "flat", requests=64, affinity=0.0, seed=1).path
    planned = tmp_path / "planned"
    shutil.copytree(run / "plan", planned / "plan")
    runs = [str(run), str(flat), str(planned)]
    assert main(["report", *runs, "-o", str(tmp_path / "out")]) == EXIT_OK
    assert "study: Worth turning on" in capsys.readouterr().out
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["run"] for row in comparison["runs"]] == ["study", "flat", "planned"]
    assert [row["answer"] for row in comparison["runs"]] == ["yes", "no", "yes"]
    own = {entry["id"]: entry for entry in build_report(run)["headline"]["numbers"]}
    for identity, entry in comparison["runs"][0]["numbers"].items():
        assert entry["after"] == own[identity]["after"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    parsed(page)
    assert "2 of 3 runs gain" in page
    # The flat run scattered experts otherwise; the third has the first one's plan.
    diffs = [row["plan_diff"] for row in comparison["runs"]]
    assert diffs[0] is None
    assert 0.3 < diffs[1]["share"] < 1
    assert diffs[2]["moved"] == [0] * len(diffs[2]["layer_ids"])
    assert "How far the plans are apart" in page
    assert "not measured" in page


def test_a_comparison_needs_a_directory_of_its_own(run, capsys):
    assert main(["report", str(run), str(run)]) == EXIT_ERROR
    assert "Give -o DIR" in capsys.readouterr().err
    assert main(["report", str(run), str(run), "--json", "--wandb", "offline"]) == EXIT_ERROR
    assert "--wandb" in capsys.readouterr().err


def test_errors_are_one_clean_message(tmp_path, run, capsys):
    assert main(["report", str(tmp_path / "absent")]) == EXIT_ERROR
    assert "nothing to report on here" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(run), "-o", str(tmp_path / "file")]) == EXIT_ERROR
    assert "cannot write the report" in capsys.readouterr().err


def test_numbers_and_pictures_go_to_wandb_when_asked(run, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert main(["report", str(run), "-o", str(tmp_path), "--wandb", "offline"]) == EXIT_OK
    offline = OfflineRun.in_directory(tmp_path)
    merged = {key: value for row in offline.history for key, value in row.items()}
    report = build_report(run)
    for entry in report["headline"]["numbers"]:
        assert merged[f"serving/{entry['id']}/after"] == pytest.approx(entry["after"])
    assert {f"serving/{name}/path" for name in PICTURES} <= set(merged)
    # W&B keeps a table as an artifact of its own kind.
    kinds = [artifact["type"] for artifact in offline.artifacts]
    assert kinds == ["run_table", "report"]
    assert (tmp_path / METRICS_FILE).is_file()


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")


def browse(page, profile, *flags):
    """Open a page in a real browser; what it printed, and nothing on its console."""
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--enable-logging=stderr"
    )
    done = subprocess.run(
        [CHROMIUM, *quiet.split(), f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@needs_browser
def test_a_browser_draws_the_page_without_complaint(output, tmp_path):
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    flags = ("--window-size=1280,900", f"--screenshot={picture}")
    browse(output / "report.html", tmp_path / "profile", *flags)
    screen = imread(picture)[:, :, :3]
    assert screen.shape == (900, 1280, 3)
    # The picture of the first screen is where it belongs: blue marks in the lower left part.
    blue = np.array([int(LIGHT.after[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    near = np.abs(screen[380:, 100:850] - blue).max(axis=2) < 0.06
    assert near.sum() > 200


@needs_browser
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_nothing_sticks_out_of_a_narrow_screen(output, tmp_path, width):
    # A page that holds the report in a frame of that width, and measures what it would scroll to.
    measure = (
        "document.title = this.contentDocument.documentElement.scrollWidth;"
        "this.contentDocument.querySelectorAll('img').forEach("
        "i => { if (!i.complete || !i.naturalWidth) document.title = 'an image is missing' })"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><title></title><iframe width="{width}" height="900" onload="{measure}" '
        f'srcdoc="{escape((output / "report.html").read_text(), quote=True)}"></iframe>'
    )
    drawn = browse(frame, tmp_path / "profile", "--dump-dom")
    (title,) = re.findall(r"<title>(.*?)</title>", drawn[:200])
    assert title.isdecimal(), title
    # The frame's border takes a few pixels.
    assert width - 24 <= int(title) <= width


@needs_browser
def test_the_page_prints_on_a_few_sheets(output, tmp_path):
    file = tmp_path / "page.pdf"
    flags = ("--no-pdf-header-footer", f"--print-to-pdf={file}")
    browse(output / "report.html", tmp_path / "profile", *flags)
    sheets = len(re.findall(rb"/Type\s*/Page\b", file.read_bytes()))
    assert 3 <= sheets <= 10


@pytest.mark.parametrize(
    ("pair", "spelled"),
    [
        ((13.1e-6, 9.96e-6), "13.1 → 10.0 µs"),
        ((1.81e-3, 1.38e-3), "1.81 → 1.38 ms"),
        ((0.5, 2.0), "0.50 → 2.00 s"),
        ((448e-6, 375e-6), "448 → 375 µs"),
        ((0.0, 0.0), "0.00 → 0.00 ns"),
    ],
)
def test_times_share_the_unit_of_the_larger(pair, spelled):
    assert duration(*pair) == spelled
