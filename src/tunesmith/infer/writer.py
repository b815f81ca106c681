"""One sequence's tokens to text: whole characters, up to a stop string, and where each begins."""

from collections.abc import Mapping

from tokenizers import Tokenizer

from tunesmith.infer.detokenize import Detokenizer, StopWatch
from tunesmith.infer.logprobs import Said
from tunesmith.infer.sequence import Token
from tunesmith.spec.chat import Delta, Sampling


class Writer:
    def __init__(
        self, tokenizer: Tokenizer, sampling: Sampling, marks: Mapping[int, str] | None = None
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._marks = marks or {}
        """Special tokens that are shown, and their texts."""
        self._watch = StopWatch(sampling.stop)
        self._unwatched = sampling.min_tokens
        """Tokens that come whatever they say."""
        self._told = 0
        """Characters that the detokenizer has given, of which `_shown` were let through."""
        self._shown = 0
        self._said: list[Said] = []

    def write(self, token: Token) -> tuple[Delta, tuple[Said, ...]]:
        """The text that is certain now, and the tokens whose text begins in it; those only where
        log-probabilities were asked for."""
        text = self._spell(token)
        text, is_cut = self._watched(text, token)
        self._shown += len(text)
        finish = "stop" if is_cut else token.finish
        said = self._release(is_whole=finish is not None and not is_cut) if self._said else ()
        return Delta(text=text, token_id=token.id, finish=finish), said

    def _spell(self, token: Token) -> str:
        text = ""
        if token.id is not None and not token.is_end:
            if token.score is not None:
                self._said.append(Said(token.id, self._told, token.score))
            text = self._spell_one(token.id)
        if token.finish is not None:
            text += self._detokenizer.flush()
        self._told += len(text)
        return text

    def _spell_one(self, id_: int) -> str:
        if id_ in self._marks:
            return self._detokenizer.flush() + self._marks[id_]
        return self._detokenizer.push(id_)

    def _watched(self, text: str, token: Token) -> tuple[str, bool]:
        """What may be shown of it, and whether a stop string cut it short."""
        self._unwatched -= 1
        if self._unwatched >= 0 and token.finish is None:
            return text, False
        text, is_cut = self._watch.push(text)
        if token.finish is not None and not is_cut:
            text += self._watch.flush()
        return text, is_cut

    def _release(self, is_whole: bool) -> tuple[Said, ...]:
        shown = tuple(each for each in self._said if is_whole or each.offset < self._shown)
        self._said = self._said[len(shown) :]
        return shown
