"""What the trainer's tests share: tiny models made on the spot, rows, and ways to run a task."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.spec.pipe import Inputs, Plan, TrainerTask
from tunesmith.spec.train import AnySpec, Lora, Optim, Run, Sft, Tuning
from tunesmith.train.process import Asks
from tunesmith.train.report import Report
from tunesmith.train.sweep import job_for

TEXT = "river stone 강물 바위 水 石头 cloud 구름 云 tree 나무 树 light 빛 光 🌊 🌲 night 밤 夜"
WORDS = TEXT.split()
Tuned = TypeVar("Tuned", bound=Tuning)
PLAN = Plan(threads=1, micro_batch_tokens=96)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(folder: Path, seed: int = 7, layers: int = 2, context: int = 256) -> Path:
    """A Llama of some ten thousand weights, with a tokenizer trained here and a chat template."""
    folder.mkdir(parents=True)
    _tokenizer().save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )


def pairs(count: int, longest: int = 12) -> list[dict[str, str]]:
    """Prompt and completion, of lengths that differ."""
    return [
        {
            "prompt": " ".join(WORDS[(i * 7 + k) % len(WORDS)] for k in range(1 + i % longest)),
            "completion": " " + " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(1 + i % 5)),
        }
        for i in range(count)
    ]


def preferences(count: int, longest: int = 12) -> list[dict[str, str]]:
    """Prompt, chosen and rejected, of lengths that differ."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": " "
            + " ".join(WORDS[(i * 3 + k + 1) % len(WORDS)] for k in range(1 + i % 7)),
        }
        for i, row in enumerate(pairs(count, longest))
    ]


def judged(count: int) -> list[dict[str, Any]]:
    """Prompt, completion and label."""
    return [{**row, "label": i % 3 != 1} for i, row in enumerate(pairs(count))]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def sft(lora: Lora | None = None, *, run: Run | None = None, **over: Any) -> Sft:
    """Settings for a short job; what is no field of `Optim` goes to the spec itself."""
    own = {name: over.pop(name) for name in list(over) if name in Sft.model_fields}
    optim = Optim(**{"learning_rate": 1e-3, "batch_size": 4, "epochs": 1.0, **over})
    run = run or Run(save_seconds=3600)
    return Sft(model="m", dataset="d", lora=lora, optim=optim, run=run, **own)


def tuned(kind: type[Tuned], *, run: Run | None = None, **over: Any) -> Tuned:
    """As `sft`, for another method; every weight unless `lora` says otherwise."""
    own = {name: over.pop(name) for name in list(over) if name in kind.model_fields}
    optim = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 1.0, **over}
    common = {"model": "m", "dataset": "d", "lora": None, "optim": optim}
    return kind.model_validate(common | {"run": run or Run(save_seconds=3600)} | own)


@dataclass
class Place:
    """A folder with a model and rows in it; makes tasks."""

    folder: Path
    model: Path
    dataset: Path
    made: int = 0

    def task(self, spec: AnySpec, **over: Any) -> TrainerTask:
        """Each task has an attempt folder of its own, unless given."""
        self.made += 1
        attempt = self.folder / f"attempt-{self.made}"
        values: dict[str, Any] = {
            "job_id": "0123abcd",
            "fence": self.made,
            "spec": spec,
            "inputs": Inputs(model=str(self.model), dataset=str(self.dataset)),
            "attempt_dir": str(attempt),
            "plan": PLAN,
        }
        return TrainerTask.model_validate({**values, **over})


@dataclass
class Events:
    """What a trainer said."""

    all: list[dict[str, Any]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.all if event["type"] == kind]

    @property
    def last(self) -> dict[str, Any]:
        return self.all[-1]

    @property
    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.of("step")}


def run_here(task: TrainerTask, asks: Asks | None = None) -> Events:
    """Carry a task out in this process; what it raises comes through."""
    path = Path(task.attempt_dir).with_suffix(".events")
    with path.open("wb") as file:
        job_for(task, Report(file.fileno()), asks or Asks()).run()
    return read_events(path)


def read_events(path: Path) -> Events:
    lines = path.read_bytes().split(b"\n")[:-1]
    return Events([json.loads(line, parse_constant=_refuse) for line in lines])


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} in an event")


class Forker:
    """The test's end of a forking process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wire = ours
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.train.zygote", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": "src"},
        )
        theirs.close()
        self.ready = self.hear()
        self._asked = 0
        self._ends: dict[int, int] = {}

    def hear(self, timeout: float = 120) -> dict[str, Any]:
        self.wire.settimeout(timeout)
        return json.loads(self.wire.recv(1 << 18))

    def send(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        socket.send_fds(self.wire, [json.dumps(request).encode()], descriptors)
        answer = self.hear()
        while "exit" in answer:
            self._ends[answer["pid"]] = answer["exit"]
            answer = self.hear()
        return answer

    def fork(self, task: TrainerTask, env: dict[str, str] | None = None) -> "Child":
        """Start a trainer on a task; its events and its log go to files beside the attempt."""
        self._asked += 1
        stem = Path(task.attempt_dir)
        stem.parent.mkdir(parents=True, exist_ok=True)
        given, events, log = (stem.with_suffix(s) for s in (".task", ".events", ".log"))
        given.write_text(task.model_dump_json(), encoding="utf-8")
        with given.open("rb") as stdin, events.open("wb") as stdout, log.open("wb") as stderr:
            request = {"id": self._asked, "module": "tunesmith.train", "argv": [], "env": env or {}}
            descriptors = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
            answer = self.send({**request, "cwd": "/"}, descriptors)
        return Child(self, answer["pid"], events, log)

    def run(self, task: TrainerTask) -> tuple[int, Events]:
        child = self.fork(task)
        return child.wait(), child.events

    def end_of(self, pid: int) -> int:
        while pid not in self._ends:
            answer = self.hear()
            self._ends[answer["pid"]] = answer["exit"]
        return self._ends.pop(pid)

    def close(self) -> None:
        self.wire.close()
        self.process.wait(60)


@dataclass
class Child:
    """A forked trainer."""

    forker: Forker
    pid: int
    events_path: Path
    log: Path

    @property
    def events(self) -> Events:
        return read_events(self.events_path)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self.forker.end_of(self.pid)

    def wait_for(self, kind: str, count: int = 1) -> None:
        """Until so many events of a kind were said. Fails where the child ends before."""
        deadline = time.monotonic() + 120
        while len(self.events.of(kind)) < count:
            assert time.monotonic() < deadline, self.log.read_text()
            assert is_alive(self.pid), self.log.read_text()
            time.sleep(0.002)


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
