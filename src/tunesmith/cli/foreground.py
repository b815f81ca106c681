"""Training in the foreground: the trainer as a child, its events as a progress bar.

Beside the model's folder lies `.<name>.train/`: the task, and one folder for each try with its
checkpoints. It goes once the model is in place; the log `<name>.log` stays.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from pydantic import TypeAdapter, ValidationError

from tunesmith import manifest
from tunesmith.cli.curve import curve
from tunesmith.cli.near import listed, names_in, near_name
from tunesmith.cli.progress import Progress
from tunesmith.cli.specfile import read_configuration
from tunesmith.cli.sweeps import tell_table
from tunesmith.cli.terminal import (
    FAILED,
    INTERRUPTED,
    JOB_FAILED,
    NOT_FOUND,
    OK,
    CommandError,
    suggest,
    tell,
)
from tunesmith.data.alike import overlap, refuse
from tunesmith.data.reading import Reading
from tunesmith.data.rows import check_file
from tunesmith.spec.pipe import (
    Failed,
    Finished,
    Inputs,
    Plan,
    Replanned,
    Started,
    Stopped,
    TrainerEvent,
    TrainerTask,
)
from tunesmith.spec.train import AnySpec, Pretrain, reward_models

_EVENT: TypeAdapter[TrainerEvent] = TypeAdapter(TrainerEvent)
_LOG_TAIL_BYTES = 4000
EVERYWHERE = ("0.0.0.0/0", "::/0")
"""Who trains here may ask whom he likes, but for addresses that are closed to all."""
_TOKENIZER = "packed.tokenizer"


@dataclass(frozen=True)
class Foreground:
    """One training: what is asked, with inputs that exist, and where its files are."""

    spec: AnySpec
    inputs: Inputs
    out: Path
    is_fresh: bool = False
    name: str = ""
    """What people may call it."""

    @classmethod
    def prepare(cls, path: Path, out: Path | None = None, is_fresh: bool = False) -> "Foreground":
        """What a configuration's file asks for; results go to `out`, else where the file says,
        else to outputs/<the file's name>.

        Raises NotFoundError, ValidationError, CommandError; makes nothing.
        """
        asked = read_configuration(path)
        spec, name = asked.spec, asked.name
        inputs = Inputs(
            model=_found(name("model"), spec.model),
            dataset=_found(name("dataset"), spec.dataset),
            eval_dataset=spec.eval_dataset and _found(name("eval_dataset"), spec.eval_dataset),
            reward_models={one: _found(name("rewards"), one) for one in reward_models(spec)},
            networks=EVERYWHERE,
            tokenizer=_tokenizer(spec, name("tokenizer")),
        )
        target = out or Path(asked.output_dir or f"outputs/{path.stem}")
        full = target.expanduser().absolute()
        _check_free(full / asked.folder)
        _refuse_twins(spec, inputs, name)
        return cls(spec, inputs, full / asked.folder, is_fresh, name=full.name)

    @property
    def work(self) -> Path:
        return self.out.parent / f".{self.out.name}.train"

    def packed(self, folder: Path) -> Inputs:
        """As a trainer takes them. A tokenizer that is brought along is packed into the folder; one
        that lies there already stays. Raises ValidationError."""
        if self.inputs.tokenizer is None:
            return self.inputs
        place = folder / _TOKENIZER
        if not place.exists():
            from tunesmith.data.brought import pack

            source = Path(self.inputs.tokenizer)
            manifest.write_durably(place, pack(source, source.name, follows_links=True))
        return self.inputs.model_copy(update={"tokenizer": str(place)})

    @property
    def log(self) -> Path:
        return self.out.parent / f"{self.out.name}.log"

    def run(self, as_json: bool = False) -> int:
        """Train to the end, or until interrupted; returns the exit code."""
        if find_spec("torch") is None:
            raise CommandError("torch is not installed", "pip install 'tunesmith[train]'")
        self.work.mkdir(parents=True, exist_ok=True)
        with _only_one(self.work):
            self._take_up()
            done = self._unplaced()
            if done is not None:
                return self._place(done)
            return self._train(as_json)

    def _train(self, as_json: bool) -> int:
        task = self._task()
        with self.log.open("a", encoding="utf-8") as log, Trainer(task, log) as trainer:
            with Progress(self.name, is_live=False if as_json else None) as progress:
                for event in trainer.events():
                    self._keep_plan(event)
                    if as_json:
                        print(event.model_dump_json(), flush=True)
                    else:
                        progress.take(event.model_dump())
            code = trainer.wait()
        if len(progress.course.losses) > 1:
            name, values = progress.course.curve
            tell(f"{name}\n" + curve(values))
        return self._conclude(trainer, code)

    def _conclude(self, trainer: "Trainer", code: int) -> int:
        last = trainer.last
        if isinstance(last, Finished):
            return self._place(Path(last.artifact), last.manifest_sha256)
        if isinstance(last, Failed):
            tell(f"error: {last.message}")
            tell(f"hint: {last.hint or last.failure_class.hint}")
            return JOB_FAILED
        if trainer.interrupts:
            how = f"stopped at step {last.step}" if isinstance(last, Stopped) else "killed"
            tell(f"{how}; the same command goes on from the newest checkpoint")
            return INTERRUPTED
        tell(f"error: the trainer ended early ({_ending(code)}); the end of {self.log}:")
        tell(_tail(self.log))
        tell("hint: the same command goes on from the newest checkpoint")
        return JOB_FAILED

    def _take_up(self) -> None:
        """Keep the tries of this very training; refuse those of another. Raises CommandError."""
        note, identity = self.work / "task.json", self._identity()
        if self.is_fresh:
            shutil.rmtree(self.work / "attempts", ignore_errors=True)
            (self.work / _TOKENIZER).unlink(missing_ok=True)
            (self.work / "plan.json").unlink(missing_ok=True)
        elif note.exists() and _json(note) != identity and listed(self.work / "attempts"):
            raise CommandError(
                f"{self.name} was begun with another spec, model or data set",
                "--fresh starts anew; --out DIR leaves the other one alone",
            )
        manifest.write_durably(note, json.dumps(identity, sort_keys=True).encode())

    def _identity(self) -> dict[str, Any]:
        """What may not change between two tries of one training."""
        data = Path(self.inputs.dataset).stat()
        return {
            "spec": self.spec.model_dump(mode="json"),
            "inputs": self.inputs.model_dump(mode="json"),
            "dataset": [data.st_size, data.st_mtime_ns],
        }

    def _attempts(self) -> list[tuple[int, Path]]:
        found = listed(self.work / "attempts")
        return sorted((int(path.name), path) for path in found if path.name.isdigit())

    def _unplaced(self) -> Path | None:
        """A finished model that an interruption kept from its place."""
        for _, attempt in reversed(self._attempts()):
            if manifest.is_sealed(attempt / "artifact"):
                return attempt / "artifact"
        return None

    def _task(self) -> TrainerTask:
        attempts = self._attempts()
        fence = attempts[-1][0] + 1 if attempts else 1
        resume_from = self._newest_checkpoint()
        folder = self.work / "attempts" / str(fence)
        folder.mkdir(parents=True)
        for _, attempt in attempts:
            if resume_from is None or attempt not in resume_from.parents:
                shutil.rmtree(attempt, ignore_errors=True)
        return TrainerTask(
            job_id=hashlib.sha256(os.fsencode(self.out)).hexdigest()[:8],
            fence=fence,
            spec=self.spec,
            inputs=self.packed(self.work),
            attempt_dir=str(folder),
            resume_from=None if resume_from is None else str(resume_from),
            plan=self._kept_plan(),
        )

    def _newest_checkpoint(self) -> Path | None:
        found = [
            (int(path.name.removeprefix("step-")), fence, path)
            for fence, attempt in self._attempts()
            for path in listed(attempt / "checkpoints")
            if path.name.removeprefix("step-").isdigit()
        ]
        for step, _, path in sorted(found, reverse=True):
            try:
                manifest.verify(path)
            except manifest.BrokenManifest as error:
                tell(f"warning: the checkpoint of step {step} is left out: {error}")
                continue
            tell(f"going on from step {step}")
            return path
        return None

    def _keep_plan(self, event: TrainerEvent) -> None:
        if isinstance(event, Started | Replanned):
            body = event.plan.model_dump_json().encode()
            manifest.write_durably(self.work / "plan.json", body)

    def _kept_plan(self) -> Plan | None:
        try:
            return Plan.model_validate_json((self.work / "plan.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def _place(self, artifact: Path, digest: str | None = None) -> int:
        """Put the finished model in its place, an older one of ours away. Returns the exit code."""
        try:
            manifest.verify(artifact, digest)
        except manifest.BrokenManifest as error:
            tell(f"error: the finished model is damaged: {error}")
            return FAILED
        _check_free(self.out)
        replaced = self.work / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if self.out.exists():
            os.rename(self.out, replaced)
        os.rename(artifact, self.out)
        manifest.fsync_folder(self.out.parent)
        shutil.rmtree(self.work, ignore_errors=True)
        tell(f"the model is in {self.out}")
        tell_table(self.out)
        suggest(f"tunesmith models add {self.name} {self.out} && tunesmith up")
        return OK


@dataclass
class Trainer:
    """A trainer's process: its task goes in, its events come out, its log is a file."""

    task: TrainerTask
    log: TextIO
    last: TrainerEvent | None = None
    """Finished, Failed or Stopped, once it was said."""
    interrupts: int = 0
    _child: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)
    _before: dict[int, Any] = field(default_factory=dict, repr=False)

    def __enter__(self) -> "Trainer":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._interrupt)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.train"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )
        if self.interrupts:
            self._kill()
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()
        assert self._child is not None
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def events(self) -> Iterator[TrainerEvent]:
        """Each event as it comes; lines that are none go to the log."""
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(self.task.model_dump_json().encode())
            self._child.stdin.close()
        except BrokenPipeError:
            pass
        for line in self._child.stdout:
            try:
                event = _EVENT.validate_json(line)
            except ValidationError:
                self.log.write(f"not an event: {line[:500]!r}\n")
                continue
            if isinstance(event, Finished | Failed | Stopped):
                self.last = event
            yield event

    def wait(self) -> int:
        assert self._child is not None
        return self._child.wait()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """First a checkpoint and an end, then death. Nothing here may use a buffered stream."""
        self.interrupts += 1
        if self._child is None:
            return
        if self.interrupts == 1:
            _say(b"\nstopping after this step, with a checkpoint; once more kills\n")
            self._child.terminate()
        else:
            self._kill()

    def _kill(self) -> None:
        if self._child is None or self._child.poll() is not None:
            return
        try:
            if hasattr(os, "killpg"):
                os.killpg(self._child.pid, signal.SIGKILL)
            else:
                self._child.kill()
        except ProcessLookupError:
            pass


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises CommandError where another command does."""
    if os.name == "nt":
        yield
        return
    import fcntl

    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CommandError(
                "another `tunesmith train` is at work on this output folder",
                "wait for it, or give another --out DIR",
            ) from None
        yield


def _found(name: str, text: str) -> str:
    """An input's absolute path. Raises CommandError."""
    path = Path(text).expanduser().absolute()
    if path.exists():
        return str(path)
    near = near_name(path.name, names_in(path.parent))
    raise CommandError(
        f"{name}: nothing lies at {text!r}{near}",
        "paths in a spec file are relative to the folder you are in",
        NOT_FOUND,
    )


