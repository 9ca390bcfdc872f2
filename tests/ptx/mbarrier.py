"""Barriers in shared memory (``mbarrier``), which count arrivals and bytes."""

from __future__ import annotations

from dataclasses import dataclass, field


class ClusterError(RuntimeError):
    """CTAs of a cluster use each other, or their barriers, as they must not."""


@dataclass
class Mbarrier:
    """A barrier, of which a phase is complete once ``count`` have arrived and all bytes that they expect; bytes may come before they are expected."""

    count: int
    phase: int = field(default=0, init=False)
    arrivals: int = field(default=0, init=False)  # to come
    bytes: int = field(default=0, init=False)  # to come

    def __post_init__(self) -> None:
        self.arrivals = self.count

    def __str__(self) -> str:
        return f"phase {self.phase}, {self.arrivals} arrivals and {self.bytes} bytes to come"

    def update(self, text: str, arrivals: int = 0, expected: int = 0, received: int = 0) -> None:
        """Count. Raises ClusterError for more than expected; ``text`` says of whom."""
        self.arrivals -= arrivals
        self.bytes += expected - received
        if self.arrivals < 0:
            raise ClusterError(f"{text}: more arrivals than {self.count} in phase {self.phase}")
        if self.arrivals == 0:
            self.check(text)
            if self.bytes == 0:
                self.phase, self.arrivals = self.phase + 1, self.count

    def check(self, text: str) -> None:
        """Raise ClusterError if more bytes have come than were expected, when no more are to be."""
        if self.bytes < 0:
            raise ClusterError(f"{text}: {-self.bytes} more bytes than expected in phase {self.phase}")

    def is_complete(self, parity: int) -> bool:
        """Tell whether a phase of this parity was the last to be complete, as ``try_wait.parity`` does; at first one of parity 1 was."""
        return self.phase % 2 != parity
