"""Machines for a cluster of CTAs, which run side by side and send each other bytes (PTX ISA, "mbarrier", "st.async", "cp.async.bulk").

Lanes may part: those at the lowest instruction go first, and where all of a warp or of a CTA must come together, they wait for each other. What is
fast or slow on a GPU is a matter of chance here: warps run one after the other, each until it waits, and bytes come at once or as late as they may.
What fences order is not found.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.machine import SHARED_BYTES, Machine, Operand
from tests.ptx.mbarrier import ClusterError, Mbarrier
from tests.ptx.memory import Memory, Scratch
from tests.ptx.program import Program
from tests.ptx.registers import Lanes, size

WINDOW = 1 << 24  # of addresses of shared memory: the first is a CTA's own, then comes one for each CTA of the cluster
ALL_LANES = {"-1", "0xffffffff"}


class Wait(NamedTuple):
    """Lanes that wait until something is over, and what is to be said if it never is."""

    lanes: Lanes
    is_over: Callable[[], bool]
    reason: Callable[[], str]


class Transfer(NamedTuple):
    """Bytes on their way into a CTA's shared memory, to ``address``, where a barrier counts them; they are read when they arrive."""

    cta: Cta
    address: int
    barrier: int
    size: int
    alignment: int
    read: Callable[[], Lanes]
    text: str


class Cluster:
    """Runs a cluster of CTAs.

    Args:
        program, warps, parameters, memory: as of a :class:`Machine`.
        ctas: how many there are.
        place: as of a :class:`Machine`, but of the cluster in the grid: "%clusterid.x", "%nclusterid.x" and so on.
        shared: bytes of shared memory of a CTA.
        order: of warps, and of bytes that come late; if None, the warps of a CTA run in step, and the CTAs one after the other.
        is_late: bytes come one transfer at a time, when all lanes wait.
    """

    def __init__(
        self, program: Program, ctas: int, warps: int, parameters: dict[str, int], memory: Memory, place: dict[str, int],
        shared: int = SHARED_BYTES, order: random.Random | None = None, is_late: bool = False,
    ) -> None:  # fmt: skip
        self.order, self._is_late, self._late = order, is_late, list[Transfer]()
        ranks = [place | {"%cluster_ctarank": rank, "%cluster_nctarank": ctas} for rank in range(ctas)]
        self.ctas = [Cta(self, rank, shared, program, warps, parameters, memory, names) for rank, names in enumerate(ranks)]

    def run(self) -> int:
        """Run to the end and return how many instructions that took. Raises ClusterError, besides what a :class:`Machine` does."""
        total = 0
        while any(cta.is_alive.any() for cta in self.ctas) or self._late:
            count = sum(cta.run() for cta in self.shuffled(self.ctas))
            if not count and not self._late:
                raise ClusterError("\n".join(["all wait:", *(reason for cta in self.ctas for reason in cta.reasons())]))
            if not count:
                transfer = self._late.pop(self.order.randrange(len(self._late)) if self.order else 0)
                transfer.cta.receive(transfer)
            total += count
        for cta in self.ctas:
            cta.check()
        return total

    def shuffled(self, items: list[Any]) -> list[Any]:
        """Return the items in the order in which they run now."""
        return self.order.sample(items, len(items)) if self.order else items

    def send(self, transfer: Transfer) -> None:
        """Let bytes come."""
        if self._is_late:
            self._late.append(transfer)
        else:
            transfer.cta.receive(transfer)


