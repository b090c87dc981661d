"""Landing: reads of experts under way into the bank, and what becomes of them."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar

from flashmoe_lab.storage.bank import Placement
from flashmoe_lab.storage.reader import Pending, ReadRecords

if TYPE_CHECKING:
    from flashmoe_lab.stages.expert_fetch import ExpertFetch

T = TypeVar("T")


class Landing:
    """The reads of one placement, under way into its slots.

    `parts` gives what has come while the rest is still being read; `finish` waits for all. What
    fails is forgotten by the bank, and the error is raised to whoever asks for the experts.

    Attributes:
        records: what was read, once all has come well.
        keys: (layer, expert) of what is read.
        is_ahead: whether it was begun before the router had spoken.
        cached: where the bytes were, as whoever records the run found before; of reads ahead.
        wait_start_ns, waited_ns: when somebody first waited here for reads (0: nobody yet), and for
            how long in all.
    """

    def __init__(
        self,
        fetch: "ExpertFetch",
        placement: Placement,
        pending: Pending,
        is_ahead: bool = False,
        cached: Any = None,
    ) -> None:
        self.fetch, self.placement = fetch, placement
        self.is_ahead, self.cached = is_ahead, cached
        self.keys = frozenset((placement.layer, expert) for expert in placement.misses)
        self.records: ReadRecords | None = None
        self.wait_start_ns = self.waited_ns = 0
        self._pending = pending
        self._error: BaseException | None = None

    def finish(self) -> ReadRecords:
        """Wait for every read; their records.

        Raises:
            ReadError: a block could not be read whole.
            ValueError: a block has not the checksum that it should have.
        """
        if self._error is not None:
            raise self._error
        if self.records is None:
            try:
                records = self._waited(self._pending.wait)
                self.fetch.verify(self.placement)
                self.records = self.fetch.count(records)
            except BaseException as error:
                end(self._pending)
                self._error = error
                self.fetch.give_up(self.placement)
                raise
        return self.records

    def settle(self) -> None:
        """Wait for every read, and leave an error to the one who finishes."""
        if self._error is None:
            with suppress(OSError, ValueError):
                self.finish()

    def parts(self) -> Iterator[Placement]:
        """The misses of the placement in parts, as they come."""
        slots, misses = self.placement.slots, self.placement.misses
        verifies = self.fetch.verifies  # no longer, once the last of its blocks was checked
        if not verifies:
            landed = self._pending.landed(self.fetch.landing_blocks)
            while numbers := self._waited(lambda: next(landed, None)):
                came = tuple(misses[number] for number in sorted(numbers))
                yield Placement(
                    layer=self.placement.layer, slots={e: slots[e] for e in came}, misses=came
                )
        self.finish()
        if verifies:
            yield replace(self.placement, slots={expert: slots[expert] for expert in misses})

    @property
    def has_ended(self) -> bool:
        """Whether finishing waits for nothing."""
        return self.records is not None or self._pending.done

    def _waited(self, wait: Callable[[], T]) -> T:
        start = perf_counter_ns()
        try:
            return wait()
        finally:
            self.wait_start_ns = self.wait_start_ns or start
            self.waited_ns += perf_counter_ns() - start


def end(pending: Pending) -> None:
    """Wait until no thread writes into the slots any more, however often Ctrl-C is pressed: only
    then may others have them."""
    while True:
        try:
            pending.wait()
        except KeyboardInterrupt:
            continue
        except Exception:  # its owner has it already
            return
        return
