"""Requests to a server, several at once: answers are kept as they come, and Ctrl-C says what it waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from prefalign.engines.server import RequestFailed, Server

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


def ask_all(
    keys: Iterable[str],
    ask: Callable[[str], Answer],
    keep: Callable[[Sequence[tuple[str, Answer | str | BaseException]]], None],
    server: Server,
) -> dict[str, Answer | str]:
    """Ask for each key, `server.settings.concurrency` at once.

    The threads are daemons: a second Ctrl-C, or the end of the program, waits for no server.

    Args:
        keys: what to ask for, in the order in which it is sent.
        ask: gives the answer to one, in a thread.
        keep: is given what came, also where the call stops before all has come; in this thread.
        server: is told to stop when one error concerns all.

    Returns:
        By key the answer, or the message of its `RequestFailed`.

    Raises:
        Exception: whatever else `ask` raises. What is under way is waited for and kept first.
        KeyboardInterrupt: likewise; a second one gives up what is under way.
    """
    todo = deque(keys)
    said: list[
        tuple[str, Answer | str | BaseException]
    ] = []  # nothing is taken out, so that an interrupt can lose nothing
    arrived = threading.Event()
    found: dict[str, Answer | str] = {}
    count = len(todo)
    seen = 0

    def work() -> None:
        while todo:
            try:
                key = todo.popleft()
            except IndexError:  # another thread took the last
                return
            try:
                said.append((key, ask(key)))
            except RequestFailed as error:
                said.append((key, str(error)))
            except BaseException as error:
                server.stop()
                said.append((key, error))
            arrived.set()

    server.open()
    threads = [
        threading.Thread(target=work, name=f"server-{number}", daemon=True)
        for number in range(min(server.settings.concurrency, count))
    ]
    try:
        for thread in threads:
            thread.start()
        while seen < count:
            arrived.wait()
            arrived.clear()
            came = said[seen:]
            keep(came)
            for key, answer in came:
                if isinstance(answer, BaseException):
                    raise answer
                found[key] = answer
            seen += len(came)
    finally:
        server.stop()
        todo.clear()
        try:
            _wait([thread for thread in threads if thread.is_alive()], server)
        finally:
            keep(said[seen:])
    return found


def _wait(threads: Sequence[threading.Thread], server: Server) -> None:
    """Wait for what is under way, since it is paid for; an interrupt meanwhile, or the end of its time, gives it up."""
    try:
        soon = time.monotonic() + 0.3  # idle threads, and those that were to try again, end by themselves
        for thread in threads:
            thread.join(max(0.0, soon - time.monotonic()))
        if busy := [thread for thread in threads if thread.is_alive()]:
            logger.warning(
                "waiting for %d answers under way, at most %g s; Ctrl-C again leaves them",
                len(busy), server.settings.timeout,
            )  # fmt: skip
        until = time.monotonic() + server.settings.timeout
        for thread in busy:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in busy):
            server.close()
    except KeyboardInterrupt:
        server.close()
        raise
