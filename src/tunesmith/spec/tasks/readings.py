"""What a written value means, where it is not simply the value of its field.

Each takes what was written and returns the field's value, or None where it says nothing. Raises
ValueError with what would be right.
"""

from collections.abc import Callable, Mapping
from typing import Any

Reading = Callable[[Any], Any]

_YES = {"true", "yes", "on", "1"}
_NO = {"false", "no", "off", "0"}


def plainly(value: Any) -> Any:
    return value


def is_yes(value: Any) -> bool:
    word = str(value).lower()
    if word in _YES:
        return True
    if word in _NO:
        return False
    raise ValueError("write true or false")


def flag(when_true: Any, when_false: Any = None) -> Reading:
    """A yes that stands for one value of a field that has several."""
    return lambda value: when_true if is_yes(value) else when_false


def words(meant: Mapping[str, str]) -> Reading:
    """Other people's names for a field's values."""

    def read(value: Any) -> Any:
        return meant.get(str(value).lower(), value)

    return read


def switch(value: Any) -> Any:
    """`true` or `false` for what is on or off; `auto` and the like stay."""
    return {"true": "on", "false": "off"}.get(str(value).lower(), value)


def steps(value: Any) -> Any:
    """-1 is what trainers write for no limit."""
    return None if value == -1 else value


def modules(value: Any) -> Any:
    """A list, or one text with commas; one word for all linear layers."""
    if not isinstance(value, str):
        return value
    if value.replace("_", "-") == "all-linear":
        return "all-linear"
    return [name.strip() for name in value.split(",")]


def evaluated(value: Any) -> Any:
    """A metric of evaluations: `loss`, `eval_loss` and `eval/loss` are one."""
    name = str(value).removeprefix("eval/").removeprefix("eval_")
    return f"eval_{name}"


def only(right: str, advice: str) -> Reading:
    """The one value that can be asked for; it says nothing."""

    def read(value: Any) -> None:
        if str(value).lower() != right:
            raise ValueError(advice)

    return read


def reward_model(value: Any) -> Any:
    """A model's name, or the address of a service."""
    if not isinstance(value, str):
        raise ValueError("has to be the name of a reward model, or the URL of a reward service")
    if value.lower().startswith(("http://", "https://")):
        return [{"kind": "url", "url": value}]
    return [{"kind": "model", "model": value}]


def rewards(value: Any) -> Any:
    """One source or a list of them, each a mapping with its `kind`, or the kind alone."""
    listed = value if isinstance(value, list) else [value]
    return [{"kind": one} if isinstance(one, str) else one for one in listed]
