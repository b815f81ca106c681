"""From what was asked for to a committed row: resolved, checked, pinned; then the bell."""

import asyncio
import contextlib
import hashlib
from collections.abc import Collection
from typing import TYPE_CHECKING

import msgspec
from sqlalchemy.engine import Connection

from tunesmith.data import alike
from tunesmith.data.reading import Reading
from tunesmith.data.suited import READ, refuse_unpaired, refuse_unsuited
from tunesmith.data.twins import Twins
from tunesmith.data.verify import check_rules
from tunesmith.errors import (
    BadRequestError,
    NoSpaceError,
    PayloadTooLargeError,
    TuningAPIError,
    ValidationError,
)
from tunesmith.hub import checks, needs, output, tokenizers
from tunesmith.hub.asked import Request
from tunesmith.hub.data import Pinned, refuse_unanswered
from tunesmith.hub.estimate import foretell
from tunesmith.hub.intake import Key, Submission
from tunesmith.hub.known import Look, Lookup, Unknown
from tunesmith.hub.names import FoundModel
from tunesmith.hub.principal import Principal
from tunesmith.manifest import BrokenManifest, verify
from tunesmith.spec.estimate import Estimate
from tunesmith.spec.hands import Capacity
from tunesmith.spec.records import Job, Needs, NewJob, Source
from tunesmith.spec.rewards import services_in
from tunesmith.spec.train import (
    Pretrain,
    Reinforcing,
    TrainSpec,
    reward_models,
    reward_training,
    rewards_of,
)
from tunesmith.store import idempotency, jobs, reservations
from tunesmith.store.files import confine

if TYPE_CHECKING:
    from tunesmith.hub import Hub

MAX_ASKED_BYTES = 256 << 10
"""Of a configuration, as JSON, with its defaults."""


async def submit(hub: "Hub", asked: Request, who: Principal) -> Job:
    """Write the job. Raises NotFoundError, BadRequestError, ConflictError, ValidationError,
    RateLimitError, NoSpaceError: whatever is wrong is said now, and nothing is left behind.

    Where the same request made a job before, that is the answer, whatever would be wrong today.
    """
    try:
        return await _submit(hub, asked, who)
    except TuningAPIError:
        replayed = await asyncio.to_thread(_replay, hub, asked, who)
        if replayed is None:
            raise
        return replayed


async def estimate(hub: "Hub", asked: Request, who: Principal) -> Estimate:
    """What the job would take. Raises as `submit` does, but for what only a submission needs."""
    return await asyncio.to_thread(_estimate, hub, asked, who)


def _estimate(hub: "Hub", asked: Request, who: Principal) -> Estimate:
    spec, look = asked.spec, Lookup(hub)
    model = look.base(spec.model, who, asked.name("model"))
    _refuse_model(model, asked)
    if not model.is_here:
        name = asked.name("model")
        raise BadRequestError(
            f"{name}: {model.name!r} is not here yet; the first job that wants it downloads it",
            param=name,
        )
    tokenizer = _tokenizer(look, model, asked)
    rewarding = _rewarding(look, asked, who)
    part = look.pinned(spec.dataset, who, asked.name("dataset"), Reading.of(spec))
    _refuse_unsuited(part, asked, "dataset")
    is_gpu = _has_gpu(look.workers())
    looked = checks.measured(hub, spec, model.folder, part, tokenizer)
    folders = [one.folder for one in rewarding]
    return foretell(spec, model.folder, looked, look.history(), is_gpu, folders)


async def _submit(hub: "Hub", asked: Request, who: Principal) -> Job:
    _refuse_long(asked)
    for url in services_in(rewards_of(asked.spec)):
        await hub.webhooks.check(url, asked.name("rewards"))
    new = await _new(hub, asked, who)
    key = None
    if asked.idempotency_key:
        idempotency.check(asked.idempotency_key)
        key = Key(who.owner, asked.route, asked.idempotency_key, _digest(asked))
    job = await hub.intake.take(Submission(new, key))
    if not job.is_validated:
        hub.checks.ring()
    return job


async def _new(hub: "Hub", asked: Request, who: Principal) -> NewJob:
    """At once where all of it is known; else in a thread."""
    if asked.resume_from is None and asked.output_dir is None:
        with contextlib.suppress(Unknown):
            return _prepare(hub, asked, who, hub.known)
    return await asyncio.to_thread(_prepare, hub, asked, who, Lookup(hub))


