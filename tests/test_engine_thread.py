"""One thread, one thing after another, and nothing left behind."""

import gc
import threading
import weakref

import pytest

from flashmoe_lab.engine_thread import EngineThread


@pytest.fixture
def thread():
    thread = EngineThread()
    yield thread
    thread.close()


def test_everything_runs_in_one_other_thread(thread):
    idents = {thread.call(threading.get_ident) for _ in range(5)}
    assert len(idents) == 1 and threading.get_ident() not in idents


def test_one_after_another_in_order(thread):
    gate, done = threading.Event(), []
    thread.submit(lambda: gate.wait(30))
    futures = [thread.submit(lambda i=i: done.append(i)) for i in range(20)]
    assert done == [] and not futures[0].done()
    gate.set()
    futures[-1].result(30)
    assert done == list(range(20))


def test_call_from_inside_runs_at_once(thread):
    assert thread.call(lambda: thread.call(lambda: 5)) == 5


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_errors_reach_the_caller_and_end_nothing(thread, error):
    def fail():
        raise error("no")

    with pytest.raises(error, match="no"):
        thread.call(fail)
    assert thread.call(lambda: 1) == 1


def test_cancelled_work_is_not_done(thread):
    gate, done = threading.Event(), []
    thread.submit(lambda: gate.wait(30))
    assert thread.submit(lambda: done.append(1)).cancel()
    gate.set()
    thread.call(lambda: None)
    assert done == []


def test_close_finishes_what_is_queued():
    thread, done = EngineThread(), []
    for i in range(10):
        thread.submit(lambda i=i: done.append(i))
    thread.close()
    assert done == list(range(10))
    assert not thread._thread.is_alive()
    thread.close()  # a second time does nothing


def test_close_tells_what_is_under_way():
    thread = EngineThread()
    ended = thread.submit(lambda: thread._closing.wait(30) and thread.closing)
    assert not thread.closing
    thread.close()
    assert ended.result(0) is True


def test_closed_thread_refuses():
    thread = EngineThread()
    thread.close()
    for ask in (thread.submit, thread.call):
        with pytest.raises(RuntimeError, match="the engine was closed"):
            ask(lambda: 1)


def test_close_from_inside(thread):
    thread.call(thread.close)
    thread._thread.join(30)
    assert not thread._thread.is_alive()


def test_dropped_thread_ends():
    thread = EngineThread()
    worker = thread._thread
    thread.call(lambda: None)
    del thread
    gc.collect()
    worker.join(30)
    assert not worker.is_alive()


class Thing:
    pass


def test_results_are_not_kept(thread):
    thing = Thing()
    ref = weakref.ref(thing)
    thread.call(lambda thing=thing: thing)
    del thing
    thread.call(lambda: None)
    gc.collect()
    assert ref() is None
