import pytest

torch = pytest.importorskip("torch")

from semantic_ep.runtime import overlap

H100 = overlap.DeviceRates(flops=990e12, bytes_per_second=3.35e12, element_bytes=2)


def splits(mode, own_rows, other_rows):
    return overlap.splits(
        mode,
        own_rows=own_rows,
        other_rows=other_rows,
        num_slots=4,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def test_weights_are_hidden_from_the_ratio_of_arithmetic_to_memory_on():
    exact = 990e12 / 3.35e12 * 2 / 2
    assert 256 < exact < 300
    assert H100.rows_per_expert == 512


def test_auto_splits_where_both_halves_have_enough_rows_an_expert(monkeypatch):
    monkeypatch.setattr(overlap, "device_rates", lambda device, dtype: H100)
    assert splits("auto", 4 * 512, 4 * 512)
    assert not splits("auto", 4 * 512 - 1, 4 * 512)
    assert not splits("auto", 4 * 512, 4 * 512 - 1)


def test_decoding_measures_nothing(monkeypatch):
    monkeypatch.setattr(overlap, "device_rates", lambda device, dtype: pytest.fail("measured"))
    assert not splits("auto", 3, 100)


@pytest.mark.parametrize("rows", [0, 10_000])
def test_on_and_off_are_obeyed_whatever_the_rows(rows):
    assert splits("on", rows, rows)
    assert not splits("off", rows, rows)


def test_this_machine_is_measured_once_and_described():
    cpu = torch.device("cpu"), torch.float32
    rates = overlap.device_rates(*cpu)
    assert overlap.device_rates(*cpu) is rates
    assert rates.flops > 1e8
    assert 1e8 < rates.bytes_per_second < 1e13
    assert f"from {rates.rows_per_expert} rows an expert on" in overlap.describe(rates)
