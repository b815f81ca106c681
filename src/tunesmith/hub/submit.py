"""From what was asked for to a committed row: resolved, checked, pinned; then the bell."""

import asyncio
import hashlib
import json
import shutil
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

from tunesmith.errors import BadRequestError, NoSpaceError, ValidationError
from tunesmith.hub import checks, data, needs, output
from tunesmith.hub.asked import Request
from tunesmith.hub.names import FoundModel, find_base, find_data
from tunesmith.hub.principal import Principal
from tunesmith.manifest import BrokenManifest, verify
from tunesmith.spec.records import Job, Needs, NewJob, Source
from tunesmith.spec.train import TrainSpec
from tunesmith.store import claims, idempotency, jobs
from tunesmith.store.files import confine

if TYPE_CHECKING:
    from tunesmith.hub import Hub


async def submit(hub: "Hub", asked: Request, who: Principal) -> Job:
    """Write the job. Raises NotFoundError, BadRequestError, ConflictError, ValidationError,
    RateLimitError, NoSpaceError: whatever is wrong is said now, and nothing is left behind."""
    replayed = _replay(hub, asked, who)
    if replayed is not None:
        return replayed
    new = await asyncio.to_thread(_prepare, hub, asked, who)

    def work(tx: Connection) -> Job:
        again = _find(tx, asked, who)
        if again is not None:
            return jobs.get(tx, again)
        job = jobs.submit(
            tx,
            new,
            max_unfinished=hub.settings.max_queued_jobs,
            outputs_root=hub.workspace / "outputs",
        )
        if asked.idempotency_key:
            answer = idempotency.Stored(status=200, response={"job_id": job.id})
            idempotency.keep(
                tx, who.owner, asked.route, asked.idempotency_key, _digest(asked), answer
            )
        return job

    job = await hub.write(work)
    if not job.is_validated:
        hub.checks.ring()
    return job


def _prepare(hub: "Hub", asked: Request, who: Principal) -> NewJob:
    spec = asked.spec
    model = find_base(hub.store, hub.settings, spec.model, who, asked.name("model"))
    _refuse_model(model, asked)
    training = _pinned(hub, asked, who, "dataset", spec.dataset)
    evaluation = None
    if spec.eval_dataset is not None:
        evaluation = _pinned(hub, asked, who, "eval_dataset", spec.eval_dataset)
    output_dir = None if asked.output_dir is None else output.find(hub, asked, model.folder)
    _refuse_full_disk(hub, spec, model)
    wanted = needs.of(spec, model.folder, _has_gpu(hub, spec))
    _refuse_unfit(hub, wanted)
    parts = [training] if evaluation is None else [training, evaluation]
    verdicts = [checks.kept(hub, spec, model, part) for part in parts if model.is_here]
    for verdict in verdicts:
        if verdict is not None and verdict.failure:
            raise ValidationError(verdict.failure, param=asked.name("dataset"))
    return NewJob(
        owner=who.owner,
        spec=spec,
        model=Source(name=spec.model, path=str(model.folder.path)),
        dataset=training.source,
        eval_dataset=evaluation.source if evaluation else None,
        output_dir=output_dir,
        needs=wanted,
        priority=asked.priority,
        is_validated=model.is_here and all(verdict is not None for verdict in verdicts),
        request=asked.request,
        label=asked.label,
        resume_from=_checkpoint(hub, asked),
    )


def _pinned(hub: "Hub", asked: Request, who: Principal, part: str, name: str) -> data.Pinned:
    found = find_data(hub.store, hub.settings, name, who, asked.name(part))
    return data.pin(hub, found, asked.name(part))


def _refuse_model(model: FoundModel, asked: Request) -> None:
    name = asked.name("model")
    if not model.folder.has_tokenizer:
        raise BadRequestError(
            f"{name}: {model.name!r} has no tokenizer.json; save the model's tokenizer beside its "
            "weights",
            param=name,
        )
    is_from_scratch = getattr(asked.spec, "from_scratch", False)
    if not model.folder.has_weights and not is_from_scratch:
        raise BadRequestError(f"{name}: {model.name!r} has no safetensors weights", param=name)


def _checkpoint(hub: "Hub", asked: Request) -> str | None:
    if asked.resume_from is None:
        return None
    path = confine(asked.resume_from, hub.workspace, hub.settings.allowed_roots, "resume_from")
    try:
        kind = verify(path).kind
    except BrokenManifest as broken:
        raise BadRequestError(f"resume_from: {broken}", param="resume_from") from None
    if kind != "checkpoint":
        raise BadRequestError(
            f"resume_from: {asked.resume_from!r} is a finished model, not a checkpoint; give it as "
            f"{asked.name('model')}",
            param="resume_from",
        )
    return str(path)


def _refuse_full_disk(hub: "Hub", spec: TrainSpec, model: FoundModel) -> None:
    wanted = needs.disk_bytes(spec, model.folder)
    free = shutil.disk_usage(hub.settings.home).free
    if free < wanted:
        raise NoSpaceError(
            f"the job's checkpoints and model want about {_gb(wanted)}, the workspace's disk has "
            f"{_gb(free)} left; free some and submit again"
        )


def _refuse_unfit(hub: "Hub", wanted: Needs) -> None:
    if hub.store.read(lambda tx: claims.unfit(tx, wanted)):
        raise BadRequestError(
            f"no worker here can ever run this: it wants {wanted.gpus} GPUs and about "
            f"{_gb(wanted.memory_bytes)} of memory; choose a smaller model or a shorter max_length"
        )


def _has_gpu(hub: "Hub", spec: TrainSpec) -> bool:
    """A GPU is asked for where a worker has one, and where the request cannot do without."""
    if spec.run.quantization is not None:
        return True
    known = hub.store.read(claims.known_workers)
    return any(capacity.max_gpus for capacity in known.values())


def _replay(hub: "Hub", asked: Request, who: Principal) -> Job | None:
    """The job that this very request made before. Raises ValidationError for a reused key."""
    if asked.idempotency_key is None:
        return None
    job_id = hub.store.read(lambda tx: _find(tx, asked, who))
    return None if job_id is None else hub.store.read(lambda tx: jobs.get(tx, job_id))


def _find(tx: Connection, asked: Request, who: Principal) -> str | None:
    if not asked.idempotency_key:
        return None
    kept = idempotency.find(tx, who.owner, asked.route, asked.idempotency_key, _digest(asked))
    return None if kept is None else str(kept.response["job_id"])


def _digest(asked: Request) -> str:
    body = json.dumps(asked.request, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
