"""The most memory this process has held."""

import resource

import torch


def peak_bytes(device: str) -> int:
    """Of the GPU where there is one; else resident memory of the process."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
