"""What the server answers, typed. Fields that a newer server adds are kept, not refused."""

from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tuning_sdk.errors import TuningAPIError

FINAL = frozenset({"completed", "failed", "cancelled"})


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    @classmethod
    def of(cls, answer: Any) -> Self:
        """From an answer's JSON, parsed or as text. Raises TuningAPIError where it does not fit."""
        try:
            if isinstance(answer, str | bytes):
                return cls.model_validate_json(answer)
            return cls.model_validate(answer)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part) for part in fault["loc"]) or "the whole"
            raise TuningAPIError(
                f"the server's answer is no {cls.__name__}: {place}: {fault['msg']}; "
                "is base_url right, and is the server as new as this client?"
            ) from None


class CreatedJob(Answer):
    job_id: str
    status: str = "pending"
    message: str = ""


class Job(Answer):
    """A job as GET /jobs/{id} shows it. Times are UTC, to the second."""

    job_id: str
    status: str
    """pending, running, completed, failed or cancelled."""
    training_type: str = ""
    config: dict[str, Any] = {}
    """The request, defaults filled in."""
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    error: str | None = None
    log_file: str | None = None
    output_dir: str | None = None
    fine_tuned_model: str | None = None
    """The name to chat with, once completed."""
    progress: float | None = None
    """0 to 1."""
    metrics: dict[str, Any] | None = None
    """The latest of each."""
    eta_seconds: float | None = None
    sweep: dict[str, Any] | None = None
    """Of several configurations: `best`, and in `trials` what came of each."""
    estimate: dict[str, Any] | None = None
    """What was told beforehand (see `Estimate`), and in `actual` how it went."""

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended; a job that is still stopping reads `cancelled` before it has."""
        return self.status in FINAL and self.completed_at is not None

    @property
    def is_successful(self) -> bool:
        return self.status == "completed"

    @property
    def is_failed(self) -> bool:
        return self.status == "failed"

    @property
    def is_cancelled(self) -> bool:
        return self.status == "cancelled"

    @property
    def duration(self) -> int | None:
        """Whole seconds from start to end; None until it has ended."""
        if self.started_at is None or self.completed_at is None:
            return None
        return round((_utc(self.completed_at) - _utc(self.started_at)).total_seconds())


class Estimate(Answer):
    """What a job would take. Sizes in bytes."""

    parameters: int
    trainable_parameters: int
    rows: int = 0
    samples: int = 0
    """Of an epoch."""
    steps: int
    tokens: int
    """In all; each epoch counts."""
    label_tokens: int = 0
    longest_sample_tokens: int = 0
    is_exact: bool = False
    """Whether every row was tokenised for this, or some of them, spread over the file."""
    seconds: float
    seconds_from: str = "guess"
    """history: from the speed of jobs that ran there; guess: there is none yet."""
    peak_memory_bytes: int
    checkpoint_bytes: int
    disk_bytes: int


class JobEvent(Answer):
    """One line of a job's history; `seq` counts 1, 2, 3, …"""

    seq: int
    type: str
    at: float | datetime | None = None
    data: dict[str, Any] = {}

    @property
    def is_terminal(self) -> bool:
        return self.type in {"succeeded", "failed", "cancelled"}


class LogLines(Answer):
    job_id: str
    logs: tuple[str, ...]
    total_lines: int


class Dataset(Answer):
    """An upload that was stored; `dataset_path` goes into `jobs.train_sft`."""

    dataset_path: str
    filename: str = ""
    size: int = 0
    num_samples: int = 0
    format: str = ""


class Token(Answer):
    id: int
    text: str = ""
    """A part of a character reads as its bytes, `\\xed\\x95`."""
    is_bytes: bool = False
    weight: int = 0
    """1: learnt; 0: seen only."""


class Preview(Answer):
    """A row as it would be trained on."""

    fate: str
    """trained, truncated, dropped, masked or refused."""
    why: str = ""
    row: int = 1
    line: int = 0
    format: str = ""
    max_length: int = 0
    """Tokens: the model's context, where that is shorter than what was asked for."""
    length: int = 0
    """Tokens before anything is cut off."""
    trained_tokens: int = 0
    ids: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    tokens: tuple[Token, ...] = ()
    text: str = ""
    """What the template makes of the row."""
    template: str | None = None


class Model(Answer):
    id: str
    object: str = "model"
    created: int | None = None
    owned_by: str | None = None


class Said(Answer):
    """Read by attribute, or as the JSON that it is: `answer["model_name"]`."""

    model_name: str = ""
    generation_time: float = 0.0
    """Seconds."""
    usage: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).model_fields and name not in (self.model_extra or {}):
            raise KeyError(name)
        return getattr(self, name)


class Generation(Said):
    generated_text: tuple[str, ...]
    """The prompt and its continuation, for each of `num_return_sequences`."""
    prompt: str = ""

    @property
    def text(self) -> str:
        """What the first of them adds to the prompt."""
        return self.generated_text[0].removeprefix(self.prompt) if self.generated_text else ""


class ChatAnswer(Said):
    response: str
    instruction: str = ""

    @property
    def text(self) -> str:
        return self.response


class ModelInfo(Answer):
    model_name: str
    model_path: str = ""
    device: str = ""
    gpu_memory_allocated: str = "0.00 GB"
    gpu_memory_reserved: str = "0.00 GB"
    quantization: str | None = None
    dtype: str | None = None
    parameters: int | None = None
    context_length: int | None = None
    adapters: tuple[str, ...] = ()


class LoadedModel(Answer):
    status: str
    message: str = ""
    model_name: str
    model_path: str = ""


def _utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)
