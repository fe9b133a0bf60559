"""How numbers are spelled for people."""

from __future__ import annotations

LINK_NAMES = {
    "nvlink4": "NVLink 4",
    "pcie5": "PCIe 5",
    "ib_ndr": "InfiniBand NDR",
    "ethernet_100g": "Ethernet 100G",
    "ethernet_25g": "Ethernet 25G",
}


def amount(value: float, unit: str) -> str:
    """Spell a number with its unit: share, ratio, bytes, or a plain count a token."""
    if unit == "share":
        return percent(value)
    if unit == "ratio":
        return f"{value:.2f}×"
    if unit == "bytes":
        scale, name = byte_unit(value)
        scaled = value / scale
        return f"{scaled:.3g} {name}" if scaled < 1000 else f"{scaled:,.0f} {name}"
    return f"{value:.2f}"


def percent(value: float) -> str:
    """Spell a share as a percentage, with a decimal where it would vanish otherwise."""
    return f"{value:.1%}" if 0 < abs(value) < 0.0095 else f"{value:.0%}"


def change(value: float | None, unit: str) -> str:
    """Spell a change with a true minus sign: relative, but in points for a share."""
    if value is None:
        return "n/a"
    text = f"{100 * value:+.0f}{' points' if unit == 'share' else '%'}"
    return text.replace("+0", "±0").replace("-0", "±0").replace("-", "−")


def milliseconds(seconds: float) -> str:
    """Spell a time in ms with three digits, or as a whole number from 1000 on."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def duration(before: float, after: float) -> str:
    """Spell two times in seconds as one change, in the unit in which the larger is readable."""
    largest = max(before, after)
    scale, unit = next(
        (pair for pair in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if largest >= pair[0]),
        (1e-9, "ns"),
    )
    digits = 0 if largest >= 100 * scale else 1 if largest >= 10 * scale else 2
    first, second = (f"{value / scale:.{digits}f}" for value in (before, after))
    return f"{first} → {second} {unit}"


def link_name(link: str) -> str:
    """Spell a link of `semantic_ep.topology` as its makers do; an unknown one as it is."""
    return LINK_NAMES.get(link, link)


def byte_unit(largest: float) -> tuple[float, str]:
    """Scale and name of the decimal unit in which `largest` is readable."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "B"
