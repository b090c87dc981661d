"""A run without an engine: a thread that puts responses, and all ways of taking them."""

import asyncio
import threading

import pytest

from flashmoe_lab.run import Run
from tests.saying import response


class Producer:
    """Puts a, b, c, ... from a thread of its own; after each, until it is told to go on, it
    waits."""

    def __init__(self, count=3, error=None, stepwise=False, patience=30):
        self.count, self.error, self.patience = count, error, patience
        self.go = threading.Semaphore(0 if stepwise else 10**6)
        self.starts, self.gave_up = 0, False
        self.run = Run(self.start)

    def start(self, run):
        self.starts += 1
        self.thread = threading.Thread(target=self.work, args=(run,))
        self.thread.start()

    def work(self, run):
        for i in range(self.count):
            if run.stopped:
                break
            last = i == self.count - 1 and not self.error
            run.put(response(ord("a") + i % 26, "length" if last else None))
            if not self.go.acquire(timeout=self.patience):
                self.gave_up = True
                break
        if self.error:
            run.put(self.error)
        run.end()


def take_all(run):
    return [item.text for item in run]


def take_all_async(run):
    async def main():
        return [item.text async for item in run]

    return asyncio.run(main())


both_ways = pytest.mark.parametrize("take", [take_all, take_all_async])


@both_ways
def test_everything_arrives_in_order(take):
    run = Producer(20).run
    assert take(run) == [chr(ord("a") + i) for i in range(20)]
    assert (run.text, run.finish_reason) == ("abcdefghijklmnopqrst", "length")
    assert run.tokens == list(range(ord("a"), ord("a") + 20))
    assert run.done


@both_ways
def test_nothing_starts_before_the_first_iteration(take):
    producer = Producer()
    assert (producer.starts, producer.run.done) == (0, False)
    iter(producer.run)
    assert producer.starts == 0
    take(producer.run)
    assert producer.starts == 1


@both_ways
def test_run_of_no_tokens(take):
    run = Producer(0).run
    assert (take(run), run.text, run.tokens, run.finish_reason) == ([], "", [], None)


@both_ways
def test_iterated_twice(take):
    producer = Producer()
    take(producer.run)
    with pytest.raises(RuntimeError, match="iterated once; ask the engine for another"):
        take(producer.run)
    assert producer.starts == 1


@both_ways
def test_error_comes_after_the_tokens_before_it(take):
    run = Producer(2, error=ZeroDivisionError("in the engine")).run
    with pytest.raises(ZeroDivisionError, match="in the engine"):
        take(run)
    assert (run.text, run.done, run.finish_reason) == ("ab", True, None)


def test_wait():
    run = Producer(3).run
    assert run.wait() is run
    assert run.text == "abc"


def test_first_token_arrives_before_the_run_is_done():
    producer = Producer(3, stepwise=True)
    for item in producer.run:
        assert not producer.run.done
        assert producer.run.text[-1] == item.text
        producer.go.release()
    assert producer.run.done


def test_first_token_arrives_before_the_run_is_done_async():
    async def main():
        producer = Producer(3, stepwise=True)
        async for _ in producer.run:
            assert not producer.run.done
            producer.go.release()
        assert producer.run.done

    asyncio.run(main())


def test_waiting_leaves_the_event_loop_free():
    producer, others = Producer(3, stepwise=True), []

    async def other():
        for _ in range(3):
            others.append(len(producer.run.tokens))
            producer.go.release()
            await asyncio.sleep(0)

    async def main():
        async def consume():
            return [item.text async for item in producer.run]

        return (await asyncio.gather(consume(), other()))[0]

    assert asyncio.run(main()) == ["a", "b", "c"]
    assert len(others) == 3


def test_break_stops_and_waits():
    producer = Producer(10**5)
    for item in producer.run:
        if item.text == "c":
            break
    assert producer.run.stopped and producer.run.done
    assert producer.run.text == "abc"
    producer.thread.join(30)
    assert not producer.thread.is_alive()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_error_in_the_loop_stops_and_waits(error):
    producer = Producer(10**5)
    with pytest.raises(error):
        for _ in producer.run:
            raise error
    assert producer.run.stopped and producer.run.done


def test_break_stops_async():
    producer = Producer(10**5)

    async def main():
        async for _ in producer.run:
            break

    asyncio.run(main())
    assert producer.run.stopped and producer.run.done


def test_cancelled_task_stops():
    producer = Producer(10**5)

    async def main():
        started = asyncio.Event()

        async def consume():
            async for _ in producer.run:
                started.set()
                await asyncio.sleep(0)

        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert producer.run.stopped and producer.run.done


def test_leaving_does_not_hold_up_the_event_loop():
    """A server's other requests go on while the engine finishes its token."""
    producer = Producer(3, stepwise=True, patience=5)

    async def main():
        started = asyncio.Event()

        async def consume():
            async for _ in producer.run:
                started.set()

        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        await asyncio.sleep(0)
        producer.go.release()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert producer.run.done and not producer.gave_up


@both_ways
def test_stop_before_the_start(take):
    producer = Producer(5)
    producer.run.stop()
    assert take(producer.run) == []
    assert producer.run.done


def test_stop_from_another_thread():
    producer = Producer(10, stepwise=True)
    for item in producer.run:
        if item.text == "b":
            stopper = threading.Thread(target=producer.run.stop)
            stopper.start()
            stopper.join()
        producer.go.release()
    assert (producer.run.text, producer.run.done) == ("ab", True)


def test_start_that_fails():
    def start(run):
        raise RuntimeError("the engine was closed")

    with pytest.raises(RuntimeError, match="the engine was closed"):
        Run(start).wait()


def test_card_is_escaped():
    run = Run(lambda run: None)
    run.text = "<b>&"
    assert "&lt;b&gt;&amp;" in run._repr_html_()
