"""Tensors of which each process holds a part, as torch's DTensor, and whole ones."""

from collections.abc import Mapping

from torch import Tensor


def is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # its class is not imported where none is


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process; to be called by all. One that is whole is left as it is."""
    gather = getattr(tensor, "full_tensor", None)
    found: Tensor = tensor if gather is None else gather()
    return found


def whole_on_first(tensors: Mapping[str, Tensor], *, is_first: bool) -> dict[str, Tensor]:
    """As `whole`, in the memory of the host; the others are left with nothing."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if is_first or not is_part(tensor):
            found[name] = full.cpu() if is_part(tensor) else full
    return found


def as_part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, shared out as `like` is."""
    if is_part(tensor) or not is_part(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    placed = tensor.to(like.device, like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
