"""A vocabulary as bytes: what each token says, and what a grammar can be matched against."""

import threading
from collections import OrderedDict
from collections.abc import Iterable

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from tunesmith.data.render import Renderer
from tunesmith.errors import BadRequestError

_KEPT = 4


class Lexicon:
    """Costs up to a second and some memory to make for a large vocabulary: `lexicon_of` keeps
    the last ones."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop_ids: Iterable[int]) -> None:
        ends = sorted(stop_ids) or [0]
        try:
            self.tokens = LLTokenizer(tokenizer.to_str(), n_vocab=vocabulary, eos_token=ends)
        except ValueError:  # a decoder that llguidance does not read
            spelt = TokenizerWrapper(_Spelt(tokenizer, ends[0]))
            self.tokens = _made(spelt, vocabulary, ends)
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


def _made(spelt: TokenizerWrapper, vocabulary: int, ends: list[int]) -> LLTokenizer:
    try:
        return LLTokenizer(spelt, n_vocab=vocabulary, eos_token=ends)
    except ValueError as error:
        raise BadRequestError(
            "formats, tools that must be called and log-probabilities are not served with this "
            f"model's tokenizer: {str(error)[:300]}",
            error_code="unsupported_parameter",
        ) from None


class _Spelt:
    """A vocabulary whose bytes are what the decoder adds for each token behind another one."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        ids = range(max(tokenizer.get_vocab().values(), default=-1) + 1)
        anchor = next((id_ for id_ in ids if id_ not in added), 0)
        before = tokenizer.decode([anchor], skip_special_tokens=False)
        pairs = [[anchor, id_] for id_ in ids]
        both = tokenizer.decode_batch(pairs, skip_special_tokens=False)
        texts = [text[len(before) :] for text in both]
        named = [added[id_].content if id_ in added else texts[id_] for id_ in ids]
        self.tokens = [(text or f"<[{id_}]>").encode() for id_, text in enumerate(named)]
        self.special_token_ids = [
            id_ for id_ in ids if not texts[id_] or (id_ in added and added[id_].special)
        ]
        self.eos_token_id, self.bos_token_id = end, None

        self._ids = {each: id_ for id_, each in enumerate(self.tokens) if id_ not in added}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that stands behind another: with no blank put before it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        wanted = text.encode()
        return ids if b"".join(self.tokens[id_] for id_ in ids) == wanted else self._greedy(wanted)

    def _greedy(self, text: bytes) -> list[int]:
        ids: list[int] = []
        while text:
            sizes = range(min(self._longest, len(text)), 0, -1)
            size = next((n for n in sizes if text[:n] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[text[:size]])
            text = text[size:]
        return ids


_known: OrderedDict[tuple[str, int], Lexicon] = OrderedDict()
_making = threading.Lock()


def lexicon_of(renderer: Renderer, vocabulary: int) -> Lexicon:
    """Made once for models that read and write alike. Slow: call it off the event loop.

    `vocabulary` is the width of the model's logits, which may be more than the tokenizer has.
    """
    key = (renderer.tokenizer_digest, vocabulary)
    with _making:
        if key not in _known:
            _known[key] = Lexicon(renderer.tokenizer, vocabulary, renderer.stop_ids)
            if len(_known) > _KEPT:
                _known.popitem(last=False)
        _known.move_to_end(key)
        return _known[key]
