"""What a job is expected to take, told before it runs, and what the telling stands on."""

from typing import Literal

from pydantic import Field

from tunesmith.spec.strict import Strict


class Measure(Strict):
    """A look at rows as they are trained on. Tokens of all a row's answers, as they are cut."""

    rows: int = Field(ge=0)
    """Of the file."""
    looked_at: int = Field(ge=0)
    """Rows, spread evenly over the file; all of them where it is small."""
    usable: float = Field(ge=0, le=1)
    """Share of them that is not left out."""
    tokens: float = Field(ge=0)
    """Of a usable row, on average."""
    shared: float = Field(0.0, ge=0)
    """Of these, a prompt's that two answers can share: it is counted twice in `tokens`."""
    labels: float = Field(ge=0)
    """Of these the learnt ones, on average."""
    longest: int = Field(ge=0)
    """Tokens of the longest that was seen."""
    answers: int = Field(1, ge=1, le=2)
    """Of a row: two where an answer is compared with another."""

    @property
    def is_exact(self) -> bool:
        return self.looked_at == self.rows


class Estimate(Strict):
    """Of a whole job. Sizes in bytes."""

    parameters: int = Field(description="of the model")
    trainable_parameters: int = Field(description="that are trained: all, or those of adapters")
    rows: int = Field(description="of the data set")
    samples: int = Field(
        description="of an epoch: rows that are not left out, packed blocks, or judged answers"
    )
    steps: int = Field(description="optimizer steps in all")
    tokens: int = Field(description="in all; each epoch counts")
    label_tokens: int = Field(description="of these, the learnt ones")
    longest_sample_tokens: int = Field(description="of the longest sample that was looked at")
    is_exact: bool = Field(
        description="whether every row was tokenised for this, or some, spread over the file"
    )
    seconds: float = Field(description="from its start to its end")
    seconds_from: Literal["history", "guess"] = Field(
        description="history: from the speed of jobs that ran here; guess: there is none yet"
    )
    peak_memory_bytes: int = Field(description="on the careful side: what is set aside for the job")
    checkpoint_bytes: int = Field(description="one checkpoint")
    disk_bytes: int = Field(
        description="checkpoints that are kept, one being written, and the model"
    )


class Actual(Strict):
    """How it went, as far as it has gone; null: not known yet."""

    trainable_parameters: int | None = Field(None, description="as its trainer counted them")
    steps: int = Field(0, description="optimizer steps so far")
    tokens: int | None = Field(None, description="in all, once it has ended well")
    seconds: float | None = Field(None, description="since it was started first")
    peak_memory_bytes: int | None = Field(None, description="the most its trainer has held")
    checkpoint_bytes: int | None = Field(None, description="the newest checkpoint")


class Probe(Strict):
    """One step on the longest samples, before the first one that counts."""

    samples: int = Field(description="of the step")
    tokens: int = Field(description="of all of them")
    seconds: float = Field(description="that it took")
    peak_memory_bytes: int = Field(description="with what the optimizer sets aside")


class Forecast(Estimate):
    """What was told beforehand, beside what then happened."""

    probe: Probe | None = Field(None, description="where it was asked for")
    actual: Actual = Field(description="how it went")
