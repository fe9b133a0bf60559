import logging
import typing

import pytest

from semantic_ep.config.sections import DispatchConfig
from semantic_ep.errors import BackendError
from semantic_ep.runtime import backends

torch = pytest.importorskip("torch")


class Group:
    """One rank; the fake backends below never communicate."""

    def size(self):
        return 1

    def rank(self):
        return 0


class Fake:
    def __init__(
        self, name, *, available=True, dtypes=(torch.float32, torch.bfloat16), fails=False
    ):
        self.name = name
        self._fails = fails
        self.created = 0
        self._available = available
        self._dtypes = dtypes

    def is_available(self):
        return self._available, "present" if self._available else f"{self.name} is not installed"

    def supports(self, call):
        return call.dtype in self._dtypes, f"{self.name} takes {self._dtypes}"

    def create(self, *, group, slots_per_rank, stats, max_tokens):
        if self._fails:
            raise BackendError(f"{self.name} found several machines")
        self.created += 1
        self.max_tokens = max_tokens
        return self

    def dispatch(self, x, slot, weight, *, layer=0):
        return backends.Dispatched(
            rows_RD=x,
            weight_R=weight,
            tokens_per_slot_S=slot,
            num_tokens=len(x),
            layer=layer,
            state=self.name,
        )

    def combine(self, y, dispatched):
        assert dispatched.state == self.name
        return y


@pytest.fixture
def registry(monkeypatch):
    def install(*fakes):
        monkeypatch.setattr(backends, "BACKENDS", {fake.name: fake for fake in fakes})
        backends._log_fallback.cache_clear()
        return fakes

    return install


def inputs(dtype):
    return torch.ones(2, 4, dtype=dtype), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)


def test_auto_takes_the_first_backend_that_accepts_the_call_and_logs_the_others_once(
    registry, caplog
):
    caplog.set_level(logging.INFO)
    absent, narrow, wide = registry(
        Fake("absent", available=False), Fake("narrow", dtypes=(torch.bfloat16,)), Fake("wide")
    )
    dispatcher = backends.create_dispatcher("auto", group=Group(), slots_per_rank=1)
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            x, slot, weight = inputs(dtype)
            assert dispatcher.combine(x, dispatcher.dispatch(x, slot, weight)) is x
    assert (absent.created, narrow.created, wide.created) == (0, 1, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "dispatch backend 'absent' is not used: absent is not installed",
        "dispatch backend 'narrow' is not used: narrow takes (torch.bfloat16,)",
    ]


def test_a_named_backend_never_falls_back(registry):
    registry(Fake("narrow", dtypes=(torch.bfloat16,)), Fake("wide"))
    dispatcher = backends.create_dispatcher("narrow", group=Group(), slots_per_rank=1)
    with pytest.raises(BackendError, match=r"no dispatch backend can run this call; narrow: "):
        dispatcher.dispatch(*inputs(torch.float32))


def test_auto_passes_over_a_backend_that_cannot_be_set_up_and_tries_it_once(registry, caplog):
    caplog.set_level(logging.INFO)
    _, wide = registry(Fake("failing", fails=True), Fake("wide"))
    dispatcher = backends.create_dispatcher("auto", group=Group(), slots_per_rank=1, max_tokens=7)
    for dtype in (torch.float32, torch.bfloat16):
        dispatcher.dispatch(*inputs(dtype))
    assert (wide.created, wide.max_tokens) == (1, 7)
    assert [record.getMessage() for record in caplog.records] == [
        "dispatch backend 'failing' is not used: failing found several machines"
    ]


def test_a_named_backend_that_cannot_be_set_up_is_an_error_with_its_reason(registry):
    registry(Fake("failing", fails=True), Fake("wide"))
    dispatcher = backends.create_dispatcher("failing", group=Group(), slots_per_rank=1)
    with pytest.raises(BackendError, match="failing: failing found several machines"):
        dispatcher.dispatch(*inputs(torch.float32))


def test_the_configuration_allows_exactly_the_backends_of_the_registry():
    allowed = typing.get_args(DispatchConfig.model_fields["backend"].annotation)
    assert sorted(allowed) == sorted(["auto", *backends.BACKENDS])


def test_absent_and_unknown_backends_are_refused_with_the_choices(registry):
    registry(Fake("absent", available=False), Fake("wide"))
    with pytest.raises(BackendError, match="'absent' is not available: absent is not installed"):
        backends.create_dispatcher("absent", group=Group(), slots_per_rank=1)
    with pytest.raises(BackendError, match=r"got other.*Allowed: auto, absent, wide"):
        backends.create_dispatcher("other", group=Group(), slots_per_rank=1)
    assert backends.backend_report() == [
        ("absent", False, "absent is not installed"),
        ("wide", True, "present"),
    ]
