import importlib.util
import json
import subprocess
import sys

import pytest

from semantic_ep.cli import doctor


def findings(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "semantic_ep.cli", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_doctor_says_for_each_backend_whether_it_works_and_why():
    code, found = findings()
    assert code == int(any(finding["state"] == "wrong" for finding in found))
    areas = {finding["area"] for finding in found}
    assert {"packages", "machine", "kernel libraries", "seams"} <= areas
    assert all(finding["detail"] for finding in found)
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed, so there are no dispatch backends to look at")
    backends = {f["name"]: f for f in found if f["area"] == "dispatch backends"}
    assert backends["torch"]["state"] == "ok"
    assert sum("auto tries first" in f["detail"] for f in backends.values()) == 1


def test_a_foreign_apex_is_wrong_because_megatron_takes_it_for_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    if importlib.util.find_spec("amp_C") is not None:
        pytest.skip("NVIDIA's apex is installed here")
    assert doctor._apex().state == "wrong"


def test_a_version_outside_the_tested_range_is_wrong(monkeypatch):
    real = doctor.metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: "0.1" if name == "scipy" else real(name)
    )
    scipy = next(finding for finding in doctor._packages() if finding.name == "scipy")
    assert scipy.state == "wrong"
    assert "tested with" in scipy.detail
