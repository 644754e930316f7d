"""Run one function in a process of its own and hear its progress."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

from pipeline.errors import EngineError
from pipeline.types import Progress

R = TypeVar("R")
_POLL_SECONDS = 0.02

_connection: list[Connection] = []


def in_child(function: Callable[..., R], *arguments: object, progress: Progress, crashed: EngineError) -> R:
    """Return what ``function(*arguments)`` returns, run in a new Python process.

    The process starts afresh (no fork: CUDA and TensorRT hold threads). Inside it :func:`report` reaches ``progress``.

    Args:
        function: Importable by name; arguments and result are pickled.
        arguments: Passed on.
        progress: Called here with what the child reports.
        crashed: Raised if the process dies.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    try:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_connect, initargs=(sender,)) as pool:
            future = pool.submit(function, *arguments)
            while not future.done() or receiver.poll():
                if receiver.poll(_POLL_SECONDS):
                    progress(*receiver.recv())
            return future.result()
    except BrokenProcessPool as error:
        raise crashed from error
    finally:
        receiver.close()
        sender.close()


def report(stage: str, done: int, total: int) -> None:
    """Tell the parent how far this process is: a :class:`pipeline.types.Progress`."""
    if _connection:
        _connection[0].send((stage, done, total))


def _connect(sender: Connection) -> None:
    _connection.append(sender)
