"""Every seam, and its recorded signature, held against the installed release of its framework."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from semantic_ep.patches import registry

pytestmark = pytest.mark.upstream

SIGNATURES = Path(registry.__file__).parent / "signatures"
# Framework, by the name of its seams -> its distribution.
DISTRIBUTIONS = {"megatron": "megatron-core", "deepspeed": "deepspeed"}


@pytest.fixture(params=DISTRIBUTIONS)
def framework(request):
    pytest.importorskip("torch", reason="torch is not installed")
    module = "megatron.core" if request.param == "megatron" else request.param
    pytest.importorskip(module, reason=f"{DISTRIBUTIONS[request.param]} is not installed")
    return request.param


def test_every_seam_fits_the_installed_release(framework):
    for seam in registry.seams(framework):
        status = registry.check(seam)
        assert not status.failed, f"{seam.name}: {status.detail}"


def test_the_recorded_signatures_are_those_of_the_installed_release(framework):
    release = f"{DISTRIBUTIONS[framework]}-{metadata.version(DISTRIBUTIONS[framework])}"
    file = SIGNATURES / f"{release}.json"
    if not file.exists():
        pytest.skip(f"no signatures were recorded for {release}")
    recorded = json.loads(file.read_text())["parameters"]
    for seam in registry.seams(framework):
        owner, attribute = registry.resolve(seam.target)
        found = registry.parameter_names(getattr(owner, attribute, None))
        expected = recorded[seam.target]
        assert found == (tuple(expected) if isinstance(expected, list) else None), seam.name
