"""Text as it may be shown: whole characters, and nothing that may turn out to begin a stop string."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of tokens into text, and holds back what is not sure yet.

    Args:
        stop_strings: Texts that end the stream; neither they nor what follows come out.
    """

    def __init__(self, stop_strings: Sequence[str] = ()) -> None:
        self._stop_strings = stop_strings
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Take bytes and return the text that is now sure; see `stopped` for whether a stop string was met."""
        return self._released(self._decoder.decode(data), last=False)

    def finish(self) -> str:
        """Return what was held back; bytes of an unfinished character become U+FFFD."""
        return self._released(self._decoder.decode(b"", final=True), last=True)

    def _released(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        # The one that ends first: so the text is the same whether it comes letter by letter or in long pieces.
        ends = [(place + len(stop), place) for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)[1]]
        keep = 0 if last else self._may_begin_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _may_begin_a_stop(self, text: str) -> int:
        """Return the length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_strings):
                return length
        return 0
