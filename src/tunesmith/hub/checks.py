"""Token-level checks: once per data set, tokenizer and length, before a job is claimed."""

import asyncio
import hashlib
import logging
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data import alike
from tunesmith.data.asked import STAND_IN_TOKENS, AskedRows
from tunesmith.data.check import Verdict, check_tokens
from tunesmith.data.fit import Cut
from tunesmith.data.measure import measure
from tunesmith.data.reading import Reading
from tunesmith.data.render import TrainOn
from tunesmith.data.rows import RowIndex, Rows
from tunesmith.data.sampling import sampled
from tunesmith.data.twins import Twins
from tunesmith.errors import FailureClass, TuningAPIError
from tunesmith.hub import overlaps, tokenizers
from tunesmith.hub.data import Pinned
from tunesmith.hub.downloads import Downloads
from tunesmith.hub.estimate import foretell
from tunesmith.hub.folder import ModelFolder, read
from tunesmith.spec.estimate import Measure
from tunesmith.spec.records import Job, Source
from tunesmith.spec.train import Pretrain, Reinforcing, Sft, TrainSpec, Tuning, reward_training
from tunesmith.store import catalog, jobs
from tunesmith.store.tables import UNCHECKED

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 5.0
DUTY = "checks"
AT_ONCE = 4
"""Jobs checked before it is asked again whose duty that is."""
_TOLD = {
    *("rows", "overlong", "overlong_count", "overlong_lines", "masked_count", "masked_lines"),
    *("cut_off_count", "cut_off_lines", "notices"),
}
UNASKED = Verdict(rows=0, renderer="0" * 64, max_length=0, overlong="drop", train_on="all")
"""Stands for a data set to pretrain on: every token of it is learnt."""


