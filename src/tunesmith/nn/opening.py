"""From a checked folder to a transformers model that is set up for training."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tunesmith.nn.folder import ModelFolder, listed, open_folder, refuse
from tunesmith.nn.hosted import HostedModel, HostedScorer, find_ways
from tunesmith.nn.sharded import ShardedModel, ShardedScorer
from tunesmith.spec.train import Lora


@dataclass(frozen=True)
class Opening:
    """How a model is to be opened; see `open_model`."""

    lora: Lora | None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    should_compile: bool = False
    seed: int = 42
    gradient_checkpointing: bool = False
    quantization: Literal["4bit", "8bit"] | None = None
    from_scratch: bool = False
    has_dropout: bool = True
    is_sharded: bool = False
    """Each process of the group holds a part of every weight: see `nn.sharded`."""


_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What is computed in; weights that are trained stay in fp32."""


def open_hosted(folder: ModelFolder, opening: Opening) -> HostedModel:
    """Load with transformers and PEFT. Raises JobFailure(USER_ERROR)."""
    model = _load(folder, opening)
    ways = find_ways(model)
    model, adapter = _set_up(model, folder, opening, "CAUSAL_LM")
    dtype = _HALVES.get(opening.precision)
    hosted: HostedModel
    if opening.is_sharded:
        hosted = sharded = ShardedModel(model, ways, autocast_dtype=dtype, adapter=adapter)
        sharded.share_out(opening.device)
    else:
        hosted = HostedModel(model, ways, autocast_dtype=dtype, adapter=adapter)
    hosted.train()
    return hosted


def open_hosted_beside(folder: ModelFolder, openings: Sequence[Opening]) -> list[HostedModel]:
    """One model an opening over the same weights, each an adapter under a name in PEFT.

    But for `lora` and `seed` the openings are alike. Raises JobFailure(USER_ERROR).
    """
    model = _load(folder, openings[0])
    ways = find_ways(model)
    dtype = _HALVES.get(openings[0].precision)
    peft: Any = None
    names = [f"beside{number}" for number in range(len(openings))]
    for name, opening in zip(names, openings, strict=True):
        peft = _with_adapter(model if peft is None else peft, folder, opening, "CAUSAL_LM", name)
    _finish(model, openings[0])
    return [HostedModel(model, ways, autocast_dtype=dtype, adapter=peft, name=one) for one in names]


def open_hosted_scorer(folder: ModelFolder, opening: Opening) -> HostedScorer:
    """The same with one number for a head. Raises JobFailure(USER_ERROR)."""
    model = _load_scorer(folder, opening)
    ways = find_ways(model, model.base_model)
    model, adapter = _set_up(model, folder, opening, "SEQ_CLS")
    dtype = _HALVES.get(opening.precision)
    hosted: HostedScorer
    if opening.is_sharded:
        hosted = sharded = ShardedScorer(model, ways, autocast_dtype=dtype, adapter=adapter)
        sharded.share_out(opening.device)
    else:
        hosted = HostedScorer(model, ways, autocast_dtype=dtype, adapter=adapter)
    hosted.train()
    return hosted


def _set_up(model: Any, folder: ModelFolder, opening: Opening, task: str) -> tuple[Any, Any]:
    """The model that is trained, and PEFT's around it where there is one."""
    adapter = _with_adapter(model, folder, opening, task)
    if opening.lora is None:
        model = model if adapter is None else adapter.merge_and_unload()
        model.requires_grad_(True)
        adapter = None
    _finish(model, opening)
    return model, adapter


def _with_adapter(
    model: Any, folder: ModelFolder, opening: Opening, task: str, name: str = "default"
) -> Any:
    """PEFT's model around it, or the same with one adapter more; None where there is none."""
    if folder.adapter is not None:
        is_trainable = opening.lora is not None
        return _with_known_adapter(model, folder, is_trainable=is_trainable, name=name)
    return None if opening.lora is None else _with_new_adapter(model, folder, opening, task, name)


def _finish(model: Any, opening: Opening) -> None:
    if opening.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not opening.has_dropout:
        _stop_dropout(model)


def _stop_dropout(model: torch.nn.Module) -> None:
    """In its layers, in the adapters among them, and where attention is told of it."""
    for one in model.modules():
        if isinstance(one, torch.nn.Dropout):
            one.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(one, name, None), float):
                setattr(one, name, 0.0)


def check_opening(folder: ModelFolder, opening: Opening, *, is_scoring: bool = False) -> None:
    if is_reward_model(folder) and not is_scoring:
        raise refuse(
            f"{folder.given} is a reward model: it gives scores and no tokens",
            "give the model that it was made from, or train it further with method: reward",
        )
    if opening.quantization is not None and not opening.device.startswith("cuda"):
        raise refuse(
            f"{opening.quantization} quantization needs a CUDA device and this job runs on the CPU",
            "leave quantization out, or run on a host with a GPU",
        )
    if opening.quantization is not None and opening.lora is None:
        raise refuse("quantized weights cannot be trained themselves", "ask for LoRA with it")
    if opening.from_scratch and (opening.lora is not None or folder.adapter is not None):
        raise refuse("from_scratch trains every weight of a new model: no adapter goes with it")