def _prepare(hub: "Hub", asked: Request, who: Principal, look: Look) -> NewJob:
    spec, free_bytes = asked.spec, look.free_bytes()
    model = look.base(spec.model, who, asked.name("model"))
    _refuse_model(model, asked)
    rewarding = _rewarding(look, asked, who)
    folders = [one.folder for one in rewarding]
    tokenizer = _tokenizer(look, model, asked)
    reading = Reading.of(spec)
    training = look.pinned(spec.dataset, who, asked.name("dataset"), reading)
    _refuse_unsuited(training, asked, "dataset")
    _refuse_single(training, asked)
    evaluation = None
    if spec.eval_dataset is not None:
        evaluation = look.pinned(spec.eval_dataset, who, asked.name("eval_dataset"), reading)
        _refuse_unsuited(evaluation, asked, "eval_dataset")
    overlap = _overlap(look, training, evaluation, asked)
    output_dir = None if asked.output_dir is None else output.find(hub, asked, model.folder)
    _refuse_full_disk(spec, model, free_bytes)
    workers = look.workers()
    wanted = needs.of(spec, model.folder, _has_gpu(workers), folders)
    _refuse_unfit(wanted, workers)
    parts = [training] if evaluation is None else [training, evaluation]
    asking = [spec, _unsampled(spec)]
    verdicts = [
        look.verdict(one, model, part, tokenizer)
        for one, part in zip(asking, parts, strict=False)
        if model.is_here
    ]
    first = reward_training(spec)
    if first is not None and model.is_here:
        verdicts += [look.verdict(first, model, part, tokenizer) for part in parts]
    for verdict in verdicts:
        if verdict is not None and verdict.failure:
            raise ValidationError(verdict.failure, param=asked.name("dataset"))
    looked = verdicts[0].measure if verdicts and verdicts[0] is not None else None
    return NewJob(
        owner=who.owner,
        spec=spec,
        model=Source(name=spec.model, path=str(model.folder.path)),
        dataset=training.source,
        eval_dataset=evaluation.source if evaluation else None,
        reward_models=tuple(Source(name=one.name, path=str(one.folder.path)) for one in rewarding),
        tokenizer=tokenizer,
        output_dir=output_dir,
        needs=wanted,
        priority=asked.priority,
        is_validated=model.is_here and None not in (*verdicts, overlap),
        request=asked.request,
        label=asked.label,
        warnings=alike.warnings(training.duplicates, overlap or Twins()),
        resume_from=_checkpoint(hub, asked),
        estimate=(
            None
            if looked is None
            else foretell(spec, model.folder, looked, look.history(), bool(wanted.gpus), folders)
        ),
    )


def _refuse_long(asked: Request) -> None:
    """It is kept with the job, and read whenever that is looked at."""
    size = len(msgspec.json.encode(asked.request))
    if size > MAX_ASKED_BYTES:
        raise PayloadTooLargeError(
            f"the configuration comes to {size:,} bytes with its defaults, and {MAX_ASKED_BYTES:,} "
            "is the limit; shorten what is long in it: code, schemas, lists of values"
        )


def _refuse_model(model: FoundModel, asked: Request) -> None:
    name = asked.name("model")
    if not model.folder.has_tokenizer and tokenizers.of(asked.spec) is None:
        raise BadRequestError(
            f"{name}: {model.name!r} has no tokenizer.json; save the model's tokenizer beside its "
            "weights",
            param=name,
        )
    is_from_scratch = isinstance(asked.spec, Pretrain) and asked.spec.from_scratch
    context = model.folder.context_length
    if isinstance(asked.spec, Reinforcing) and context:
        longest, field = asked.spec.max_completion_length, asked.name("max_completion_length")
        if longest >= context:
            raise BadRequestError(
                f"{field}: {longest:,} leaves no room for a prompt: the context of {model.name!r}, "
                f"{context:,} tokens, holds both; lower it",
                param=field,
            )
    if not model.folder.has_weights and not is_from_scratch:
        raise BadRequestError(f"{name}: {model.name!r} has no safetensors weights", param=name)


