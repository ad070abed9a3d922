"""A thread that runs the model on one batch while the next is prepared."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

__all__ = ["Background"]

T = TypeVar("T")


class Background:
    """A thread that does one thing after another while its owner goes on; both stop where either fails.

    Args:
        ahead: so many calls the owner does not wait for.
        elsewhere: so many cores are kept busy by others, the owner among them; torch uses the rest in the thread, as
            more threads than cores would wait for each other at every layer. 0: the calls wait for a GPU.
        helps: the owner, before it waits, does a call itself that the thread has not begun. That the result is the
            same to the bit, it does so only where the thread has one core as well.
    """

    def __init__(self, ahead: int, *, elsewhere: int = 0, helps: bool = False) -> None:
        self._ahead, self._cores = ahead, torch.get_num_threads()
        limit = max(1, self._cores - elsewhere)
        self._helps = helps and limit == 1
        self._waiting: deque[Future[Any]] = deque()
        self._calls: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()  # not begun
        self._thread = ThreadPoolExecutor(1, "embed", initializer=torch.set_num_threads, initargs=(limit,))

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have it done; raises what an earlier call raised."""
        while len(self._waiting) >= self._ahead:
            if self._helps:
                self._do_next()
            self._waiting.popleft().result()
        future: Future[T] = Future()
        self._waiting.append(future)
        self._calls.append((future, function, arguments))
        self._thread.submit(self._do_next)
        return future

    def _do_next(self) -> None:
        """Do the call that has waited longest, if there is one that nobody has begun."""
        try:
            future, function, arguments = self._calls.popleft()
        except IndexError:
            return
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)  # for whoever waits for it, maybe the other thread
            raise

    def __enter__(self) -> "Background":
        if self._helps:
            torch.set_num_threads(1)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            while self._waiting and error is None:
                self._waiting.popleft().result()
        finally:  # also where the owner is interrupted: what is under way ends, the rest is not begun
            for future in self._waiting:
                future.cancel()  # or one that the owner was about to begin would be waited for
            self._thread.shutdown(cancel_futures=True)
            torch.set_num_threads(self._cores)
