"""What callbacks want done is done once each, the latest last, and threads end."""

import threading

from flashmoe_lab.widgets.worker import Worker


def test_of_what_waits_only_the_latest_is_done():
    done, begun, go = [], threading.Event(), threading.Event()
    worker = Worker("tested", lambda error: done.append(error))

    def first():
        begun.set()
        go.wait(30)
        done.append("first")

    worker.do(first)
    begun.wait(30)
    for name in ("passed over", "latest"):
        worker.do(lambda name=name: done.append(name))
    go.set()
    worker.wait()
    assert done == ["first", "latest"]
    assert not any(thread.name == "tested" for thread in threading.enumerate())


def test_what_is_of_another_kind_is_done_too_in_its_order():
    done, begun, go = [], threading.Event(), threading.Event()
    worker = Worker("tested", lambda error: done.append(error))

    def first():
        begun.set()
        go.wait(30)

    worker.do(first)
    begun.wait(30)
    for name, kind in (("old text", "read"), ("text", "read"), ("place", ""), ("other place", "")):
        worker.do(lambda name=name: done.append(name), kind)
    go.set()
    worker.wait()
    assert done == ["text", "other place"]


def test_an_error_is_told_and_ends_nothing():
    told, done = list[BaseException](), []
    worker = Worker("tested", told.append)
    worker.do(lambda: 1 / 0)  # pyright: ignore
    worker.wait()
    worker.do(lambda: done.append(1))
    worker.wait()
    assert isinstance(told[0], ZeroDivisionError) and done == [1]
