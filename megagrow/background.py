"""Background threads whose failures are always reported; megagrow starts no thread elsewhere.

When an exception kills a thread, the program keeps running without the thread's work: a watchdog
stops watching, output is no longer forwarded. So a `Loop` reports every exception of a turn and
continues with the next one, and a `Task` or a `Pool` re-raises it in the thread that asks for the
result. Reports go to stderr and to the sinks of `also_reporting_to`, such as a rank's own log.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from typing import Generic, TypeVar

from megagrow.errors import MegagrowError

S = TypeVar("S")
T = TypeVar("T")

_sinks: list[Callable[[str], object]] = []


@contextlib.contextmanager
def also_reporting_to(sink: Callable[[str], object]) -> Iterator[None]:
    """Context manager: send this process's reports to `sink` as well."""
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.remove(sink)


def report(who: str, error: BaseException, *, then: str = "it continues", times: int = 1) -> None:
    """Report an exception of a background thread; never raises.

    A defect is reported with its traceback, a system or user error in one line.

    Args:
        who: the thread and what it was doing.
        then: what happens next.
        times: how often this error has occurred so far.
    """
    often = f" (for the {times}th time)" if times > 1 else ""
    with contextlib.suppress(Exception):
        trace = "".join(traceback.format_exception(error)).rstrip()
        if isinstance(error, (OSError, MegagrowError)):
            trace = f"  found:    {error}"
        text = f"error in the background: {who} failed{often}; {then}\n{trace}"
        for sink in (_to_stderr, *_sinks):
            # A sink that cannot be written must not keep the report from the others.
            with contextlib.suppress(Exception):
                sink(text)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Faults:
    """Reports the errors of one thread: each error the 1st, 10th, 100th, ... time.

    Args:
        who: a description of the thread.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._times: Counter[tuple[str, str, int | None]] = Counter()

    def note(self, error: BaseException, *, doing: str = "") -> None:
        """Report an error, unless it has occurred before and the count is not a power of ten."""
        last = traceback.extract_tb(error.__traceback__)[-1:]
        place = (last[0].filename, last[0].lineno) if last else ("", None)
        key = (type(error).__name__, *place)
        self._times[key] += 1
        times = self._times[key]
        if set(str(times)[1:]) <= {"0"} and str(times)[0] == "1":
            report(f"{self._who}{doing and ', '}{doing}", error, times=times)

    @contextlib.contextmanager
    def reported(self, doing: str) -> Iterator[None]:
        """Context manager: report an exception of the block and continue after it."""
        try:
            yield
        except SystemExit:
            raise  # the thread must end
        except BaseException as error:
            self.note(error, doing=doing)


class Loop:
    """A daemon thread that calls `turn` repeatedly, even if a turn fails.

    Args:
        name: of the thread.
        turn: returns True when there is nothing left to do; after any other value, or an exception
            (which is reported), it is called again.
        every: seconds between turns, and before the first one.
    """

    def __init__(self, name: str, turn: Callable[[], object], *, every: float) -> None:
        self._turn, self._every = turn, every
        self._stopping = threading.Event()
        self._who = f"the thread {name}"
        self.faults = Faults(self._who)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start."""
        self._thread.start()

    def stop(self, *, timeout: float | None = None) -> None:
        """Stop after the current turn; wait for it at most so many seconds."""
        self._stopping.set()
        if self._thread.ident is not None and not self.is_current():
            self._thread.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the last turn, with a timeout in seconds."""
        self._thread.join(timeout)

    def is_alive(self) -> bool:
        """Whether it is running."""
        return self._thread.is_alive()

    def is_current(self) -> bool:
        """Whether the calling thread is this one."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        while not self._stopping.wait(self._every):
            try:
                if self._turn() is True:
                    return
            except SystemExit as error:
                report(self._who, error, then="it was asked to stop, and stops")
                return
            except BaseException as error:
                self.faults.note(error)
                # A turn that fails immediately must not keep a core busy.
                self._stopping.wait(max(0.0, 0.05 - self._every))


class Task(Generic[T]):
    """One job in its own daemon thread, whose result or error is collected later.

    Args:
        name: of the thread.
        work: the function to call.
    """

    def __init__(self, name: str, work: Callable[[], T]) -> None:
        self._name, self._future = name, Future[T]()
        self._asked = False
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether it has ended, with a result or an error."""
        return self._future.done()

    def wait(self, timeout: float) -> bool:
        """Wait for its end, with a timeout in seconds; returns whether it has ended."""
        return bool(wait([self._future], timeout).done)

    def result(self) -> T:
        """Wait for the result; raises the error of `work`."""
        self._asked = True
        return self._future.result()

    def close(self) -> None:
        """Wait for the end, and report an error that nobody has collected."""
        error = self._future.exception()
        if error is not None and not self._asked:
            self._asked = True
            report(f"the thread {self._name}", error, then="nobody waited for its result")

    def _run(self, work: Callable[[], T]) -> None:
        try:
            result = work()
        except BaseException as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(result)


class Pool:
    """A thread pool; a context manager.

    The first error is raised where results are collected, and ends the work. Other errors are then
    reported, except those that a user can fix: they follow from the first, or occur again once it
    is fixed.

    Args:
        threads: how many.
        name: prefix of their names.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._name = name
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def each(
        self,
        work: Callable[[S], T],
        items: Iterable[S],
        *,
        on_error: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[S, T]]:
        """Yield (item, result) for each item, in the order of completion.

        Args:
            work: called in a thread.
            items: consumed immediately.
            on_error: called after the first error, to stop running work sooner.

        Raises:
            Exception: the first error, after all running work has ended.
        """
        waiting = {self._threads.submit(work, item): item for item in items}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException as error:
            on_error()
            self._threads.shutdown(cancel_futures=True)
            self._report_others(waiting, error)
            raise

    def map(self, work: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """Yield the result of each item, in order.

        Raises:
            Exception: as `each`.
        """
        pieces = list(items)
        found = dict(self.each(lambda number: work(pieces[number]), range(len(pieces))))
        return [found[number] for number in range(len(pieces))]

    def _report_others(self, futures: Iterable[Future[T]], first: BaseException) -> None:
        for future in futures:
            error = None if future.cancelled() else future.exception()
            if error is not None and error is not first and not isinstance(error, MegagrowError):
                report(f"a thread of {self._name}", error, then="another had failed before it")


def be_a_worker() -> None:
    """Set up a pool's worker process: it ends with its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Loop("end with parent", _end_with_parent, every=0.0).start()


def _end_with_parent() -> bool:
    # Otherwise a pool's workers would outlive a killed parent and wait forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
    return True
