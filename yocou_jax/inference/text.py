"""From new tokens to text that can be shown: complete characters, up to the first stop text."""

from collections.abc import Sequence

import numpy as np

from yocou_jax.data.tokenizer import Tokenizer


class TextRow:
    """The text of one row while its tokens come.

    text: what can be shown. Later calls of `add` only append to it. So it does not end with the
        first characters of a stop text, because the rest may still come.
    ended: whether the row is complete: after `limit` tokens, the end-of-text token or a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, stops: Sequence[str] = ()):
        self.tokenizer, self.limit, self.stops = tokenizer, limit, stops
        self.text, self.ended = "", False
        self._ids: list[int] = []
        self._settled = ""  # the text of the ids before `_next`
        self._context, self._next = 0, 0

    def add(self, tokens: np.ndarray) -> None:
        """Takes new tokens [steps], -1 after the end of the row."""
        if self.ended:
            return
        new = tokens[tokens >= 0].tolist()
        self._ids += new
        self.ended = (
            len(new) < len(tokens)
            or len(self._ids) >= self.limit
            or self._ids[-1] == self.tokenizer.eot_id
        )
        text = self._decoded()
        # `self.text` ends before any stop text, so the search starts after it.
        found = [text.find(stop, len(self.text)) for stop in self.stops]
        if any(at >= 0 for at in found):
            self.ended = True
            self.text = text[: min(at for at in found if at >= 0)]
        else:
            self.text = text if self.ended else self._without_beginnings(text)

    def _decoded(self) -> str:
        """The text of all ids. If more may come, a character that is not complete is left out."""
        before = self.tokenizer.decode(self._ids[self._context : self._next])
        text = self.tokenizer.decode(self._ids[self._context :])
        complete = text if self.ended else text.rstrip("\ufffd")
        decoded = self._settled + complete[len(before) :]
        if complete == text:
            # Some ids stay as context, because a decoder may treat the first id differently.
            self._settled = decoded
            self._context, self._next = self._next, len(self._ids)
        return decoded

    def _without_beginnings(self, text: str) -> str:
        """The text without its end, if this end may be the beginning of a stop text."""
        beginnings = {stop[:n] for stop in self.stops for n in range(1, len(stop))}
        for n in range(max(map(len, beginnings), default=0), 0, -1):
            if text.endswith(tuple(b for b in beginnings if len(b) == n)):
                return text[:-n]
        return text
