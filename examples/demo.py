"""The main job from end to end, on a CPU, with nothing but this package (make demo).

A small base model is pretrained on the interpreter's documentation; a LoRA fine-tune is asked for
over HTTP, followed live and chatted with; held-out questions are asked before and after.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tunesmith.cli.progress import Progress, curve
from tunesmith.data import samples
from tuning_sdk import TuningClient

KEY = "test-key-001"
SEED = 7
WORDS_TO_READ, WORDS_TO_LEARN, WORDS_HELD_OUT = 24_000, 5_000, 100
LONGEST_WORD = 6
DOCUMENT_BYTES = 150_000
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ 'Question: ' + message['content'] + '\\nAnswer: ' }}{% endif %}"
    "{% endfor %}"
)
"""Plain words and the end token: all of it was seen while pretraining."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
PRETRAIN = """\
method: pretrain
model: {model}
dataset: {data}
from_scratch: true
sequence_length: 128
optim: {{learning_rate: 3.0e-3, epochs: 1, batch_size: 8, beta2: 0.95, warmup_ratio: 0.05}}
run: {{logging_steps: 10, save_seconds: 600}}
"""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--workspace", help="keep everything there, not in a temporary folder")
    chosen = arguments.parse_args().workspace
    with tempfile.TemporaryDirectory(prefix="tunesmith-demo-") as temporary:
        return demonstrate(Path(chosen or temporary).resolve(), is_kept=bool(chosen))


def demonstrate(workspace: Path, is_kept: bool) -> int:
    started = time.monotonic()
    workspace.mkdir(parents=True, exist_ok=True)
    held_out = make_data(workspace)
    with server(workspace) as url, TuningClient(KEY, url) as client:
        say("1. A base model: 0.9 million parameters, pretrained on Python's own documentation")
        pretrain(workspace)
        say("2. Held-out questions, asked of the base model")
        before = accuracy(client, "models/base", held_out)
        say("3. A LoRA fine-tune: POST /train/sft, followed by its event stream")
        name, losses = fine_tune(client)
        say("4. The same questions, asked of the tuned model: POST /v1/chat/completions")
        after = accuracy(client, name, held_out)
        show(before, after, losses, name)
        question, answer = held_out[0]
        print(f"   asked: {question}   answered: {ask(client, name, question)}   right: {answer}")
    print(f"\nTook {time.monotonic() - started:.0f} s.")
    how_to_go_on(workspace, is_kept, name)
    return 0 if before <= 0.10 and after >= 0.90 else 1


def make_data(workspace: Path) -> list[samples.Pair]:
    """Text to pretrain on, conversations to tune on; returns the questions kept aside."""
    model, data = workspace / "models" / "empty", workspace / "data"
    data.mkdir(parents=True, exist_ok=True)
    texts = samples.documentation_text(DOCUMENT_BYTES, SEED)
    tokenizer = samples.train_tokenizer(texts, vocabulary_size=0)
    samples.write_tokenizer(tokenizer, model, template=TEMPLATE, max_length=512)
    config = CONFIG | {"vocab_size": tokenizer.get_vocab_size()}
    (model / "config.json").write_text(json.dumps(config, indent=1))
    pairs = samples.capitals(SEED, WORDS_TO_LEARN + WORDS_HELD_OUT, LONGEST_WORD)
    kept_aside = {answer.lower() for _, answer in pairs[WORDS_TO_LEARN:]}
    lines = [
        line
        for line in samples.statements(SEED + 1, WORDS_TO_READ, LONGEST_WORD)
        if line.split()[0] not in kept_aside
    ]
    pages = ["\n".join(lines[start : start + 20]) for start in range(0, len(lines), 20)]
    samples.write_text(data / "pretrain.jsonl", texts + pages)
    samples.write_chat(data / "tune.jsonl", pairs[:WORDS_TO_LEARN])
    return pairs[WORDS_TO_LEARN:]


@contextlib.contextmanager
def server(workspace: Path) -> Iterator[str]:
    """`tunesmith up` on a free port, stopped at the end as Ctrl-C would."""
    environment = os.environ | {"TUNESMITH_WORKSPACE": str(workspace)}
    with (workspace / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.cli", "up", "--port", "0"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield address(workspace, process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def address(workspace: Path, process: "subprocess.Popen[bytes]") -> str:
    place = workspace / ".tunesmith" / "api.json"
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads(place.read_text())["url"])
        time.sleep(0.1)
    raise SystemExit((workspace / "server.log").read_text())


def pretrain(workspace: Path) -> None:
    """`tunesmith train SPEC.yaml`: in the foreground, without the server."""
    spec = workspace / "pretrain.yaml"
    body = PRETRAIN.format(
        model=workspace / "models" / "empty", data=workspace / "data" / "pretrain.jsonl"
    )
    spec.write_text(body)
    out = workspace / "models" / "base"
    command = [sys.executable, "-m", "tunesmith.cli", "train", str(spec), "--out", str(out)]
    subprocess.run(command, check=True)


def fine_tune(client: TuningClient) -> tuple[str, list[float]]:
    """Submit, follow, wait. Returns the tuned model's name and the losses."""
    job = client.jobs.train_sft(
        model_name="models/base",
        dataset_path="data/tune.jsonl",
        num_epochs=3,
        batch_size=16,
        learning_rate=2e-3,
        max_length=256,
        lora_r=16,
        lora_alpha=32,
        warmup_ratio=0.05,
    )
    with Progress(f"job {job.job_id}") as progress:
        for event in client.jobs.events(job.job_id):
            progress.take(event.model_dump())
    done = client.jobs.get(job.job_id)
    if done.status != "completed" or done.fine_tuned_model is None:
        raise SystemExit(f"the job {done.status}: {done.error}")
    return done.fine_tuned_model, list(progress.course.losses)


def accuracy(client: TuningClient, model: str, questions: list[samples.Pair]) -> float:
    right = 0
    for done, (question, answer) in enumerate(questions, start=1):
        right += ask(client, model, question) == answer
        if sys.stderr.isatty():
            print(f"\r   {done}/{len(questions)} asked, {right} right", end="", file=sys.stderr)
    print(f"\r   {right} of {len(questions)} right" + " " * 20)
    return right / len(questions)


def ask(client: TuningClient, model: str, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    answer = client.chat(model, messages, stream=False, max_tokens=24, temperature=0)
    return answer.strip()


def show(before: float, after: float, losses: list[float], name: str) -> None:
    print(f"\n{curve(losses, 60)}\n")
    print(f"   base model   {before:6.1%} right")
    print(f"   tuned model  {after:6.1%} right   ({name})")


def how_to_go_on(workspace: Path, is_kept: bool, name: str) -> None:
    if is_kept:
        print(f"Go on: cd {workspace} && tunesmith up, then tunesmith chat {name}")
    else:
        print("Go on: make up, then open http://127.0.0.1:8000/docs, or: tunesmith --help")


def say(line: str) -> None:
    print(f"\n{line}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
