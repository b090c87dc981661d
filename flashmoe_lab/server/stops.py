"""Stop sequences: text at which an answer ends, also where it spreads over several tokens."""

from collections.abc import Sequence


class StopText:
    """Lets a text through up to the first of some sequences, which is not part of it.

    Attributes:
        found: whether one of them came.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = [sequence for sequence in sequences if sequence]
        self._held = ""  # may be the beginning of a sequence
        self.found = False

    def feed(self, text: str) -> str:
        """What of the text so far is certain to belong to the answer."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for s in self._sequences if (place := text.find(s)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_begun(text, sequence) for sequence in self._sequences), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, when the answer is over."""
        rest, self._held = self._held, ""
        return rest


def _begun(text: str, sequence: str) -> int:
    """How many characters at the end of a text begin the sequence."""
    for length in range(min(len(sequence) - 1, len(text)), 0, -1):
        if text.endswith(sequence[:length]):
            return length
    return 0