class Cta(Machine):
    """A CTA of a cluster."""

    def __init__(self, cluster: Cluster, rank: int, shared: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cluster, self._rank, self._shared = cluster, rank, Scratch(shared)
        self._barriers: dict[int, Mbarrier] = {}
        self.is_alive, self._next, self._waits = np.ones(self._lanes, bool), np.zeros(self._lanes, int), list[Wait]()
        self._has_come = np.zeros(self._lanes, bool)  # to an instruction for which others must come too
        self._arrivals, self._has_arrived = np.zeros(self._lanes, int), np.zeros(self._lanes, bool)  # at the barrier of the cluster
        teams = [np.arange(self._lanes) // 32 == warp for warp in range(self._lanes // 32)]
        self._teams = teams if cluster.order else [np.logical_or.reduce(teams)]

    @np.errstate(all="ignore")
    def run(self) -> int:
        """Run until all lanes wait or have exited, and return how many instructions that took."""
        self._waits = [wait for wait in self._waits if not wait.is_over()]
        count = 0
        for team in self._cluster.shuffled(self._teams):
            while (ready := team & self.is_alive & ~self._has_come & ~self._is_waiting()).any():
                at = int(self._next[ready].min())
                self._step(at, ready & (self._next == at))
                count += 1
        return count

    def receive(self, transfer: Transfer) -> None:
        """Write bytes that have come, and count them."""
        if not self.is_alive.any():
            raise ClusterError(f"{transfer.text}: bytes come to {self}, which has exited")
        self._shared.at(transfer.address, transfer.size, transfer.text, transfer.alignment)[:] = transfer.read()
        self._barrier_at(transfer.barrier, transfer.text).update(transfer.text, received=transfer.size)

    def reasons(self) -> Iterator[str]:
        """Yield who waits for what."""
        for wait in self._waits:
            yield f"{self}, {_described(wait.lanes)}: {wait.reason()}"
        for at in np.unique(self._next[self._has_come]):
            lanes = self._has_come & (self._next == at)
            text = self._program.instructions[at].text
            yield f"{self}, {_described(lanes)}: {text}, which {lanes.sum()} of {self._lanes} lanes have reached"

    def check(self) -> None:
        """Raise ClusterError if more bytes came than were expected."""
        for address, barrier in self._barriers.items():
            barrier.check(f"barrier {address:#x} of {self}")

    def lacking(self, arrivals: int) -> int:
        """Return how many lanes have not arrived so often at the barrier of the cluster; it does not count those that have exited."""
        return int((self.is_alive & (self._arrivals < arrivals)).sum())

    def __str__(self) -> str:
        return f"CTA {self._rank}"

    def _step(self, at: int, here: Lanes) -> None:
        instruction = self._program.instructions[at]
        group = self._group(instruction.op)
        if group > 1:
            there = here | self._has_come & (self._next == at)
            here = there.reshape(-1, group).all(1).repeat(group)
            self._has_come = (self._has_come | there) & ~here
        active = here & self._active(instruction)
        self._next[here] = at + 1
        if instruction.op[0] == "bra":
            self._next[active] = self._program.targets[at]
        elif instruction.op[0] == "ret":
            self.is_alive = self.is_alive & ~active
        else:
            self._execute(instruction, active)

    def _group(self, op: tuple[str, ...]) -> int:
        """Return how many lanes must come together for an instruction."""
        if op[0] in ("bar", "barrier") and not {"warp", "cluster"} & set(op):
            return self._lanes
        return 32 if {"sync", "aligned"} & set(op) else 1

    def _is_waiting(self) -> Lanes:
        return np.logical_or.reduce([wait.lanes for wait in self._waits]) if self._waits else np.zeros(self._lanes, bool)

    def _wait(self, lanes: Lanes, is_over: Callable[[], bool], reason: Callable[[], str]) -> None:
        if lanes.any() and not is_over():
            self._waits.append(Wait(lanes, is_over, reason))

    def _place(self, address: int) -> tuple[Cta, int]:
        """Return the CTA that has an address, and the address there."""
        window, at = divmod(address, WINDOW)
        return self._cluster.ctas[window - 1] if window else self, at

    def _at(self, op: tuple[str, ...], address: int, count: int, text: str) -> Lanes:
        if "shared::cluster" not in op:
            return super()._at(op, address, count, text)
        cta, at = self._place(address)
        if not cta.is_alive.any():
            raise ClusterError(f"{text}: {cta} has exited")
        return cta._shared.at(at, count, text)

    def _each(self, operand: Operand, active: Lanes) -> Iterator[tuple[int, int]]:
        """Yield each active lane with its address."""
        addresses = self._addresses(operand)
        yield from ((int(lane), int(addresses[lane])) for lane in np.flatnonzero(active))

    def _barrier_at(self, address: int, text: str) -> Mbarrier:
        if address not in self._barriers:
            raise ClusterError(f"{text}: no barrier was initialised at {address:#x} of {self}")
        return self._barriers[address]

    def _mapa(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        ranks = self._bits(operands[2])
        if "shared::cluster" not in op:
            raise NotImplementedError(text)
        if (ranks[active] >= len(self._cluster.ctas)).any():
            raise ClusterError(f"{text}: {ranks[active].max()} is no CTA of the cluster")
        self._assign(operands[0], self._bits(operands[1]) % np.uint64(WINDOW) + (ranks + np.uint64(1)) * np.uint64(WINDOW), active)

    def _bar(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        if len(operands) != 1 or "warp" in op and operands[0] not in ALL_LANES or "warp" not in op and operands[0] != "0":
            raise NotImplementedError(text)

    def _barrier(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        if op[1] != "cluster":
            self._bar(op, operands, active, text)
            return
        is_arrival = op[2] == "arrive"
        if (self._has_arrived[active] == is_arrival).any():
            raise ClusterError(f"{text} of {self}: a lane {'arrives again before it has waited' if is_arrival else 'waits and has not arrived'}")
        self._has_arrived[active] = is_arrival
        self._arrivals[active] += is_arrival
        arrivals = int(self._arrivals.max(where=active, initial=0))

        def lacking() -> dict[str, int]:
            return {str(cta): count for cta in self._cluster.ctas if (count := cta.lacking(arrivals))}

        if not is_arrival:
            self._wait(active, lambda: not lacking(), lambda: f"{text} for lanes that have not arrived: {lacking()}")

    def _mbarrier(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        if op[1] == "init":
            for lane, address in self._each(operands[0], active):
                self._shared.at(address, 8, text)
                if address in self._barriers:
                    raise ClusterError(f"{text}: the barrier at {address:#x} of {self} is initialised twice")
                self._barriers[address] = Mbarrier(int(self._bits(operands[1])[lane]))
        elif op[1] == "inval":
            for _, address in self._each(operands[0], active):
                self._barrier_at(address, text)
                del self._barriers[address]
        elif op[1] in ("arrive", "expect_tx"):
            target, *rest = operands[op[1] == "arrive" :]
            counts = self._bits(rest[0] if rest else "1")
            for lane, address in self._each(target, active):
                cta, at = self._place(address)
                barrier, count = cta._barrier_at(at, text), int(counts[lane])
                if not cta.is_alive.any():
                    raise ClusterError(f"{text} of {self}: {cta} has exited")
                arrivals = 0 if op[1] == "expect_tx" else 1 if "expect_tx" in op else count
                barrier.update(f"{text} of {self}", arrivals=arrivals, expected=count if "expect_tx" in op else 0)
        elif op[1] in ("try_wait", "test_wait") and "parity" in op:
            self._try_wait(operands, active, text)
        else:
            raise NotImplementedError(text)

    def _try_wait(self, operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        """Tell whether a phase is complete. Lanes that find it is not wait, and then try again, as a GPU too may say no after a while."""
        is_complete, parities = np.zeros(self._lanes, np.uint64), self._bits(operands[2])
        waiting: dict[tuple[int, int], list[int]] = {}
        for lane, address in self._each(operands[1], active):
            parity = int(parities[lane])
            is_complete[lane] = self._barrier_at(address, text).is_complete(parity)
            if not is_complete[lane]:
                waiting.setdefault((address, parity), []).append(lane)
        self._assign(operands[0], is_complete, active)
        for (address, parity), lanes in waiting.items():
            barrier = self._barriers[address]

            def reason(address: int = address, barrier: Mbarrier = barrier) -> str:
                return f"{text} for the barrier at {address:#x}: {barrier}"

            self._wait(np.isin(np.arange(self._lanes), lanes), lambda barrier=barrier, parity=parity: barrier.is_complete(parity), reason)

    def _st(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        if op[1] != "async":
            super()._st(op, operands, active, text)
            return
        names = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        stored = np.stack([self._bits(name) for name in names], axis=1).astype(f"u{size(op[-1])}").view(np.uint8)
        barriers = dict(self._each(operands[2], active))
        for lane, address in self._each(operands[0], active):
            self._send(address, barriers[lane], stored.shape[1], stored.shape[1], lambda lane=lane: stored[lane], text)

    def _cp(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        if op[1:] == ("async", "bulk", "prefetch", "L2", "global"):
            counts = self._bits(operands[1])
            for lane, address in self._each(operands[0], active):
                self._memory.at(address, _in_bulk(int(counts[lane]), f"{text} of {self}"), text, 16)
            return
        if op[1:3] != ("async", "bulk") or op[4:5] != ("global",) or "multicast::cluster" in op:
            raise NotImplementedError(text)
        sources, counts, barriers = dict(self._each(operands[1], active)), self._bits(operands[2]), dict(self._each(operands[3], active))
        for lane, address in self._each(operands[0], active):
            count, source = _in_bulk(int(counts[lane]), f"{text} of {self}"), sources[lane]
            self._send(address, barriers[lane], count, 16, lambda source=source, count=count: self._memory.at(source, count, text, 16), text)

    def _send(self, address: int, barrier: int, count: int, alignment: int, read: Callable[[], Lanes], text: str) -> None:
        (cta, at), (of_barrier, barrier_at) = self._place(address), self._place(barrier)
        if cta is not of_barrier:
            raise ClusterError(f"{text} of {self}: bytes for {cta} are counted by a barrier of {of_barrier}")
        self._cluster.send(Transfer(cta, at, barrier_at, count, alignment, read, f"{text} of {self}"))


def _in_bulk(count: int, text: str) -> int:
    """Return how many bytes are copied in bulk. Raises ClusterError unless that is a multiple of 16."""
    if count % 16:
        raise ClusterError(f"{text}: {count} is not a multiple of 16 bytes")
    return count


def _described(lanes: Lanes) -> str:
    return f"{lanes.sum()} lanes from {np.flatnonzero(lanes)[0]} on"
