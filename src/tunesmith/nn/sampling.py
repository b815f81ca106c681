"""From logits to what is drawn from them. B sequences, V vocabulary entries.

Pure functions, that serving and training share.
"""

import torch
from torch import Tensor


def tempered(logits_BV: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits divided by the temperature (a (B, 1) tensor: a temperature a row), in fp32.

    The largest becomes 0 first, so that a tiny temperature overflows to -inf and not to nan.
    """
    logits_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    if isinstance(temperature, Tensor):
        return logits_BV / temperature.clamp(min=1e-5).to(logits_BV.dtype)
    return logits_BV / max(temperature, 1e-5)


def keep_top_k(logits_BV: Tensor, top_k_B: Tensor) -> Tensor:
    """Drop all but the k likeliest tokens of each row; ties with the last one stay.

    0, or a k beyond the vocabulary, keeps the row whole.
    Returns (B, V) logits with -inf where dropped; the input is left alone.
    Source: Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """
    V = logits_BV.shape[-1]
    k_B = torch.where(top_k_B <= 0, V, top_k_B).clamp(max=V)
    largest_BK = logits_BV.topk(int(k_B.max()), dim=-1).values
    floor_B1 = largest_BK.gather(-1, (k_B - 1)[:, None])
    return logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Drop the unlikely tail: keep the fewest tokens whose probability reaches top_p.

    The likeliest token always stays; ties go to the lower id. Expects 0 < top_p <= 1, and logits
    already divided by temperature. A top_p of 1 keeps the row whole.
    Returns (B, V) logits with -inf where dropped; the input is left alone.
    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.double().softmax(dim=-1)
    ahead_BV = probs_BV.cumsum(dim=-1) - probs_BV
    is_dropped_BV = (ahead_BV >= top_p_B[:, None]) & (top_p_B < 1)[:, None]
    is_dropped_BV[:, 0] = False
    kept_BV = sorted_BV.masked_fill(is_dropped_BV, -torch.inf)
    return torch.empty_like(logits_BV).scatter_(-1, order_BV, kept_BV)


def pick(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw one id of each row (B,) by inverting the distribution function at a float64 number
    from [0, 1).

    One number a token, whatever the vocabulary: so the n-th token of a sequence depends on its
    seed and its own logits alone. An id of weight 0 is never drawn.
    """
    edges_BV = weights_BV.double().cumsum(dim=-1)
    aims_B1 = uniform_B[:, None] * edges_BV[:, -1:]
    at_B = torch.searchsorted(edges_BV, aims_B1, right=True)[:, 0]
    V = weights_BV.shape[-1]
    places_V = torch.arange(V, device=weights_BV.device)
    is_past_B = at_B >= V
    if is_past_B.any():
        last_B = torch.where(weights_BV > 0, places_V, -1).amax(dim=-1)
        at_B = torch.where(is_past_B, last_B, at_B)
    return at_B


def uniforms(seed: int, streams_B: Tensor, first: int, count: int) -> Tensor:
    """Numbers first … first + count - 1 of each stream (B, count), float64 from [0, 1).

    A number hangs on seed, stream and place alone: splitmix64 (Steele, Lea and Flood 2014) over a
    counter, whose start is a stream's own mixed number.
    """
    start_B1 = _mix(_mix(streams_B.long() ^ _wrapped(seed)) + _GOLDEN)[:, None]
    places = torch.arange(first + 1, first + count + 1, device=streams_B.device)
    numbers_BC = _mix(start_B1 + places * _GOLDEN)
    return _shifted(numbers_BC, 11).double() / float(1 << 53)


def _wrapped(number: int) -> int:
    """As 64 bits with a sign."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _wrapped(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _wrapped(0xBF58476D1CE4E5B9), _wrapped(0x94D049BB133111EB)


def _mix(numbers: Tensor) -> Tensor:
    numbers = (numbers ^ _shifted(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * _SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in, as of numbers without a sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