def _tokenizer(spec: AnySpec, name: str) -> str | None:
    """Where the one lies that the training brings along. Raises CommandError."""
    if not isinstance(spec, Pretrain) or spec.tokenizer is None:
        return None
    return _found(name, spec.tokenizer)


def _refuse_twins(spec: AnySpec, inputs: Inputs, name: Callable[[str], str]) -> None:
    """Raises ValidationError where rows say the same that are not to."""
    reading, training = Reading.of(spec), Path(inputs.dataset).resolve()
    validation = None if inputs.eval_dataset is None else Path(inputs.eval_dataset).resolve()
    if spec.duplicates == "refuse":
        refuse("duplicates", check_file(training, reading=reading).duplicates, name("dataset"))
        if validation is not None:
            repeated = check_file(validation, reading=reading).duplicates
            refuse("duplicates", repeated, name("eval_dataset"))
    if spec.overlap == "refuse" and validation is not None:
        refuse("overlap", overlap(training, validation, reading), name("eval_dataset"))


def _check_free(out: Path) -> None:
    """Raises CommandError where the folder holds what we did not make."""
    if out.exists() and not out.is_dir():
        raise CommandError(f"{out} is a file", "give a folder with --out DIR")
    if listed(out) and not manifest.is_sealed(out):
        raise CommandError(
            f"{out} is not empty and holds no model of ours, so it is left alone",
            "give another folder with --out DIR",
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_TAIL_BYTES))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-15:])


def _say(text: bytes) -> None:
    try:
        os.write(2, text)
    except OSError:
        return
