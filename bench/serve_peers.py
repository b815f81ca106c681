"""Peers of the engine, each in the environment that `bench/serve_venvs.py` made for it."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from pipe import answer_all
from serve_work import NEW, PROMPT, peak_mb, prompts

Generate = Callable[[list[list[int]]], int]
"""Answers all prompts, and returns how many tokens came."""
_open: dict[str, Generate] = {}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    key = f"{asked['peer']} {asked['kind']}"
    if key not in _open:
        _open.clear()
        _open[key] = PEERS[asked["peer"]](asked)
        _open[key](prompts(1))
    generate = _open[key]
    began, spent = time.perf_counter(), time.process_time()
    tokens = generate(prompts(asked["concurrency"]))
    return {
        "tokens": tokens,
        "wall": time.perf_counter() - began,
        "cpu": time.process_time() - spent,
        "peak_mb": peak_mb(),
    }


def _transformers(asked: dict[str, Any]) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(asked["threads"])
    net = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()
    net.generation_config.eos_token_id = None

    def generate(ids: list[list[int]]) -> int:
        rows = torch.tensor(ids)
        with torch.inference_mode():
            out = net.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        return int(out.shape[0] * (out.shape[1] - PROMPT))

    return generate


def _ctranslate2(asked: dict[str, Any]) -> Generate:
    import ctranslate2
    from transformers import AutoTokenizer

    folder = Path(asked["model"]).with_name("ctranslate2")
    if not folder.is_dir():
        converter = ctranslate2.converters.TransformersConverter(asked["model"])
        converter.convert(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    peer = ctranslate2.Generator(
        str(folder),
        device="cpu",
        compute_type="int8" if asked["kind"] == "int8" else "float32",
        intra_threads=asked["threads"],
        inter_threads=1,
    )

    def generate(ids: list[list[int]]) -> int:
        found = peer.generate_batch(
            [tokenizer.convert_ids_to_tokens(each) for each in ids],
            max_length=NEW,
            min_length=NEW,
            include_prompt_in_result=False,
            sampling_topk=1,
            max_batch_size=0,
            end_token="<|im_start|>",
        )
        return sum(len(each.sequences_ids[0]) for each in found)

    return generate


def _openvino(asked: dict[str, Any]) -> Generate:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = 2, 1024
    scheduler.max_num_seqs, scheduler.enable_prefix_caching = 64, False
    options = {"INFERENCE_NUM_THREADS": asked["threads"]}
    peer = genai.ContinuousBatchingPipeline(asked["gguf"], scheduler, "CPU", options)
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = NEW
    config.ignore_eos, config.do_sample = True, False

    def generate(ids: list[list[int]]) -> int:
        rows = [ov.Tensor(np.array([each], dtype=np.int64)) for each in ids]
        return sum(len(one.m_generation_ids[0]) for one in peer.generate(rows, [config] * len(ids)))

    return generate


def _llama_cpp(asked: dict[str, Any]) -> Generate:
    import json

    import xllamacpp

    most = asked["most"]
    given = xllamacpp.CommonParams()
    given.model.path = asked["gguf"]
    given.n_parallel, given.n_ctx = most, (PROMPT + NEW + 8) * most
    given.n_batch, given.n_ubatch = 2048, 512
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = asked["threads"]
    given.n_threads_http, given.warmup, given.cache_prompt = 2, False, False
    given.api_keys = [os.urandom(16).hex()]
    server = xllamacpp.Server(given)

    def one(ids: list[int], counts: list[int]) -> None:
        last: list[Any] = []

        def keep(said: Any) -> bool:
            last[:] = [said]
            return False

        wish = {"prompt": ids, "max_tokens": NEW, "n_predict": NEW}
        wish |= {"ignore_eos": True, "temperature": 0, "cache_prompt": False}
        said = server.handle_completions(wish, keep)
        said = last[0] if last else said
        said = json.loads(said) if isinstance(said, str | bytes) else said
        said = said[0] if isinstance(said, list) else said
        counts.append((said.get("usage") or {}).get("completion_tokens") or 0)

    def generate(ids: list[list[int]]) -> int:
        counts: list[int] = []
        threads = [threading.Thread(target=one, args=(each, counts)) for each in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts)

    return generate


def _vllm(asked: dict[str, Any]) -> Generate:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    peer = LLM(
        model=asked["model"],
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=64,
    )
    wish = SamplingParams(max_tokens=NEW, min_tokens=NEW, temperature=0, ignore_eos=True)

    def generate(ids: list[list[int]]) -> int:
        found = peer.generate([{"prompt_token_ids": each} for each in ids], wish, use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in found)

    return generate


PEERS: dict[str, Callable[[dict[str, Any]], Generate]] = {
    "transformers": _transformers,
    "ctranslate2": _ctranslate2,
    "openvino": _openvino,
    "llama.cpp": _llama_cpp,
    "vllm": _vllm,
}

if __name__ == "__main__":
    answer_all(answer)
