"""How near an answer comes to the one that was wanted, by the words they share in order.

ROUGE-L: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, section 3.1, with
beta = 1. Words are lower-cased, punctuation is left out, and nothing is stemmed. Scripts that are
written without spaces, and Hangul, whose words carry their particles, are taken by the letter;
a symbol such as an emoji is a word.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby

_PIECES = re.compile(r"[^\W_]+|[^\w\s]")
_BY_LETTER = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def rouge_l(answer: str, reference: str) -> float:
    """From 0 to 1: the harmonic mean of precision and recall. 1 where both say nothing."""
    said, wanted = words(answer), words(reference)
    if not said or not wanted:
        return float(not said and not wanted)
    return 2 * common(said, wanted) / (len(said) + len(wanted))


def words(text: str) -> list[str]:
    """What is compared."""
    text = unicodedata.normalize("NFC", text).lower()
    return [word for piece in _PIECES.findall(text) for word in _split(piece)]


def common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many words the longest common subsequence has.

    A row of the table in the bits of one number (Hyyrö 2004, Bit-parallel LCS-length computation
    revisited, figure 3).
    """
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    whole = (1 << len(first)) - 1
    row = whole
    for word in second:
        met = row & places.get(word, 0)
        row = ((row + met) | (row - met)) & whole
    return len(first) - row.bit_count()


def _split(piece: str) -> list[str]:
    if not piece[0].isalnum():
        return [piece] if unicodedata.category(piece[0]) == "So" else []
    parts = groupby(piece, key=lambda letter: bool(_BY_LETTER.match(letter)))
    return [
        word
        for is_apart, letters in parts
        for word in (letters if is_apart else ("".join(letters),))
    ]
