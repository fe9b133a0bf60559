"""The front page's pictures are what the committed results say, and say it in every appearance."""

from xml.etree import ElementTree

import pytest

from benchmarks import pictures

SVG = "{http://www.w3.org/2000/svg}"


def rows(**copies):
    return [
        {"trace": trace, "ep_size": ep_size, "method": method, "remote_copies": value * factor}
        for trace in ("gpt_oss_20b", "other")
        for ep_size, factor in ((8, 1.0), (4, 0.5))
        for method, values in copies.items()
        for value in values
    ]


def test_the_committed_pictures_are_current(capsys):
    assert pictures.main(["--check"]) == 0, capsys.readouterr().err


def test_bars_are_means_over_layers_and_splits_at_one_ep_degree():
    found = pictures.remote_copies(rows(semantic=[1.0, 3.0], contiguous=[4.0], unknown=[9.0]))
    assert found["other"] == {"contiguous": 4.0, "semantic": 2.0}


@pytest.mark.parametrize("theme", [pictures.LIGHT, pictures.DARK], ids=lambda theme: theme.name)
def test_bars_are_as_long_as_their_numbers_and_name_the_change(theme):
    drawn = pictures.gain(rows(contiguous=[4.0], semmoe=[3.0], semantic=[2.0]), theme)
    tree = ElementTree.fromstring(drawn)
    lengths = [float(bar.get("width")) for bar in tree.iter(f"{SVG}rect")]
    assert lengths[:3] == pytest.approx([lengths[0], 0.75 * lengths[0], 0.5 * lengths[0]], abs=0.1)
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert "gpt-oss-20b" in texts
    assert "2.00  −50 %" in texts
    assert max(float(text.get("x")) for text in tree.iter(f"{SVG}text")) < pictures.WIDTH


def test_the_readme_shows_the_gain_once_it_is_measured():
    readme = f"before\n{pictures.GAIN_BEGIN}{pictures.GAIN_END}after\n"
    assert pictures.with_gain(readme, []) == readme
    shown = pictures.with_gain(readme, rows(contiguous=[4.0]))
    assert "docs/pictures/gain-light.svg" in shown
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")
    assert pictures.with_gain(shown, []) == readme