class Checks:
    """A task of the server's: takes jobs that wait for their check, one after the other."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._bell = asyncio.Event()
        self.downloads = Downloads(hub, self.ring)

    def ring(self) -> None:
        self._bell.set()

    async def run(self) -> None:
        """For ever, one server for all: those that a stopped one left unchecked come first."""
        with self._hub.watcher.watch(UNCHECKED) as touched:
            self._bell = touched
            try:
                while True:
                    touched.clear()
                    try:
                        await self._turn()
                    except Exception:  # the database was away, for one
                        log.exception("a turn of the checks failed")
                    await self._hub.wait(touched, LOOK_AGAIN_SECONDS)
            finally:
                await self.downloads.close()

    async def _turn(self) -> None:
        while await self._hub.duty(DUTY):
            unchecked = [job for job in self._unchecked() if not self.downloads.take(job)]
            if not unchecked:
                return
            for job in unchecked[:AT_ONCE]:
                await self._check(job)

    def _unchecked(self) -> list[Job]:
        """But for those whose model is on its way."""
        aside = self.downloads.waiting
        return self._hub.store.read(lambda tx: jobs.to_validate(tx, but=aside))

    async def _check(self, job: Job) -> None:
        try:
            verdicts = await asyncio.to_thread(_verdicts, self._hub, job)
            shared = await asyncio.to_thread(_shared, self._hub, job)
            failure = next((found.failure for found in verdicts if found.failure), None)
            failure = failure or _overlap_failure(job.spec, shared)
            detail = self._detail(job, verdicts[0]) if verdicts else {}
            detail |= {"warnings": alike.warnings(Twins(), shared)} if shared.count else {}
        except (TuningAPIError, OSError) as error:
            failure, detail = str(error), {}
        except Exception as error:  # a check that breaks must not stop the others
            log.exception("job %s: its check broke", job.id)
            failure, detail = f"the data could not be checked: {type(error).__name__}", {}
        if failure is None:
            await self._hub.write(lambda tx: jobs.mark_validated(tx, job.id, detail))
        else:
            kind = FailureClass.DATA_ERROR
            await self._hub.write(lambda tx: jobs.fail_queued(tx, job.id, kind, failure or ""))

    def _detail(self, job: Job, verdict: Verdict) -> dict[str, Any]:
        """For its event: what will be left out, and where, and what it will take."""
        detail = verdict.model_dump(mode="json", include=_TOLD)
        if verdict.measure is None:
            return detail
        history, is_gpu = self._hub.history.recent(), bool(job.needs.gpus)
        rewarding = [read(Path(one.path)) for one in job.reward_models]
        folder = read(Path(job.model.path))
        told = foretell(job.spec, folder, verdict.measure, history, is_gpu, rewarding)
        return {**detail, "estimate": told.model_dump(mode="json")}


def kept(hub: "Hub", spec: Tuning, folder: ModelFolder, sha256: str, digest: str) -> Verdict | None:
    """The verdict of an earlier check of the same content, under the renderer of that digest."""
    return _kept(hub, key(sha256, digest, spec, folder))


def _verdicts(hub: "Hub", job: Job) -> list[Verdict]:
    if not isinstance(job.spec, Tuning):
        return []
    sources = [job.dataset] if job.eval_dataset is None else [job.dataset, job.eval_dataset]
    folder, reading = read(Path(job.model.path)), Reading.of(job.spec)
    found = []
    for spec, source in product(trainings(job.spec), sources):
        assert isinstance(spec, Tuning)
        index = RowIndex.open(Path(source.path), reading)
        renderer = hub.renderer(folder, index.format)
        place = key(source.sha256 or "", renderer.digest, spec, folder)
        verdict = _kept(hub, place) or check_tokens(
            looked_at(spec, index),
            renderer,
            max_length(spec, folder),
            spec.overlong,
            _train_on(spec),
        )
        body = verdict.model_dump(mode="json")
        hub.store.write(partial(catalog.keep_verdict, key=place, verdict=body)).result()
        found.append(verdict)
    return found


def trainings(spec: TrainSpec) -> list[TrainSpec]:
    """What rows are looked at for: the job itself, and a reward model that it trains first."""
    first = reward_training(spec)
    return [spec] if first is None else [spec, first]


def _shared(hub: "Hub", job: Job) -> Twins:
    if job.eval_dataset is None:
        return Twins()
    return overlaps.find(hub, job.dataset, job.eval_dataset, Reading.of(job.spec))


def _overlap_failure(spec: TrainSpec, shared: Twins) -> str | None:
    if spec.overlap == "warn" or not shared.count:
        return None
    return alike.refusal("overlap", shared)


def measured(
    hub: "Hub",
    spec: TrainSpec,
    folder: ModelFolder,
    part: Pinned,
    tokenizer: Source | None = None,
) -> Measure:
    """How long the rows are. Kept, since a large file takes a while to open."""
    reading = Reading.of(spec)
    own = None if tokenizer is None else tokenizers.renderer(tokenizer)
    renderer = own or hub.renderer(folder, part.format)
    sha256 = part.source.sha256
    place = f"documents:{sha256}:{renderer.digest}{reading.key}{_sampling_key(spec)}"
    if isinstance(spec, Tuning):
        place = f"measure:{key(sha256 or '', renderer.digest, spec, folder)}"
    body = hub.store.read(lambda tx: catalog.find_verdict(tx, place))
    if body is not None:
        return Measure.model_validate(body)
    with RowIndex.open(Path(part.source.path), reading) as index:
        found = measure(looked_at(spec, index), renderer, cut_of(spec, folder))
    told = found.model_dump(mode="json")
    hub.store.write(lambda tx: catalog.keep_verdict(tx, place, told)).result()
    return found


def cut_of(spec: TrainSpec, folder: ModelFolder) -> Cut | None:
    """How rows are cut; None where documents are packed."""
    if not isinstance(spec, Tuning):
        return None
    return Cut(max_length(spec, folder), spec.overlong, _train_on(spec))


def max_length(spec: Tuning, folder: ModelFolder) -> int:
    """Tokens: what was asked for, or the model's context where it is shorter. Of prompts, what
    completions leave of that."""
    longest = min(spec.max_length, folder.context_length or spec.max_length)
    if not isinstance(spec, Reinforcing):
        return longest
    return max(1, longest - spec.max_completion_length) + STAND_IN_TOKENS


def looked_at(spec: TrainSpec, index: RowIndex) -> Rows:
    """The rows as the first epoch reads them. Raises ValidationError, see `sampling.choose`."""
    if isinstance(spec, Pretrain):
        return sampled(index, spec.sampling, spec.optim.seed)
    return AskedRows(index) if isinstance(spec, Reinforcing) else index


def _sampling_key(spec: TrainSpec) -> str:
    if not isinstance(spec, Pretrain) or spec.sampling is None:
        return ""
    told = f"{spec.optim.seed}:{spec.sampling.model_dump_json()}"
    return ":" + hashlib.sha256(told.encode()).hexdigest()[:32]


def _kept(hub: "Hub", key: str) -> Verdict | None:
    body = hub.store.read(lambda tx: catalog.find_verdict(tx, key))
    return None if body is None else Verdict.model_validate(body)


def key(sha256: str, digest: str, spec: Tuning, folder: ModelFolder) -> str:
    """The name of a check: of a data set's content, a renderer, and what was asked for."""
    length = max_length(spec, folder)
    learnt = "prompts" if isinstance(spec, Reinforcing) else _train_on(spec)
    kind = f"{length}:{spec.overlong}:{learnt}"
    return f"tokens:{sha256}:{digest}:{kind}{Reading.by(spec.columns).key}"


def _train_on(spec: Tuning) -> TrainOn:
    return spec.train_on if isinstance(spec, Sft) else "completions"
