"""A vocabulary as bytes: what each token says, and what a grammar can be matched against."""

import threading
from collections import OrderedDict
from collections.abc import Iterable

from llguidance import LLTokenizer

from tunesmith.data.render import Renderer

_KEPT = 4


class Lexicon:
    """Costs up to a second and some memory to make for a large vocabulary: `lexicon_of` keeps
    the last ones."""

    def __init__(self, tokenizer: str, vocabulary: int, stop_ids: Iterable[int]) -> None:
        ends = sorted(stop_ids) or [0]
        self.tokens = LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends)
        self.vocabulary = vocabulary

    def bytes_of(self, id_: int) -> bytes:
        return bytes(self.tokens.decode_bytes([id_]))

    def name(self, id_: int) -> str:
        """A token as OpenAI's log-probabilities write it: its text, or its bytes where they are
        no whole characters."""
        said = self.bytes_of(id_)
        try:
            return said.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)


_known: OrderedDict[tuple[str, int], Lexicon] = OrderedDict()
_making = threading.Lock()


def lexicon_of(renderer: Renderer, vocabulary: int) -> Lexicon:
    """Made once for models that read and write alike. Slow: call it off the event loop.

    `vocabulary` is the width of the model's logits, which may be more than the tokenizer has.
    """
    key = (renderer.tokenizer_digest, vocabulary)
    with _making:
        if key not in _known:
            text = renderer.tokenizer.to_str()
            _known[key] = Lexicon(text, vocabulary, renderer.stop_ids)
            if len(_known) > _KEPT:
                _known.popitem(last=False)
        _known.move_to_end(key)
        return _known[key]
