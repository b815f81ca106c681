"""Rows as trainer and engine both render them, and what of a folder decides the arithmetic."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.asked import asked
from tunesmith.data.render import Renderer
from tunesmith.data.row import Row
from tunesmith.errors import ValidationError
from tunesmith.spec.parity import MAX_TOKENS, Told

_FACTS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("n_embd", "n_head", "n_layer", "n_inner", "n_positions"),
    *("hidden_act", "activation_function", "rms_norm_eps", "layer_norm_epsilon"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types"),
    "max_position_embeddings",
)
_ADAPTER_FACTS = ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out")
ADAPTER = "adapter."


@dataclass(frozen=True)
class Rendered:
    text_sha256: str
    ids: list[int]
    question: list[int]


def told(row: Row) -> Told:
    return Told(
        messages=row.messages,
        tools=row.tools,
        prompt=row.prompt,
        completion=row.completion,
        text=row.text,
    )


def rendered(renderer: Renderer, told: Told, most: int = MAX_TOKENS) -> Rendered:
    """Cut to `most` tokens: a row at its end, a question at its beginning. Raises ValidationError
    where there is nothing to render."""
    row = Row(1, told.messages, told.tools, told.prompt, told.completion, told.text)
    question = _question(renderer, row)
    try:
        text, ids = renderer.shown(row), renderer.encode(row, "all").ids
    except ValidationError:  # it only asks
        text, ids = "", question
    if not ids or not question:
        raise ValidationError("a row without a token")
    digest = hashlib.sha256((text + _asking(renderer, row)).encode()).hexdigest()
    return Rendered(digest, ids[:most], question[-most:])


def _question(renderer: Renderer, row: Row) -> list[int]:
    if row.text is not None:
        ids = renderer.encode_text(row.text)
        return ids[: max(1, len(ids) // 2)]
    found = asked(row)
    if found.prompt is not None:
        return renderer.encode_text(found.prompt)
    return renderer.prompt_ids(found.messages, found.tools)


def _asking(renderer: Renderer, row: Row) -> str:
    found = asked(row)
    if not found.messages:
        return found.prompt or ""
    return renderer.text(found.messages, found.tools, add_generation_prompt=True)


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Where two rows of ids part; None where they are equal."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return None if len(left) == len(right) else min(len(left), len(right))


def facts_of(model: Path) -> dict[str, Any]:
    """Of a full model's folder. What cannot be read has none."""
    config = _read(model / "config.json")
    return {name: config[name] for name in _FACTS if config.get(name) is not None}


def adapter_facts(adapter: Path) -> dict[str, Any]:
    config = _read(adapter / "adapter_config.json")
    return {ADAPTER + name: config[name] for name in _ADAPTER_FACTS if name in config}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
