"""Which devices of a worker are taken, by attempts and engines alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import bindparam, insert, select
from sqlalchemy.engine import Connection

from tunesmith.spec.hands import Capacity
from tunesmith.spec.records import Needs
from tunesmith.store.tables import reservations, workers

_TAKEN = select(reservations.c.device, reservations.c.memory_bytes).where(
    reservations.c.worker_id == bindparam("by")
)


@dataclass(frozen=True)
class Room:
    """What is free on a worker: by its own word and by what is reserved here.

    An engine on a CPU takes memory but no slot: else engines that wait for a question would keep
    jobs from running.
    """

    slots: int
    gpus: tuple[int, ...]
    memory_bytes: int


def room(tx: Connection, worker_id: str, capacity: Capacity) -> Room:
    taken = dict(tx.execute(_TAKEN, {"by": worker_id}).tuples().all())
    slots = sum(device.startswith("cpu:job:") for device in taken)
    return Room(
        slots=max(0, min(capacity.slots, capacity.max_slots - slots)),
        gpus=tuple(index for index in capacity.gpus if f"gpu:{index}" not in taken),
        memory_bytes=max(0, min(capacity.memory_bytes, capacity.max_memory_bytes - _used(taken))),
    )


def reserve(tx: Connection, worker_id: str, holder: str, needs: Needs, gpus: Sequence[int]) -> None:
    """Write down that `holder` (`job:<id>` or `engine:<id>`) has these devices.

    A device that another one holds is refused by the table (IntegrityError).
    """
    devices = [f"gpu:{index}" for index in gpus] or [f"cpu:{holder}"]
    tx.execute(
        insert(reservations),
        [
            {
                "worker_id": worker_id,
                "device": device,
                "holder": holder,
                "memory_bytes": needs.memory_bytes,
            }
            for device in devices
        ],
    )


def can_return(tx: Connection, worker_id: str, needs: Needs, gpus: Sequence[int]) -> bool:
    """Whether what was lost there may have its devices again: nobody holds any of them, and the
    memory is not given away. The worker's row is locked, as by a claim."""
    known = select(workers.c.capacity).where(workers.c.id == worker_id).with_for_update()
    capacity = tx.scalar(known)
    taken = dict(tx.execute(_TAKEN, {"by": worker_id}).tuples().all())
    if gpus or capacity is None:
        return not any(f"gpu:{index}" in taken for index in gpus)
    most = Capacity.model_validate(capacity).max_memory_bytes
    return _used(taken) + needs.memory_bytes <= most


def _used(taken: Mapping[str, int]) -> int:
    """Bytes of host memory that are reserved."""
    return sum(size for device, size in taken.items() if device.startswith("cpu:"))


def fits_at_most(needs: Needs, capacity: Capacity) -> bool:
    """Whether a worker that does nothing else could take it."""
    if needs.gpus:
        return needs.gpus <= capacity.max_gpus
    return capacity.max_slots > 0 and needs.memory_bytes <= capacity.max_memory_bytes
