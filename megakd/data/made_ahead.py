"""Values that a background thread makes ahead of their use, in order."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

T = TypeVar("T")


def made_ahead(tasks: Iterable[Callable[[], T]], ahead: int) -> Generator[Future[T], None, None]:
    """Yield the result of each task, in order, while a thread runs the next `ahead` tasks.

    The thread ends with the generator, even if the consumer stops early. An error of a task is
    raised by the result of its future.

    Args:
        tasks: functions that run one after the other in the thread; may be without end.
        ahead: number of tasks that are started before the result of a task is asked for.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader")
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(executor.submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        executor.shutdown(cancel_futures=True)
