import inspect
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from semantic_ep.patches import registry
from semantic_ep.patches.registry import Seam

from semantic_ep.cli import main
from semantic_ep.errors import BackendError, ConfigError

PATCHES = Path(registry.__file__).parent
SIGNATURES = sorted((PATCHES / "signatures").glob("*.json"))


@pytest.fixture
def upstream(monkeypatch):
    """A module that stands for a framework, and a group of seams into it."""
    module = types.ModuleType("upstream_framework")

    class Base:
        def route(self, tokens):
            return f"base {tokens}"

    class Derived(Base):
        pass

    module.Derived, module.greet = Derived, lambda name: f"hello {name}"
    group = types.ModuleType("seams_of_upstream")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, group.__name__, group)
    monkeypatch.setattr(registry, "GROUPS", {"upstream": group.__name__})
    module.seams = group
    group.SEAMS = (seam("greet"), seam("Derived.route", parameters=("self", "tokens")))
    yield module
    registry.revert("upstream")


def shout(original):
    def wrapper(*args):
        return original(*args).upper()

    return wrapper


def seam(path, **changes):
    settings = {
        "name": f"upstream.{path}",
        "package": "packaging",  # Installed, and its version is above 1.
        "versions": ">=1",
        "target": f"upstream_framework:{path}",
        "parameters": ("name",),
        "why": "it whispers",
        "remove_when": "it shouts",
        "wrap": shout,
    }
    return Seam(**{**settings, **changes})


def test_apply_keeps_the_original_within_reach_and_revert_puts_it_back(upstream):
    original = upstream.greet
    assert registry.apply("upstream") == ("upstream.greet", "upstream.Derived.route")
    assert upstream.greet("you") == "HELLO YOU"
    assert upstream.greet.__wrapped__ is original
    assert upstream.Derived().route("x") == "BASE X"
    registry.revert("upstream")
    assert upstream.greet is original
    assert "route" not in vars(upstream.Derived)


def test_applying_twice_changes_nothing(upstream):
    registry.apply("upstream")
    once = upstream.greet
    registry.apply("upstream")
    assert upstream.greet is once


def test_a_failed_probe_leaves_everything_as_it_was(upstream):
    original = upstream.greet
    upstream.seams.SEAMS += (seam("Derived.gone"), seam("greet", name="x", parameters=("other",)))
    with pytest.raises(BackendError, match=r"does not exist any more[\s\S]*written for"):
        registry.apply("upstream", allow_untested_version=True)
    assert upstream.greet is original


def test_a_wrapper_that_cannot_be_made_undoes_those_before_it(upstream):
    def fail(original):
        raise RuntimeError("no")

    original = upstream.greet
    upstream.seams.SEAMS += (seam("Derived.route", name="upstream.b", parameters=None, wrap=fail),)
    with pytest.raises(RuntimeError):
        registry.apply("upstream")
    assert upstream.greet is original
    assert not [s for s in upstream.seams.SEAMS if registry.check(s).state == "applied"]


def test_an_untested_version_is_refused_unless_overridden(upstream):
    upstream.seams.SEAMS = (seam("greet", versions="<1"),)
    with pytest.raises(BackendError, match="was tested with <1"):
        registry.apply("upstream")
    assert registry.apply("upstream", allow_untested_version=True) == ("upstream.greet",)


def test_a_seam_that_this_machine_does_not_need_is_left_out(upstream):
    upstream.seams.SEAMS = (seam("greet", inactive=lambda: "not here"), upstream.seams.SEAMS[1])
    assert registry.apply("upstream") == ("upstream.Derived.route",)
    assert upstream.greet("you") == "hello you"


def test_an_absent_attribute_appears_and_disappears_where_that_is_allowed(upstream):
    upstream.seams.SEAMS = (
        seam("flag", parameters=None, may_be_absent=True, wrap=lambda _original: "on"),
    )
    registry.apply("upstream")
    assert upstream.flag == "on"
    registry.revert("upstream")
    assert not hasattr(upstream, "flag")


def test_an_unknown_group_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match="Did you mean 'megatron'"):
        registry.apply("megatorn")


def test_every_seam_is_short_and_named_after_its_group():
    for each in registry.seams():
        assert len(inspect.getsource(each.wrap).splitlines()) <= 40, each.name
        assert each.group in registry.GROUPS
    names = [each.name for each in registry.seams()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("file", SIGNATURES, ids=lambda file: file.stem)
def test_seams_fit_the_recorded_signatures_of_every_tested_release(file):
    record = json.loads(file.read_text())
    checked = [
        each
        for each in registry.seams()
        if each.package == record["package"]
        and SpecifierSet(each.versions).contains(record["version"])
    ]
    assert checked
    for each in checked:
        found = record["parameters"][each.target]
        present = found != "absent"
        parameters = tuple(found) if present and found is not None else None
        assert registry.mismatch(each, present=present, found=parameters) is None, each.name


def test_the_readme_shows_the_present_table():
    assert registry.markdown_table(registry.seams()) in (PATCHES / "README.md").read_text()


def test_the_command_lists_seams_as_json(capsys):
    assert main(["patches", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [each.name for each in registry.seams()]


def autoloaded(names, code):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "PYTHONPATH": str(PATCHES / "autoload"), "SEMANTIC_EP_AUTOLOAD": names},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_autoload_refuses_a_name_without_seams():
    done = autoloaded("megatorn", "print('went on')")
    assert done.returncode != 0
    assert "no seams for 'megatorn'" in done.stderr
    assert "went on" not in done.stdout


def test_autoload_imports_no_framework_by_itself():
    done = autoloaded("megatron,deepspeed", "import sys; print(*sys.modules)")
    assert not {"torch", "megatron", "deepspeed"} & set(done.stdout.split())
