"""From an exception to the class and the sentence that a job's failure is told with."""

import errno
import os

from pydantic import ValidationError as PydanticError

from tunesmith.errors import FailureClass, JobFailure, TuningAPIError
from tunesmith.spec.pipe import Failed

MAX_MESSAGE = 4000
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_FULL_WORDS = tuple(os.strerror(number) for number in _DISK_FULL)
_HOST_MEMORY_WORDS = ("can't allocate memory", "Cannot allocate memory", "bad_alloc")
_GPU_WORDS = ("CUDA error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL error")


def tell(error: BaseException) -> Failed:
    """The event for `error`, whatever it is."""
    verdict = judge(error)
    return Failed(
        failure_class=verdict.failure_class,
        message=_clip(str(verdict), MAX_MESSAGE),
        hint=_clip(verdict.hint, 2000),
    )


def is_disk_full(error: BaseException) -> bool:
    """Also where a library wraps the system's error in one of its own."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    return any(word in str(error) for word in _DISK_FULL_WORDS)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU or of the host: a smaller pass may fit."""
    return judge(error).failure_class in (FailureClass.OOM_GPU, FailureClass.OOM_HOST)


def judge(error: BaseException) -> JobFailure:
    """The verdict on `error`; it holds nothing of what the error holds."""
    if isinstance(error, JobFailure):
        return error
    if isinstance(error, TuningAPIError):
        return JobFailure(FailureClass.USER_ERROR, error.message)
    if isinstance(error, PydanticError):
        return JobFailure(FailureClass.USER_ERROR, f"the task cannot be read: {_first(error)}")
    if isinstance(error, ModuleNotFoundError):
        return JobFailure(
            FailureClass.USER_ERROR,
            f"this host cannot train: the package {error.name} is not installed",
            "install it on the worker's host: pip install 'tunesmith[train]'",
        )
    text = f"{type(error).__name__}: {error}"
    return JobFailure(_class_of(error, text), text)


def _class_of(error: BaseException, text: str) -> FailureClass:
    if isinstance(error, OSError | Exception) and is_disk_full(error):
        return FailureClass.DISK_FULL
    if type(error).__name__ == "OutOfMemoryError":
        return FailureClass.OOM_GPU
    if isinstance(error, MemoryError) or any(word in text for word in _HOST_MEMORY_WORDS):
        return FailureClass.OOM_HOST
    if any(word in text for word in _GPU_WORDS):
        return FailureClass.GPU_ERROR
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return FailureClass.USER_ERROR
    return FailureClass.NO_ARTIFACT


def _first(error: PydanticError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the task"
    return f"{place}: {first['msg']}"


def _clip(text: str, limit: int) -> str:
    clean = text.encode("utf-8", "replace").decode()
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
