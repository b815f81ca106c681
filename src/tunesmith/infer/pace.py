"""How much of a prompt goes beside the others' next tokens: plain Python, no torch.

Sarathi-Serve (Agrawal et al., OSDI 2024, section 4.2) takes a fixed budget from a profile of the
machine; here it is found while serving, since models and machines differ by orders of magnitude.
"""

LEAST = 8
"""Tokens, so that a prompt always moves on."""
_STRETCH = 1.6
"""A step with a part of a prompt in it takes at most so many times as long as one without."""
_NEWS = 0.25
"""Weight of the last step in what is known."""
_BAD_NEWS = 0.75
"""Its weight where prompts cost more than was thought: longer ones do."""


class Pace:
    def __init__(self, first: int, most: int) -> None:
        """Tokens while it is not known what one costs, and at most. Before that a step with next to
        no prompt in it is waited for."""
        self._first, self._most = first, most
        self._plain: float | None = None
        """Seconds of a step without prompts."""
        self._token: float | None = None
        """Seconds that a token of a prompt adds."""

    def note(self, prompt_tokens: int, seconds: float) -> None:
        """A step in which somebody got a next token."""
        if not prompt_tokens or (self._plain is None and prompt_tokens <= LEAST):
            self._plain = _mixed(self._plain, seconds)
        elif self._plain is not None:
            token = max(seconds - self._plain, 0.0) / prompt_tokens
            is_worse = self._token is not None and token > self._token
            self._token = _mixed(self._token, token, _BAD_NEWS if is_worse else _NEWS)

    def tokens(self) -> int:
        """Of prompts, for the next step."""
        if self._plain is None:
            return LEAST
        if self._token is None:
            return min(self._first, self._most)
        if self._token * self._most <= (_STRETCH - 1) * self._plain:
            return self._most
        return max(LEAST, int((_STRETCH - 1) * self._plain / self._token))


def _mixed(known: float | None, news: float, weight: float = _NEWS) -> float:
    return news if known is None else known + weight * (news - known)
