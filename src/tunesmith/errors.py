"""The one error tree, as the client package publishes it, and how a job can fail.

The server raises these; `tuning_sdk` rebuilds the same class on the other side of the wire.
"""

from enum import StrEnum

from tuning_sdk.errors import (
    AuthenticationError,
    BadRequestError,
    ConflictError,
    FencedError,
    NoSpaceError,
    NotFoundError,
    NotReadyError,
    PayloadTooLargeError,
    PermissionError,
    RateLimitError,
    ServerError,
    TuningAPIError,
    ValidationError,
)

__all__ = [
    "AuthenticationError",
    "BadRequestError",
    "ConflictError",
    "FailureClass",
    "FencedError",
    "JobFailure",
    "NoSpaceError",
    "NotFoundError",
    "NotReadyError",
    "PayloadTooLargeError",
    "PermissionError",
    "RateLimitError",
    "ServerError",
    "TuningAPIError",
    "ValidationError",
]


class FailureClass(StrEnum):
    """Why a job failed. Each has a retry rule (`is_retryable`) and a sentence (`hint`)."""

    USER_ERROR = "user_error"
    DATA_ERROR = "data_error"
    NAN_LOSS = "nan_loss"
    OOM_GPU = "oom_gpu"
    OOM_HOST = "oom_host"
    DISK_FULL = "disk_full"
    DOWNLOAD = "download"
    GPU_ERROR = "gpu_error"
    SIGNAL = "signal"
    STALLED = "stalled"
    TIMEOUT = "timeout"
    INFRA_LOST = "infra_lost"
    NO_ARTIFACT = "no_artifact"
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"
    PARITY = "parity"

    @property
    def is_retryable(self) -> bool:
        """Whether the same job may simply be tried again."""
        return self in _RETRYABLE

    @property
    def hint(self) -> str:
        return _HINTS[self]


_RETRYABLE = {
    FailureClass.DOWNLOAD,
    FailureClass.GPU_ERROR,
    FailureClass.SIGNAL,
    FailureClass.STALLED,
    FailureClass.INFRA_LOST,
}
_HINTS = {
    FailureClass.USER_ERROR: "correct the request and submit it again",
    FailureClass.DATA_ERROR: "correct the rows named above and submit the job again",
    FailureClass.NAN_LOSS: "lower the learning rate, or look for faulty rows near that step",
    FailureClass.OOM_GPU: "lower batch_size or max_length, raise gradient_accumulation_steps",
    FailureClass.OOM_HOST: "lower batch_size or max_length, or run fewer jobs at once",
    FailureClass.DISK_FULL: "free space in the workspace; the last whole checkpoint is kept",
    FailureClass.DOWNLOAD: "check the network, or register a local copy: tunesmith models add",
    FailureClass.GPU_ERROR: "look at the GPU's health (tunesmith doctor) before the next try",
    FailureClass.SIGNAL: "the trainer was killed from outside; see the end of the job's log",
    FailureClass.STALLED: "no step was made for a long time; the log holds the stack",
    FailureClass.TIMEOUT: "raise the job's time limit, or make the job smaller",
    FailureClass.INFRA_LOST: "the worker was lost; check that host's log",
    FailureClass.NO_ARTIFACT: "the trainer ended without a model; see the end of the job's log",
    FailureClass.CHECKPOINT_CORRUPT: "no checkpoint could be read; submit the job again",
    FailureClass.PARITY: "the model's files stay in the attempt's folder; see what differs above",
}


class JobFailure(Exception):
    """The verdict that a job cannot go on; its class decides about retries."""

    def __init__(self, failure_class: FailureClass, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.failure_class = failure_class
        self.hint = hint or failure_class.hint