def _rewarding(look: Look, asked: Request, who: Principal) -> list[FoundModel]:
    """The models that rewards come from.

    Raises NotFoundError, BadRequestError; ValidationError where a rule is none.
    """
    field = asked.name("rewards")
    try:
        check_rules(rewards_of(asked.spec))
    except ValidationError as error:
        raise ValidationError(f"{field}: {error.message}", param=field) from None
    found = [look.base(name, who, field) for name in reward_models(asked.spec)]
    for one in found:
        if not one.is_here:
            raise BadRequestError(
                f"{field}: the reward model {one.name!r} is not here; download it, then "
                "tunesmith models add NAME PATH",
                param=field,
            )
        if not one.folder.is_scoring:
            raise BadRequestError(
                f"{field}: {one.name!r} is no reward model: it gives tokens and no score; train "
                "one with method: reward (task_type: rl, algorithm: reward)",
                param=field,
            )
        if not (one.folder.has_tokenizer and one.folder.has_weights):
            raise BadRequestError(
                f"{field}: {one.name!r} lacks its tokenizer.json, or safetensors weights",
                param=field,
            )
    return found


def _tokenizer(look: Look, model: FoundModel, asked: Request) -> Source | None:
    """That the training brings along. Raises ValidationError where the model is too small for it;
    of one that is not here yet the trainer tells."""
    name = tokenizers.of(asked.spec)
    if name is None:
        return None
    field = asked.name("tokenizer")
    pinned = look.tokenizer(name, field)
    if model.is_here:
        tokenizers.refuse_larger(pinned, asked.spec, model.folder, field)
    return pinned


def _unsampled(spec: TrainSpec) -> TrainSpec:
    """As rows are read that are only evaluated."""
    return spec.model_copy(update={"sampling": None}) if isinstance(spec, Pretrain) else spec


def _refuse_unsuited(part: Pinned, asked: Request, field: str) -> None:
    """Rows of a format that the method does not read."""
    name = asked.name(field)
    if part.format == "prompts" and "openai" in READ[asked.spec.method]:
        refuse_unanswered(part, name, Reading.of(asked.spec))
    told = f"{name}: {part.source.name!r}"
    refuse_unsuited(asked.spec.method, part.format, told, name)
    if reward_training(asked.spec) is not None:
        refuse_unpaired(part.format, told, name)


def _overlap(
    look: Look, training: Pinned, evaluation: Pinned | None, asked: Request
) -> Twins | None:
    """What the validation set shares with the training set; None where the check has yet to tell.

    Raises ValidationError where such rows, or rows that say the same, are to be refused.
    """
    spec = asked.spec
    if spec.duplicates == "refuse":
        alike.refuse("duplicates", training.duplicates, asked.name("dataset"))
        if evaluation is not None:
            alike.refuse("duplicates", evaluation.duplicates, asked.name("eval_dataset"))
    if evaluation is None:
        return Twins()
    found = look.overlap(training, evaluation, Reading.of(spec))
    if found is not None and spec.overlap == "refuse":
        alike.refuse("overlap", found, asked.name("eval_dataset"))
    return found


def _refuse_single(part: Pinned, asked: Request) -> None:
    if asked.spec.holdout and part.num_samples < 2:
        name = asked.name("dataset")
        raise ValidationError(
            f"{name}: {part.source.name!r} has one row, of which none can be held out; give more "
            "rows, or leave holdout out",
            param=name,
        )


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


def _refuse_full_disk(spec: TrainSpec, model: FoundModel, free: int) -> None:
    wanted = needs.disk_bytes(spec, model.folder)
    if free < wanted:
        raise NoSpaceError(
            f"the job's checkpoints and model want about {_gb(wanted)}, the workspace's disk has "
            f"{_gb(free)} left; free some and submit again"
        )


def _refuse_unfit(wanted: Needs, workers: Collection[Capacity]) -> None:
    if workers and not any(reservations.fits_at_most(wanted, one) for one in workers):
        raise BadRequestError(
            f"no worker here can ever run this: it wants {wanted.gpus} GPUs and about "
            f"{_gb(wanted.memory_bytes)} of memory; choose a smaller model or a shorter max_length"
        )


def _has_gpu(workers: Collection[Capacity]) -> bool:
    """A GPU is asked for where a worker has one; every request can do without."""
    return any(one.max_gpus for one in workers)


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
    return hashlib.sha256(msgspec.json.encode(asked.request, order="sorted")).hexdigest()


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
