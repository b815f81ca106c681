"""What weights are held in, and products computed in."""

from typing import Literal, get_args

Precision = Literal["auto", "fp32", "bf16", "int8", "int4"]
"""`auto` is bf16 on a GPU, int8 on a CPU that has units for it, else fp32."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
