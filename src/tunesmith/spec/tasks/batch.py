"""A step's samples in all, shared out over batches, devices and accumulation."""

from collections.abc import Collection

from tunesmith.spec.train import AnySpec

BATCH, ACCUMULATION = "optim.batch_size", "optim.gradient_accumulation_steps"
MAX_SAMPLES = 1 << 31


def share_out(samples: int, spec: AnySpec, given: Collection[str]) -> dict[str, int]:
    """Batch and accumulation, by place; one that is among `given` stays. Raises ValueError."""
    if not 1 <= samples <= MAX_SAMPLES:
        raise ValueError(f"write a number from 1 to {MAX_SAMPLES}")
    optim, devices = spec.optim, spec.run.devices
    batch, accumulation = optim.batch_size, optim.gradient_accumulation_steps
    if BATCH in given and ACCUMULATION not in given:
        accumulation = max(1, samples // (batch * devices))
    elif BATCH not in given:
        batch = max(1, samples // (accumulation * devices))
    if batch * devices * accumulation != samples:
        raise ValueError(
            f"{samples} is not batch × devices × accumulation, {batch} × {devices} × {accumulation}"
        )
    return {BATCH: batch, ACCUMULATION: accumulation}
