"""What a key may open: everything, unless it was made for less."""

from typing import Literal

Scope = Literal["train", "infer", "load"]
"""Jobs and data; generating; choosing which model is loaded."""
SCOPES: tuple[Scope, ...] = ("train", "infer", "load")
