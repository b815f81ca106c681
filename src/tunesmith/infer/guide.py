"""Answers held to a grammar: which tokens may come next. V vocabulary entries.

The matching is llguidance's. Its limits bound the work of compiling a grammar and of each token.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from tunesmith.errors import BadRequestError
from tunesmith.infer.lexicon import Lexicon

_KEPT = 64
_pool = ThreadPoolExecutor(2, thread_name_prefix="guide")
"""Masks are computed here while the model computes; llguidance holds no lock of Python's."""


class Guide:
    """One answer's place in a grammar. Used by the engine's thread alone, and the matcher by it
    only while no mask is being computed."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self.is_over = False
        """Whether nothing can follow but the end."""
        self.error: BadRequestError | None = None
        """What became of a grammar that asks for too much work at a token, or has no end."""
        self._mask: Future[bytes] = _pool.submit(matcher.compute_bitmask)

    def mask(self) -> NDArray[np.bool_]:
        """(V,) which tokens may come next: an end token where the answer may end here."""
        packed = np.frombuffer(self._mask.result(), np.uint8)
        self._look()
        if self.error is not None:
            return np.ones(self._vocabulary, np.bool_)
        bits = np.unpackbits(packed, count=self._vocabulary, bitorder="little")
        return bits.view(np.bool_)

    def push(self, id_: int) -> None:
        """The token that was drawn under the last mask."""
        if self.error is None:
            self._matcher.consume_token(id_)
            self._look()
        if not self.is_over:
            self._mask = _pool.submit(self._matcher.compute_bitmask)

    def _look(self) -> None:
        self.is_over = bool(self._matcher.is_stopped())
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines()[:1]
            self.error = BadRequestError(
                f"the schema cannot be followed to an end: {''.join(reason)[:300]}",
                param="response_format",
                error_code="schema_not_followed",
            )


class Grammar:
    """A compiled grammar, of which each answer has a guide of its own."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def guide(self) -> Guide:
        return Guide(self._matcher.deep_copy(), self._vocabulary)


_known: OrderedDict[tuple[int, str], tuple[Lexicon, Grammar]] = OrderedDict()
_reading = threading.Lock()


def compile_grammar(text: str, lexicon: Lexicon) -> Grammar:
    """Slow (up to a second for the largest): call it off the event loop. The last are kept.

    `text` is llguidance's own form. Raises ValueError with what is wrong with it.
    """
    key = (id(lexicon), text)
    with _reading:
        if key in _known:
            _known.move_to_end(key)
            return _known[key][1]
    matcher = LLMatcher(lexicon.tokens, text, log_level=0)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    grammar = Grammar(matcher, lexicon.vocabulary)
    with _reading:
        _known[key] = (lexicon, grammar)
        if len(_known) > _KEPT:
            _known.popitem(last=False)
    return grammar
