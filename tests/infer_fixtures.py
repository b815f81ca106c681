"""Tiny real models made on the spot, and a real engine process on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SOURCE = Path(__file__).resolve().parents[1] / "src"
KEY = "sk-engine-test"
TEXTS = [
    "the quick brown fox jumps over the lazy dog, again and again",
    "안녕하세요, 반갑습니다. 오늘 날씨가 좋네요",
    "你好，世界。今天天气很好",
    "numbers 0 1 2 3 4 5 6 7 8 9 and emoji 😀 👩‍👩‍👧 🇰🇷",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": False},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 24},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 7},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6},
    "gpt2": {},
    "gpt_neox": {},
    "phi3": {"num_key_value_heads": 2},
}


def tokenizer() -> Tokenizer:
    """A byte-level BPE of 360 entries: every text has ids, most characters have several."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[AddedToken(each, special=True) for each in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def network(kind: str = "llama", seed: int = 0, **over: Any) -> Any:
    """A tiny decoder with random weights, spread wide enough that no two logits tie."""
    settings: dict[str, Any] = {
        "vocab_size": 360,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "initializer_range": 0.25,
        **SHAPES[kind],
        **over,
    }
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def model_folder(folder: Path, kind: str = "llama", **over: Any) -> Path:
    """A whole model as transformers writes it, tokenizer and chat template with it."""
    network(kind, **over).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "chat_template": TEMPLATE,
            }
        )
    )
    return folder


def hollow_folder(folder: Path, **config: Any) -> Path:
    """A model of any size whose weights are a hole in a file: zeros that take no disk."""
    model_folder(folder)
    told = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(told))
    with torch.device("meta"):
        made = transformers.AutoConfig.from_pretrained(folder)
        net = transformers.AutoModelForCausalLM.from_config(made)
    head, at = {}, 0
    for name, weight in net.state_dict().items():
        size = 2 * weight.numel()
        place = {"shape": list(weight.shape), "data_offsets": [at, at + size]}
        head[name], at = {"dtype": "BF16", **place}, at + size
    text = json.dumps(head).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + at)
    return folder


def break_tokens_from(folder: Path, first: int) -> None:
    """Make the embeddings of these ids NaN, so that a sequence fails once it has said one."""
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][first:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def adapter_folder(folder: Path, base: Path, seed: int, **more: Any) -> Path:
    """A LoRA adapter whose matrices are far from zero, so that it changes every answer; `more` goes
    to PEFT's config."""
    net = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **more)
    tuned = get_peft_model(net, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, each in tuned.named_parameters():
            if "lora_" in name:
                each.normal_(std=0.3)
    tuned.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class EngineProcess:
    pid: int
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SOURCE),
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def engine_process(*arguments: str, log: Path) -> Iterator[EngineProcess]:
    """`python -m tunesmith.infer.server` with a key, ready; told to end at the end."""
    command = [sys.executable, "-m", "tunesmith.infer.server", "--key-env=TUNESMITH_ENGINE_KEY"]
    environment = {**ENVIRONMENT, "TUNESMITH_ENGINE_KEY": KEY}
    out = subprocess.PIPE
    with (
        log.open("wb") as err,
        subprocess.Popen(
            [*command, *arguments], stdout=out, stderr=err, env=environment, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline() or "{}")
            assert said.get("type") == "ready", (said, log.read_text()[-3000:])
            yield EngineProcess(said["pid"], said["port"])
        finally:
            process.terminate()


FORKING = """
import json, os, resource, sys
import tunesmith.infer.server as server
assert len(os.listdir("/proc/self/task")) == 1, "one thread before the fork"
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        _, status = os.waitpid(asked["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(asked["log"], os.O_WRONLY | os.O_CREAT, 0o600), 2)
        os.dup2(os.open(asked["out"], os.O_WRONLY | os.O_CREAT, 0o600), 1)
        if asked["more_bytes"] is not None:
            taken = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
            most = int(taken.split()[1]) * 1024 + asked["more_bytes"]
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        os._exit(server.main([*asked["arguments"], f"--parent-pid={os.getppid()}"]))
    print(pid, flush=True)
os._exit(0)
"""


class ForkServer:
    """A process that has the engine's module imported and forks engines, as a worker has one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        )

    def start(self, *arguments: str, more_bytes: int | None = None) -> tuple[int, dict[str, Any]]:
        """Fork an engine, which may take so many bytes more. Returns its process id and what it
        announces."""
        self._count += 1
        out = self._folder / f"out{self._count}"
        os.mkfifo(out)
        log = self._folder / f"log{self._count}"
        asked = {"arguments": arguments, "out": str(out), "log": str(log)}
        pid = self._ask(asked | {"more_bytes": more_bytes})
        with out.open() as announcements:
            said = json.loads(announcements.readline() or "{}")
        return pid, said

    @contextmanager
    def engine(self, *arguments: str) -> Iterator[EngineProcess]:
        pid, said = self.start(*arguments)
        assert said.get("type") == "ready", said
        try:
            yield EngineProcess(pid, said["port"])
        finally:
            os.kill(pid, signal.SIGTERM)
            assert self.wait(pid) == 0

    def wait(self, pid: int) -> int:
        """The exit code of an engine that has ended or is about to."""
        return self._ask({"wait": pid})

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, asked: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def listening_socket() -> socket.socket:
    """A port of this machine that is taken."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken
