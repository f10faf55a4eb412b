"""Who works on the blocks of a stage: this process on all of them or on its shard, or actors that a driver hands them to.

A stage knows nothing of it. Its `main` loads a model and calls `store.run_stage`; what that does with the blocks is decided
here, by two context variables. `SHARD` says which blocks are this process's. `WORKER` is set where `main` runs in an actor:
there `run_stage` hands its job to the driver, then answers for the blocks that it is sent, and returns when the driver has
committed the last one. So only the driver reads rows and writes shards, and only actors load models.
"""

from __future__ import annotations

import queue
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from prefalign.config import ConfigError

HELP = """\
who works on the blocks (changes no row; docs/scale.md):
  --shard I/N            do the blocks I, I + N, I + 2N, ... of an output folder that N processes share; I from 0
  --executor EXECUTOR    local: this process (default); ray: actors of a Ray cluster
  --actors N             with ray: how many, each with a model of its own; as many as there are GPUs if left out, else 1
  --actor-gpus G         with ray: GPUs of each; 1 if left out and the cluster has GPUs, else 0
  --ray-address ADDRESS  with ray: a cluster that runs, `auto` for this machine's; if left out RAY_ADDRESS, else a new one"""
FLAGS = ("--shard", "--executor", "--actors", "--actor-gpus", "--ray-address")


class LeftToOthers(Exception):
    """This shard has done its blocks, and others are not done: there is no manifest yet. Not an error."""


@dataclass(frozen=True)
class Shard:
    """The blocks of one of `count` processes: those whose number is `number` modulo `count`. The default owns all.

    With `rest` it owns all too, and others may be at work on them: what a stage makes of its finished rows in a second folder is
    done by whoever has come to it.
    """

    number: int = 0
    count: int = 1
    rest: bool = False

    @property
    def alone(self) -> bool:
        """Whether no other process works on the same folder."""
        return self.count == 1

    def owns(self, block: int) -> bool:
        """Whether a block is this process's."""
        return self.rest or block % self.count == self.number


WHOLE = Shard()
SHARD: ContextVar[Shard] = ContextVar("shard", default=WHOLE)
SAMPLED: ContextVar[bool] = ContextVar("sampled", default=False)
"""Whether a stage runs on a few rows only to be measured (`planner`): what it says of them is no result, and is not printed."""


@contextmanager
def sharded(shard: Shard) -> Iterator[None]:
    """Within this context a stage's first `store.run_stage` does the blocks of a shard."""
    before = SHARD.set(shard)
    try:
        yield
    finally:
        SHARD.reset(before)


@dataclass(frozen=True)
class Options:
    """The options of `HELP`.

    Attributes:
        shard: which blocks this process does.
        executor: `local` or `ray`.
        actors: how many actors; None: one for each share of GPUs that the cluster has, else one.
        actor_gpus: GPUs of an actor; None: 1 where the cluster has some, else 0.
        ray_address: cluster to connect to; None: that of `RAY_ADDRESS`, or one that lives as long as this run.
    """

    shard: Shard = WHOLE
    executor: str = "local"
    actors: int | None = None
    actor_gpus: float | None = None
    ray_address: str | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing but what every stage can do is asked for."""
        return self == Options()


def take_options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options of `HELP` among the arguments of `prefalign run`, and the other arguments.

    Raises:
        ConfigError: an option has no value, or one that cannot be, or is given without `--executor ray`.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    pending = list(arguments)
    while pending:
        flag, equals, value = pending.pop(0).partition("=")
        if flag not in FLAGS:
            rest.append(flag + equals + value)
            continue
        if not equals and pending and not pending[0].startswith("--"):
            value = pending.pop(0)
        if not value:
            raise ConfigError(f"{flag} needs a value. {_help_line(flag)}")
        if flag in given:
            raise ConfigError(f"{flag} is given twice ({given[flag]} and {value}); only one can count.")
        given[flag] = value
    executor = given.get("--executor", "local")
    if executor not in ("local", "ray"):
        raise ConfigError(f"--executor {executor}: there are `local` and `ray`.")
    if executor == "ray" and "--shard" in given:
        raise ConfigError(
            "--shard and --executor ray are two ways to share out the same blocks (the first needs no Ray). Give one."
        )
    alien = [flag for flag in given if flag in FLAGS[2:]]
    if alien and executor != "ray":
        raise ConfigError(
            f"{alien[0]} says something of Ray's actors, and nothing asks for them. Add `--executor ray`."
        )
    actors = _number(given, "--actors", int, least=1)
    gpus = _number(given, "--actor-gpus", float, least=0)
    shard = _shard(given["--shard"]) if "--shard" in given else WHOLE
    return Options(shard, executor, None if actors is None else int(actors), gpus, given.get("--ray-address")), rest


def _shard(text: str) -> Shard:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(
            f"--shard {text}: give I/N with I from 0 to N - 1, as in `--shard 0/8` for the first of eight processes."
        )
    return Shard(int(found[1]), int(found[2]))


def _number(given: dict[str, str], flag: str, kind: type, *, least: float) -> float | None:
    if flag not in given:
        return None
    try:
        value: float = kind(given[flag])
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        raise ConfigError(f"{flag} {given[flag]}: give a number of at least {least}. {_help_line(flag)}")
    return value


def _help_line(flag: str) -> str:
    return next(line.split(maxsplit=2)[2] for line in HELP.splitlines() if line.strip().startswith(f"{flag} "))


@dataclass
class Ended:
    """How a stage's `main` ended.

    Attributes:
        result: what it returned.
        error: message of what it raised, or None.
        trace: where that came from.
        expected: whether the error is of a kind whose message says all (`ValueError` and other errors that stages raise).
        said: what it wrote to stderr after its blocks were done.
        node: the machine on which it raised.
    """

    result: Any = None
    error: str | None = None
    trace: str = ""
    expected: bool = True
    said: str = ""
    node: str = ""


@dataclass
class _Finish:
    manifest: Any


class StageWorker:
    """A stage's `main` in a thread of its own, whose blocks come from a driver.

    Args:
        main: the stage's; loads its model and calls `store.run_stage`, perhaps more than once.
        config: its config.
        shard: the part of passes over all inputs (`surveys.Survey`) that this worker does first.
    """

    def __init__(self, main: Callable[[Any], Any], config: Any, shard: Shard):
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(main, config, shard), daemon=True).start()

    def next_step(self) -> Any:
        """Wait for the job (`store.Job`) that `main` comes to, or its `Ended`."""
        return self._steps.get()

    def work(self, inputs: list[Any]) -> list[Any] | Ended:
        """One outcome for each input of a block; `Ended` if that raised."""
        self._asked.put(inputs)
        answer: list[Any] | Ended = self._answers.get()
        return answer

    def finish(self, manifest: Any) -> None:
        """Let `run_stage` return this manifest, so that `main` goes on."""
        self._asked.put(_Finish(manifest))

    def serve(self, job: Any, process: Callable[[list[Any]], Iterable[Any]]) -> Any:
        """What `run_stage` does in the worker's thread: hand over the job, answer for blocks, return the manifest."""
        self._steps.put(job)
        while not isinstance(asked := self._asked.get(), _Finish):
            try:
                self._answers.put(list(process(asked)))
            except BaseException as error:  # else the driver waits for ever; a panic in Rust is no Exception
                self._answers.put(ended(error))
                raise
        return asked.manifest

    def _run(self, main: Callable[[Any], Any], config: Any, shard: Shard) -> None:
        WORKER.set(self)
        with sharded(shard):
            try:
                end = Ended(main(config))
            except BaseException as error:  # SystemExit too: nobody else hears of it
                end = ended(error)
        self._steps.put(end)


WORKER: ContextVar[StageWorker | None] = ContextVar("worker", default=None)


def ended(error: BaseException) -> Ended:
    """The end that an exception, being handled, makes of a stage."""
    expected = isinstance(error, (ValueError, RuntimeError, OSError, ImportError, FloatingPointError))
    return Ended(
        error=str(error) or type(error).__name__,
        trace=traceback.format_exc(),
        expected=expected,
        node=socket.gethostname(),
    )
