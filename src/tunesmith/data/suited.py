"""Which formats a method can train on, and what is said of a file in another one."""

from collections.abc import Mapping

from tunesmith.data.row import Format
from tunesmith.errors import ValidationError

TEACHING: tuple[Format, ...] = ("openai", "alpaca", "prompt_completion", "sharegpt", "text")
PAIRED: tuple[Format, ...] = ("preference", "openai_preference", "scored")
JUDGED: tuple[Format, ...] = ("unpaired", *PAIRED)
ASKING: tuple[Format, ...] = ("prompts", *(one for one in TEACHING if one != "text"), *JUDGED)
READ: Mapping[str, tuple[Format, ...]] = {
    "sft": TEACHING,
    "pretrain": ("text",),
    "dpo": PAIRED,
    "orpo": PAIRED,
    "cpo": PAIRED,
    "simpo": PAIRED,
    "reward": PAIRED,
    "kto": JUDGED,
    "grpo": ASKING,
    "rloo": ASKING,
    "ppo": ASKING,
}
"""By method."""
_SHAPES: Mapping[Format, str] = {
    "openai": '{"messages": […]}',
    "alpaca": '{"instruction", "input", "output"}',
    "prompt_completion": '{"prompt", "completion"}',
    "sharegpt": '{"conversations": […]}',
    "text": '{"text"}',
    "unpaired": '{"prompt", "completion", "label": true or false}',
    "preference": '{"prompt", "chosen", "rejected"}',
    "openai_preference": '{"input", "preferred_output", "non_preferred_output"}',
    "scored": '{"prompt", "responses": [{"content", "score"}, …]}',
    "prompts": '{"prompt"} or {"messages"} that end with what is asked',
}
_ADVICE: Mapping[Format, str] = {
    "prompts": "train on it with grpo, rloo or ppo",
    "unpaired": "train on it with kto",
    "preference": "train on it with dpo, kto, orpo, cpo, simpo or reward",
    "openai_preference": "train on it with dpo, kto, orpo, cpo, simpo or reward",
    "scored": "train on it with dpo, kto, orpo, cpo, simpo or reward",
}


def refuse_unpaired(format: str, name: str, param: str | None = None) -> None:
    """Raises ValidationError where no reward model can be trained on files of the format."""
    if format in PAIRED:
        return
    found = _SHAPES[format]  # type: ignore[index]
    wanted = " or ".join(_SHAPES[one] for one in PAIRED)
    raise ValidationError(
        f"{name} holds rows like {found}, from which no reward model can be trained first; name "
        f"rewards (or a reward_model), or give rows like {wanted}",
        param=param,
    )


def refuse_unsuited(method: str, format: str, name: str, param: str | None = None) -> None:
    """Raises ValidationError where the method cannot read files of the format."""
    known = READ[method]
    if format in known:
        return
    found = _SHAPES[format]  # type: ignore[index]
    wanted = " or ".join(_SHAPES[one] for one in known)
    advice = _ADVICE.get(format)  # type: ignore[call-overload]
    other = f", or {advice}" if advice else ""
    raise ValidationError(
        f"{name} holds rows like {found}, and {method} reads rows like {wanted}; "
        f"write it so{other}",
        param=param,
    )
