"""Jobs of a server: `jobs ls|show|watch`, `logs`, `cancel`."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith.cli.place import JsonOption, KeyOption, ServerOption, WorkspaceOption, client_for
from tunesmith.cli.terminal import (
    JOB_FAILED,
    NOT_FOUND,
    OK,
    CommandError,
    show,
    show_json,
    show_rows,
    suggest,
    tell,
)
from tunesmith.cli.text import duration_text

if TYPE_CHECKING:
    from tunesmith.cli.course import Course
    from tuning_sdk import CreatedJob, Job, TuningClient

jobs = typer.Typer(no_args_is_help=True, help="Training jobs of the server.")

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The job, as `jobs ls` shows it.")]
Status = Literal["pending", "running", "completed", "failed", "cancelled"]


@jobs.command("submit")
def submit_job(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, as `train` takes it.")
    ],
    suffix: Annotated[str | None, typer.Option(help="Part of the tuned model's name.")] = None,
    priority: Annotated[int | None, typer.Option(min=-1000, max=1000)] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")] = False,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a configuration's file as a job of the server; its paths are the server's."""
    from tunesmith.cli.specfile import read_bytes

    read_bytes(config)
    with client_for(server, api_key, workspace) as client:
        created = client.jobs.train_config(config, suffix=suffix, priority=priority)
        raise typer.Exit(started(client, created, wait, as_json))


def started(client: "TuningClient", created: "CreatedJob", wait: bool, as_json: bool) -> int:
    """Tell of a new job, and follow it where that is asked for; returns the exit code."""
    job_id = created.job_id
    if as_json:
        show_json(created.model_dump(mode="json"))
    else:
        show(job_id)
        tell(created.message or "")
    if not wait:
        suggest(f"tunesmith jobs watch {job_id}")
        return OK
    try:
        return watch(client, job_id, as_json)
    except KeyboardInterrupt:
        tell(f"\njob {job_id} goes on; `tunesmith cancel {job_id}` stops it")
        raise


@jobs.command("ls")
def list_jobs(
    status: Annotated[Status | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    with client_for(server, api_key, workspace) as client:
        found = client.jobs.list(status=status, limit=limit)
        if not as_json:
            found = [_with_progress(client, job) for job in found]
    if as_json:
        show_json([job.model_dump(mode="json") for job in found])
    elif not found:
        tell("no jobs" + (f" that are {status}" if status else " yet"))
        suggest("tunesmith train sft --model MODEL --dataset DATA --wait")
    else:
        headers = ["ID", "TYPE", "STATUS", "DONE", "MODEL", "AGE", "TOOK"]
        show_rows([_row(job) for job in found], headers)
        suggest(f"tunesmith jobs watch {found[0].job_id}")


@jobs.command("show")
def show_job(
    job_id: IdArgument,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all about one job."""
    with client_for(server, api_key, workspace) as client, near_ids(client, job_id):
        job = client.jobs.get(job_id)
    if as_json:
        show_json(job.model_dump(mode="json"))
        return
    facts = _facts(job)
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        show(f"{name:<{width}}{value}")
    suggest(f"tunesmith logs {job_id}" if job.is_terminal else f"tunesmith jobs watch {job_id}")


@jobs.command("watch")
def watch_job(
    job_id: IdArgument,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as JSON.")] = False,
) -> None:
    """Follow a job to its end. Ctrl-C leaves the job running. Exits with 5 where the job failed."""
    with client_for(server, api_key, workspace) as client:
        raise typer.Exit(watch(client, job_id, as_json))


def logs(
    job_id: IdArgument,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")
    ] = False,
    tail: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="The last so many lines; 0: all.")
    ] = 100,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a job's log."""
    with client_for(server, api_key, workspace) as client, near_ids(client, job_id):
        if follow:
            for line in client.jobs.follow_logs(job_id, tail):
                show(line)
            return
        found = client.jobs.logs(job_id, tail)
    if as_json:
        show_json(found.model_dump(mode="json"))
    else:
        for line in found.logs:
            show(line)


def cancel(
    job_id: IdArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Kill it now, without a checkpoint.")
    ] = False,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop a job after its step, with a checkpoint."""
    with client_for(server, api_key, workspace) as client, near_ids(client, job_id):
        answer = client.jobs.cancel(job_id, force=force)
    if as_json:
        show_json(answer.model_dump(mode="json"))
    else:
        tell(answer.message or f"{job_id}: {answer.status}")


def watch(client: "TuningClient", job_id: str, as_json: bool = False) -> int:
    """Show a job's events to its end; returns the exit code."""
    from tunesmith.cli.progress import Progress

    with near_ids(client, job_id), Progress(job_id, is_live=False if as_json else None) as progress:
        for event in client.jobs.events(job_id):
            if as_json:
                print(event.model_dump_json(), flush=True)
            else:
                progress.take(event.model_dump())
    job = client.jobs.get(job_id)
    if not as_json:
        _conclude(job, progress.course)
    return OK if job.is_successful else JOB_FAILED


@contextmanager
def near_ids(client: "TuningClient", job_id: str) -> Iterator[None]:
    """Where the job is not found, add the id that was probably meant."""
    from tunesmith.cli.near import near_name
    from tuning_sdk import NotFoundError, TuningAPIError

    try:
        yield
    except NotFoundError as error:
        try:
            known = [job.job_id for job in client.jobs.list(limit=200)]
        except TuningAPIError:
            known = []
        told = str(error).rstrip(".") + near_name(job_id, known)
        raise CommandError(told, "`tunesmith jobs ls` lists them", NOT_FOUND) from None


def _conclude(job: "Job", course: "Course") -> None:
    from tunesmith.cli.curve import curve

    name, values = course.curve
    if len(values) > 1:
        tell(f"{name}\n" + curve(values))
    if job.is_successful:
        tell(f"{job.job_id} completed: {job.output_dir or ''}")
        suggest(f"tunesmith chat {job.fine_tuned_model or job.output_dir}")
        return
    tell(f"{job.job_id} {job.status}" + (f": {job.error}" if job.error else ""))
    if course.hint:
        tell(f"hint: {course.hint}")
    suggest(f"tunesmith logs {job.job_id}")


def _with_progress(client: "TuningClient", job: "Job") -> "Job":
    """The list leaves progress out; a running job is asked for it."""
    return client.jobs.get(job.job_id) if job.status == "running" else job


def _row(job: "Job") -> list[Any]:
    share = 1.0 if job.is_successful else job.progress
    done = "" if share is None else f"{share:.0%}"
    model = job.config.get("model_name", job.config.get("model", ""))
    took = duration_text(job.duration) if job.duration is not None else ""
    return [job.job_id, job.training_type, job.status, done, model, _age(job.created_at), took]


def _facts(job: "Job") -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = [
        ("id", job.job_id),
        ("type", job.training_type),
        ("status", job.status),
        ("done", "" if job.progress is None else f"{job.progress:.0%}"),
        ("created", job.created_at),
        ("started", job.started_at),
        ("completed", job.completed_at),
        ("ETA", None if job.eta_seconds is None else duration_text(job.eta_seconds)),
        ("output", job.output_dir),
        ("served as", job.fine_tuned_model),
        ("log", job.log_file),
        ("error", job.error),
    ]
    facts += [(f"  {name}", value) for name, value in (job.metrics or {}).items()]
    facts += [(f"  {name}", value) for name, value in job.config.items() if value is not None]
    return [(name, value) for name, value in facts if value not in {None, ""}]


def _age(created: datetime | None) -> str:
    if created is None:
        return ""
    moment = created if created.tzinfo else created.replace(tzinfo=UTC)
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"
