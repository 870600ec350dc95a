"""What the event log and a person are told while a job runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eevp_batch.cluster.engine_loop import LoopProgress
from eevp_batch.cluster.learning import LearnOrder
from eevp_batch.cluster.leases import Lease

if TYPE_CHECKING:
    from eevp_batch.cluster.bisection import Span
    from eevp_batch.cluster.fleet import Slot
    from eevp_batch.cluster.replica import ReplicaReady


@dataclass(frozen=True, slots=True)
class News:
    """One event.

    Attributes:
        text: one sentence.
    """

    event: str
    text: str
    fields: dict[str, Any] = field(default_factory=dict)


def learning_started(replica: str, order: LearnOrder) -> News:
    """A replica begins to learn exits."""
    text = f"{replica} learns exits from {order.num_rows} rows"
    return News("learning_started", text, {"replica": replica, "chunks": len(order.chunks)})


def memory_shortage(replica: str, before: LoopProgress, heard: LoopProgress) -> News | None:
    """A replica ran out of memory; None where it did not.

    Args:
        replica: its name.
        before: what it reported before.
        heard: what it reports now.
    """
    steps = heard.shortages - before.shortages
    if steps <= 0:
        return None
    text = (
        f"{replica} ran out of memory in {steps} step(s); their rows start again, and for some "
        f"time it holds at most {heard.max_resident}"
    )
    fields = {"replica": replica, "steps": steps, "max_resident": heard.max_resident}
    return News("memory_shortage", text, fields)


def left(replica: str, reason: str, given_back: Sequence[Lease]) -> News:
    """A replica has left, for it was told to, or for there was nothing left to do for it."""
    chunks = [lease.chunk_id for lease in given_back]
    text = f"{replica} left; {len(chunks)} chunks go back: {reason}"
    return News("replica_left", text, {"replica": replica, "reason": reason, "chunks": chunks})


def ready_fields(slot: Slot, ready: ReplicaReady) -> dict[str, Any]:
    """What the event log says of a replica that is ready."""
    return {
        "replica": slot.name,
        "pid": ready.pid,
        "node_id": ready.node_id,
        "max_resident": ready.max_resident,
        "leases": slot.max_leases,
        "start_s": round(ready.start_s, 3),
        "machine": ready.machine,
    }


def lease_fields(lease: Lease, span: Span | None) -> dict[str, Any]:
    """What the event log says of a lease.

    Args:
        lease: the lease.
        span: the rows that a suspect is tried with; None: all.
    """
    fields = {
        "chunk_id": lease.chunk_id,
        "epoch": lease.epoch,
        "attempt": lease.attempt_no,
        "replica": lease.replica,
        "phase": lease.phase,
    }
    if lease.is_copy:
        fields["is_copy"] = True
    return fields if span is None else {**fields, "span": span}
