"""What llama.cpp makes of a GGUF file, by the package `xllamacpp`, where it is installed."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tunesmith.errors import BadRequestError

_CONTEXT = 1024


def is_installed() -> bool:
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Answered:
    ids: list[int]
    numbers: list[tuple[int, float]]
    """Id and log-probability of those of them that do not end inside a character."""


class LlamaCpp:
    """Its server, which also listens on loopback: with a key of one's own."""

    def __init__(self, file: Path, threads: int) -> None:
        """Raises BadRequestError where llama.cpp does not load it."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup = _CONTEXT, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        key = secrets.token_urlsafe(24)
        params.api_keys, params.hostnames = [key], ["127.0.0.1"]
        params.ui, params.verbosity = False, -1
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise BadRequestError(f"{file.name}: llama.cpp does not load it: {error}") from None
        self._http = httpx2.Client(
            base_url=self._server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=600,
            trust_env=False,
        )

    def ids(self, text: str, *, has_specials: bool) -> list[int]:
        """Of a text; marks in it are read as special tokens."""
        body = {"content": text, "add_special": has_specials, "parse_special": True}
        return [int(one) for one in self._ask("/tokenize", body)["tokens"]]

    def answer(self, question: Sequence[int], tokens: int) -> Answered:
        """With the likeliest tokens."""
        body = {
            "prompt": list(question),
            "n_predict": tokens,
            "temperature": 0,
            "n_probs": 1,
            "return_tokens": True,
            "cache_prompt": False,
        }
        said = self._ask("/completion", body)
        found = said.get("completion_probabilities", [])
        numbers = [(int(one["id"]), float(one["logprob"])) for one in found]
        return Answered([int(one) for one in said.get("tokens", [])], numbers)

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = self._http.post(path, content=json.dumps(body))
        if reply.status_code != 200:
            raise BadRequestError(f"llama.cpp refused {path}: {reply.text[:500]}")
        return dict(reply.json())

    def close(self) -> None:
        self._http.close()