def is_reward_model(folder: ModelFolder) -> bool:
    """Full weights, or an adapter, that were saved with a head that scores."""
    named = folder.config.get("architectures") or []
    is_full = any(str(one).endswith("ForSequenceClassification") for one in named)
    return is_full or (folder.adapter_config or {}).get("task_type") == "SEQ_CLS"


def load_config(folder: ModelFolder) -> Any:
    """Raises JobFailure(USER_ERROR) where transformers has no such architecture."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder.base, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise refuse(f"{folder.base_given}: transformers cannot read it: {error}") from error


def new_model(config: Any, seed: int) -> Any:
    """Weights drawn as transformers draws them; the process's random state is left alone."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _home(opening: Opening) -> str:
    """Where a model is loaded: one that is to be shared out may fit on no device."""
    return "cpu" if opening.is_sharded else opening.device


def _load(folder: ModelFolder, opening: Opening) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if opening.from_scratch:
        return new_model(load_config(folder), opening.seed).to(_home(opening))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder.base,
            dtype=_dtype(opening),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            quantization_config=_quantization(opening),
            device_map={"": opening.device} if opening.quantization else None,
        )
        return model if opening.quantization else model.to(_home(opening))
    except (ValueError, OSError, KeyError) as error:
        raise refuse(f"{folder.base_given}: transformers cannot load it: {error}") from error


def _load_scorer(folder: ModelFolder, opening: Opening) -> Any:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(opening.seed)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                folder.base,
                num_labels=1,
                dtype=_dtype(opening),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                quantization_config=_quantization(opening),
                device_map={"": opening.device} if opening.quantization else None,
            )
        except (ValueError, OSError, KeyError) as error:
            raise refuse(f"{folder.base_given}: no reward model can be made: {error}") from error
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise refuse(
            f"{folder.base_given}: its architecture has no head `score` to train",
            "use a decoder such as Llama, Mistral, Qwen, Gemma or GPT-2",
        )
    model.config.pad_token_id = pad_of(model.config)
    return model if opening.quantization else model.to(_home(opening))


def pad_of(config: Any) -> int | None:
    """What plain transformers may take for padding; not what ends a text: it would score before."""
    text = config.get_text_config()
    end = text.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return None if text.pad_token_id in ends else text.pad_token_id


def _dtype(opening: Opening) -> torch.dtype:
    """Weights that are trained stay in fp32; frozen ones may be halved."""
    half = _HALVES.get(opening.precision)
    return torch.float32 if half is None or opening.lora is None else half


def _quantization(opening: Opening) -> Any:
    if opening.quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise refuse(
            "quantization needs the package bitsandbytes, which is not installed",
            "pip install bitsandbytes, or leave quantization out",
        ) from None
    if opening.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(opening),
    )


def _with_known_adapter(model: Any, folder: ModelFolder, *, is_trainable: bool, name: str) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder.adapter), name, is_trainable=is_trainable)
                return model
            return PeftModel.from_pretrained(
                model, str(folder.adapter), name, is_trainable=is_trainable
            )
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise refuse(f"{folder.given}: the adapter does not fit its base model: {error}") from error


def _with_new_adapter(
    model: Any, folder: ModelFolder, opening: Opening, task: str, name: str
) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = opening.lora
    assert lora is not None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        fan_in_fan_out=_has_transposed_layers(model),
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
        base_model_name_or_path=folder.base_given,
    )
    if not isinstance(model, PeftModel):
        model.name_or_path = folder.base_given
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(opening.seed)
        try:
            if not isinstance(model, PeftModel):
                return get_peft_model(model, config, name)
            model.add_adapter(name, config)
            return model
        except ValueError as error:
            raise refuse(
                f"targets {lora.targets!r} do not fit this model: {error}",
                f"its linear layers are {listed(linear_names(model))}; or ask for all-linear",
            ) from error


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last parts of the names of the layers that LoRA can be put on."""
    kinds = ("Linear", "Conv1D")
    return [
        name.split(".")[-1] for name, one in model.named_modules() if type(one).__name__ in kinds
    ]


def linear_layers(given: str) -> list[str]:
    """Whole names of all linear layers of a folder's model, or of its base; no weight is read.

    Raises JobFailure(USER_ERROR).
    """
    from transformers import AutoModelForCausalLM

    config = load_config(open_folder(given))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kinds = ("Linear", "Conv1D")
    return [name for name, one in model.named_modules() if type(one).__name__ in kinds]


def _has_transposed_layers(model: torch.nn.Module) -> bool:
    return any(type(one).__name__ == "Conv1D" for one in model.modules())
