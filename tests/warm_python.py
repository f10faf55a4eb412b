"""A Python that has imported already: for tests that start commands of the project in processes of their own.

    warm_python.py serve NUMBER         fork for every call at the listening socket of that number, until standard input ends
    warm_python.py ask SOCKET WORDS     `python WORDS`, where WORDS are `FILE ...` or `-m MODULE ...` (a `-u` before is skipped)

A process that trains takes its nine seconds of a core to import PyTorch, transformers, PEFT and TRL before its first line. The
server does that once, at its first call, and forks: the new process has the caller's folder, environment, arguments and open
streams, runs as `__main__`, gets the signals that the caller gets, and its exit status or signal is the caller's.

What is set by the environment of an import (`HF_HOME`, `PYTHONHASHSEED`), or is about imports themselves, needs a real Python;
so does what is killed from outside by its own id.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys

PRELOAD = [
    "torch.distributed.run",
    "accelerate.commands.launch",
    "datasets",
    "prefalign.cli",
    "prefalign.engines.transformers",
    "prefalign.training.preference",
    "prefalign.online.ppo",
    "transformers.models.idefics3.modeling_idefics3",
    "transformers.models.llava.modeling_llava",
]


def serve(number: int) -> None:
    """Answer calls, each in a process of its own, until nobody holds the other end of standard input."""
    with socket.socket(fileno=number) as listener:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the callers' to pass on
        answering: list[int] = []
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            preload()
            answering = [child for child in answering if not os.waitpid(child, os.WNOHANG)[0]]
            answering.append(os.fork())
            if answering[-1] == 0:
                listener.close()
                answer(connection)
            connection.close()
        for child in answering:
            os.waitpid(child, 0)


def preload() -> None:
    """Import what most commands import (nothing the second time)."""
    import gc
    import importlib
    import logging

    logging.disable()  # what packages say about themselves
    for name in PRELOAD:
        importlib.import_module(name)
    logging.disable(logging.NOTSET)
    gc.freeze()


def answer(connection: socket.socket) -> None:
    """Run what is asked for in a child, pass signals on (kill -9 when the caller is gone), and say how it ended."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("r", encoding="utf-8") as lines:
        asked = json.loads(lines.readline())
    child = os.fork()
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # in both, since either may be first
    if child == 0:
        connection.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        run(**asked)
    ended, status = 0, 0
    while not ended:
        if select.select([connection], [], [], 0.005)[0]:
            received = connection.recv(1)
            os.kill(child, received[0]) if received else os.killpg(child, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(BrokenPipeError):  # the caller was killed
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be `python WORDS`."""
    import atexit
    import threading
    import traceback

    known = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-u":
        words = words[1:]
    module = words[0] == "-m"
    first = folder if module else os.path.dirname(os.path.abspath(words[0]))
    wanted = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [first, *wanted, *(entry for entry in sys.path[1:] if entry not in known)]
    sys.argv = words[1:] if module else words
    sys.stdout.reconfigure(line_buffering=True)
    code: object = 0
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # as Python itself: what nobody caught is printed
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    try:
        threading._shutdown()  # waits for threads, however the main one ended
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def ask(path: str, words: list[str]) -> None:
    """Have a process run in this one's place, and end as it ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"x"], [0, 1, 2])
        asked = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
        connection.sendall(json.dumps(asked).encode() + b"\n")
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        with connection.makefile("r", encoding="utf-8") as lines:
            code = int(lines.readline() or "1")
    if code < 0:
        with contextlib.suppress(OSError):  # there is nothing to restore for SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        ask(sys.argv[2], sys.argv[3:])
