"""What crossed a link, as its interface counted it, beside what the dispatcher said it sent."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# Ethernet 14, IPv4 20, TCP 20 and its time stamps 12.
HEADER_BYTES = 66
# gloo's header of a message, and its two notices: ready to send, ready to receive.
MESSAGE_BYTES = 3 * 48
# Exchanges of a MoE layer: sizes, rows with their routes, results.
EXCHANGES = 3
# What else may be sent, in shares of the payload and by message: agreement on whether to go on,
# address resolution, acknowledgements that carry options.
SLACK_SHARE, SLACK_BYTES = 0.005, 64
# What TCP sends again holds at most so many bytes a segment: a 1500-byte packet less its headers.
SEGMENT_BYTES = 1448


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """What one host sent, from one moment to another.

    Attributes:
        interface_bytes, interface_packets: Of the interface, where a packet is what TCP hands over:
            up to 64 KiB with one header.
        wire_bytes, wire_packets: Of its queue, which counts the headers of every 1500-byte packet.
        segments_again: TCP segments sent again. Nothing is dropped on these links, but a receiver
            that waits for a core answers late, and a sender that hears nothing sends again.
    """

    interface_bytes: int
    interface_packets: int
    wire_bytes: int
    wire_packets: int
    segments_again: int

    def __sub__(self, before: Sent) -> Sent:
        now, then = dataclasses.asdict(self), dataclasses.asdict(before)
        return Sent(**{name: now[name] - then[name] for name in now})

    @property
    def payload(self) -> int:
        """Bytes inside TCP."""
        return self.interface_bytes - HEADER_BYTES * self.interface_packets


def sent_to_others(counters: dict[str, np.ndarray], rank: int) -> dict[str, int]:
    """Bytes for other ranks by the dispatcher's counters: "rows" of hidden states, "metadata"."""

    def others(name: str) -> int:
        return int(counters[name].sum() - counters[name][:, rank].sum())

    return {
        "rows": others("bytes_dispatch") + others("bytes_combine"),
        "metadata": others("bytes_metadata"),
    }


def messages(*, steps: int, layers: int, ranks: int) -> int:
    """Messages that one rank sends in the exchanges of so many steps."""
    return steps * layers * EXCHANGES * (ranks - 1)


def accounted(sent: Sent, *, counted: int, messages: int) -> dict[str, Any]:
    """How the interface's bytes come about, and whether counters and protocol explain them.

    Args:
        sent: Of one host.
        counted: By its dispatcher, for other hosts, metadata included.
        messages: See `messages`.

    Returns:
        "counted", "gloo" (headers and notices), "again" (at most: full segments that TCP sent
        again), "other", "headers" (of packets, as the interface counts them), "interface" (sum of
        "counted", "gloo", "other" and "headers"), "wire" and "explained": what is other is within
        the slack, or what was sent again.
    """
    gloo = MESSAGE_BYTES * messages
    other = sent.payload - counted - gloo
    again = SEGMENT_BYTES * sent.segments_again
    allowed = SLACK_SHARE * (counted + gloo) + SLACK_BYTES * messages
    return {
        "counted": counted,
        "gloo": gloo,
        "again": again,
        "other": other,
        "headers": HEADER_BYTES * sent.interface_packets,
        "interface": sent.interface_bytes,
        "wire": sent.wire_bytes,
        "explained": -allowed <= other <= allowed + again,
    }
