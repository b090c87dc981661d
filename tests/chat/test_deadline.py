"""Work that ends, fails, or has to be stopped."""

import contextlib
import threading
import time

import pytest

from flashmoe_lab.chat.deadline import within


def endless() -> None:
    while True:
        pass


def stubborn() -> None:
    """Swallows the first attempt to stop it."""
    try:
        endless()
    except BaseException:
        endless()


def running() -> int:
    return sum(thread.name == "flashmoe-template" for thread in threading.enumerate())


def test_gives_what_the_work_gives():
    assert within(5, lambda: 7) == 7
    assert within(5, lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)


@pytest.mark.parametrize("work", [endless, stubborn])
def test_stops_what_does_not_end_and_leaves_no_thread(work):
    with pytest.raises(TimeoutError):
        within(0.05, work)
    for _ in range(100):
        if not running():
            return
        time.sleep(0.02)
    pytest.fail("the thread is still there")


def test_the_deadline_may_fall_on_the_end():
    # Whatever comes first, there is a result or a TimeoutError, and no exception goes astray.
    for number in range(200):
        with contextlib.suppress(TimeoutError):
            assert within(0.0002, lambda n=number: sum(range(n * 60))) >= 0
