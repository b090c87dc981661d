"""Stop sequences: text at which an answer ends, wherever its tokens are cut."""

from collections.abc import Sequence

from flashmoe_lab.chat.parser import Event, Text


class StopText:
    """Lets text through up to the stop sequence that is complete first, which is left out.

    Attributes:
        found: whether one has come; nothing is let through any more.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        if "" in sequences:
            raise ValueError("a stop sequence is empty; it would end every answer at once")
        self._sequences = tuple(sequences)
        self._held = ""  # may begin a sequence
        self.found = False

    def feed(self, piece: str) -> str:
        """What has become certain to be before any stop sequence."""
        text, self._held = "" if self.found else self._held + piece, ""
        found = [(text.find(each) + len(each), text.find(each)) for each in self._sequences]
        if complete := [(end, start) for end, start in found if start >= 0]:
            self.found = True
            return text[: min(complete)[1]]
        end = len(text) - max((_begun(text, each) for each in self._sequences), default=0)
        self._held = text[end:]
        return text[:end]

    def rest(self) -> str:
        """What was held back of an answer that is over."""
        held, self._held = self._held, ""
        return held


def until(stops: StopText, events: Sequence[Event], last: bool = False) -> list[Event]:
    """The events of an answer as far as no stop sequence comes in its text; thinking and calls are
    not searched.

    Args:
        last: let go of what may have begun one.
    """
    made: list[Event] = []
    for event in events:
        if stops.found:
            return made
        searched = isinstance(event, Text) and not event.warning
        if text := stops.feed(event.text) if searched else stops.rest():
            made.append(Text(text=text))
        if not searched:
            made.append(event)
    if last and (text := stops.rest()):
        made.append(Text(text=text))
    return made


def _begun(text: str, sequence: str) -> int:
    """How many characters of the sequence the text may end with."""
    most = min(len(text), len(sequence) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(sequence[:n])), 0)
