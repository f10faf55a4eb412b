"""A stage over a Ray cluster: actors with a model each work on blocks, the driver reads rows and commits what comes back.

Plain actors and not `ray.data`: what Ray Data remembers of a run that was killed is whole input files or blocks of its own
making (its checkpoints are in beta), while `store` commits each block of `block_size` rows by itself and decides about duplicates
in the order of the inputs. With one writer that stays as it is, and rows do not depend on the number of actors or on who died.

An actor imports the stage by name and runs its `main` (`execution.StageWorker`); the driver loads no model. An actor that dies
is replaced by a new one, and what it had in hand is done again.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import socket
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from prefalign import bundled, folders, sources
from prefalign.execution import WHOLE, Ended, Options, Shard, StageWorker, ended
from prefalign.manifest import differences
from prefalign.store import Block, Job, Outcome, run_job

IN_HAND = 2  # blocks of an actor: one that it works on, one that waits
MOST_DEATHS = 4
_PATIENCE = 30.0  # seconds without an actor after which it is said what they wait for


class ExecutorError(RuntimeError):
    """The actors cannot do the work; the message is theirs where they have one."""


def run(name: str, config: Any, options: Options) -> Any:
    """Run a stage on actors.

    Args:
        name: bundled stage, or a file that every node sees.
        config: its resolved config. Data, output and model folders are seen by every node under the same paths.
        options: how many actors, with what, on which cluster.

    Returns:
        What the stage's `main` returned.

    Raises:
        ExecutorError: Ray is missing, the stage fails in an actor, actors differ in what they loaded, or keep dying.
        StoreError: as `store.run_stage` does.
        ValueError: the Hub does not tell which commit of the data set is meant.
    """
    ray = _import_ray()
    commit = sources.provenance(config.data).get("commit")
    with _cluster(ray, options) as (actors, gpus):
        crew = _Crew(ray, name, _at(config, commit), actors, gpus)
        try:
            while not isinstance(step := crew.next_step(), Ended):
                crew.finish(run_job(_as_asked(step, config, commit), crew.spread, WHOLE))
        finally:
            crew.dismiss()
    sys.stderr.write(step.said)
    return step.result


def _at(config: Any, commit: str | None) -> Any:
    """The config with its data at a commit: actors ask for the rows themselves, some later, when a branch may have moved."""
    return config if commit is None else replace(config, data=replace(config.data, revision=commit))


def _as_asked(job: Job, config: Any, commit: str | None) -> Job:
    """An actor's job with the revision that was asked for, so that the folder says the same as that of one process."""
    if commit is None or job.data.revision != commit:
        return job
    return replace(job, data=replace(job.data, revision=config.data.revision))


def connect(address: str, **settings: Any) -> Any:
    """The module `ray`, connected to a cluster; what Ray has to say of itself stays in its log files.

    Args:
        address: of a cluster that runs, or `local` for a new one.
        settings: of `ray.init`, for a new one.

    Raises:
        ExecutorError: Ray is not installed, or there is no such cluster.
    """
    ray = _import_ray()
    known = re.fullmatch(r"([^:/]+):(\d+)", address)
    try:
        if known:  # Ray itself tries for two minutes
            socket.create_connection((known[1], int(known[2])), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **settings)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ExecutorError(_unreachable(address, error)) from error
    return ray


def _unreachable(address: str, error: Exception) -> str:
    """Why there is no cluster. What Ray tells of it may be a traceback, whose last line names the cause."""
    text = str(error.__cause__ or error).strip()
    last = text.splitlines()[-1] if text else type(error).__name__
    if re.search("Unauthenticated|InvalidAuthToken|RAY_AUTH_TOKEN", text):
        return (
            f"the Ray cluster at {address} did not take this run's token: {last.split('. ')[0]}. It must be the cluster's: set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to what they were for `ray start`."
        )
    return (
        f"no Ray cluster could be reached at {address}: {last[:300].rstrip('.')}. Start one (`ray start --head`), or leave "
        "--ray-address and RAY_ADDRESS out: then one is started on this machine for the run."
    )


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # else each actor without GPUs warns of a later version
    try:
        import ray
    except ImportError as error:
        raise ExecutorError(
            "--executor ray needs Ray, which is not installed: pip install 'prefalign[ray]'."
        ) from error
    return ray


@contextmanager
def _cluster(ray: Any, options: Options) -> Iterator[tuple[int, float]]:
    """Connect to the cluster, or start one on this machine. Gives the number of actors and the GPUs of each."""
    address = options.ray_address or os.environ.get("RAY_ADDRESS")
    connected = ray.is_initialized()  # by the program that calls this
    if not connected:
        cores = max(options.actors or 1, os.cpu_count() or 1)
        connect(address or "local", **({} if address else {"num_cpus": cores, "include_dashboard": False}))
    try:
        there = ray.cluster_resources().get("GPU", 0)
        gpus = float(bool(there)) if options.actor_gpus is None else options.actor_gpus
        if gpus and not address and gpus > there:
            raise ExecutorError(f"--actor-gpus {gpus:g}: this machine has {there:g} GPUs. Give no more than that.")
        yield options.actors or max(1, int(there / gpus) if gpus else 1), gpus
    finally:
        if not connected:
            ray.shutdown()


class _Lost(Exception):
    """An actor died, or what it answered went with its node."""


class _Actor:
    """What Ray runs on a node."""

    def __init__(self, name: str, config: bytes, folder: str, shard: Shard):
        self.worker: StageWorker | None = None
        self.said = io.StringIO()
        try:
            if not Path(folder).is_dir():
                raise ExecutorError(
                    f"node {os.uname().nodename} does not see {folder}, from where the run was started. Start it in a folder of "
                    "a file system that all nodes share."
                )
            os.chdir(folder)
            main = bundled.load_stage(name).main  # and with it the module of the config's class
            settings = pickle.loads(config)
            folders.recall_source(settings.output.path, settings.data)
            self.worker = StageWorker(main, settings, shard)
        except Exception as error:
            self.end = ended(error)

    def next_step(self) -> Job | Ended:
        step: Job | Ended = self.worker.next_step() if self.worker is not None else self.end
        return replace(step, said=self.said.getvalue()) if isinstance(step, Ended) else step

    def work(self, inputs: list[Any]) -> list[Outcome] | Ended:
        assert self.worker is not None
        return self.worker.work(inputs)

    def finish(self, manifest: Any) -> None:
        assert self.worker is not None
        sys.stderr = self.said
        self.worker.finish(manifest)


@dataclass(eq=False)
class _Member:
    """An actor as the driver sees it.

    Attributes:
        shard: its part of passes over all inputs.
        actor: its handle.
        steps: how many jobs it has finished.
        ready: whether it waits for blocks of the job at hand.
        blocks: what it has in hand.
    """

    shard: Shard
    actor: Any
    steps: int = 0
    ready: bool = False
    blocks: dict[Any, Block] = field(default_factory=dict)


class _Crew:
    """The actors of a run. Each is asked for its next step, sent blocks while it is ready, replaced when it dies."""

    def __init__(self, ray: Any, name: str, config: Any, actors: int, gpus: float):
        self.ray = ray
        self.gpus = gpus
        stage = name if name in bundled.stages() else str(Path(name).resolve())
        self.arguments = (stage, pickle.dumps(config), str(Path.cwd()))
        self.deaths = 0  # in a row, without a block done
        self.told = False  # what actors wait for
        self.done: list[tuple[Job, Any]] = []
        self.job: Job | None = None
        self.asked: dict[Any, _Member] = {}  # those whose next step is awaited
        self.members = [self._hire(Shard(number, actors)) for number in range(actors)]

    def _hire(self, shard: Shard) -> _Member:
        kind = self.ray.remote(num_cpus=1, num_gpus=self.gpus)(_Actor)
        member = _Member(shard, kind.remote(*self.arguments, shard))
        self._ask(member)
        return member

    def _ask(self, member: _Member) -> None:
        self.asked[member.actor.next_step.remote()] = member

    def next_step(self) -> Job | Ended:
        """The job that the stage has come to, as soon as one actor is there; its end, once it ends in one."""
        self.job = None
        while True:
            step = self._hear(self._wait([*self.asked]))
            if isinstance(step, Ended):
                return step
            if self.job is not None:
                return self.job

    def finish(self, manifest: Any) -> None:
        """The job is done: one actor goes on with what the stage does next. The others follow if that is another job."""
        assert self.job is not None
        self.done.append((self.job, manifest))
        ready = [member for member in self.members if member.ready]
        for member in ready:
            member.ready = False
        for member in ready[:1]:  # none: those that are starting follow when they come to it
            self._go_on(member)

    def spread(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Sequence[Outcome]]]:
        """Have blocks done, each by the actor that has least in hand; at most `IN_HAND` for each actor have been read."""
        again: deque[Block] = deque()
        tries: Counter[int] = Counter()
        more = True
        while True:
            while (member := self._free()) is not None and (again or more):
                block = again.popleft() if again else next(blocks, None)
                if block is None:
                    more = False
                elif not block.inputs:
                    yield block, []
                else:
                    member.blocks[member.actor.work.remote(block.given)] = block
            under_way = [future for member in self.members for future in member.blocks]
            if not under_way and not again and not more:
                return
            future = self._wait([*under_way, *self.asked])
            if future in self.asked:
                self._hear(future)
                continue
            member = next(member for member in self.members if future in member.blocks)
            try:
                answer = self._get(future)
            except _Lost as error:
                lost = list(member.blocks.values())  # in the order in which the actor takes them
                again.extendleft(reversed(lost))
                number = lost[0].number
                tries[number] += 1
                if tries[number] > MOST_DEATHS:
                    raise ExecutorError(
                        f"{tries[number]} actors died at block {number} ({error}). One more would too: look at its rows, from "
                        f"input {number * self._known_job().output.block_size} on. Finished blocks are safe."
                    ) from error
                self._replace(member, error)
                continue
            block = member.blocks.pop(future)
            if isinstance(answer, Ended):
                _fail(answer)
            self.deaths = 0
            yield block, answer

    def dismiss(self) -> None:
        """End all actors."""
        for member in self.members:
            self.ray.kill(member.actor)

    def _known_job(self) -> Job:
        assert self.job is not None
        return self.job

    def _free(self) -> _Member | None:
        ready = [member for member in self.members if member.ready and len(member.blocks) < IN_HAND]
        return min(ready, key=lambda member: len(member.blocks), default=None)

    def _wait(self, futures: list[Any]) -> Any:
        """The first future that is done; says on stderr, once, what actors wait for if none has started for long."""
        while not (found := self.ray.wait(futures, num_returns=1, timeout=_PATIENCE)[0]):
            if not self.told and not any(member.ready for member in self.members):
                self.told = True
                print(
                    "waiting for an actor: each loads its model and makes the stage's passes over all rows first, or there is "
                    f"no place for one (1 CPU, {self.gpus:g} GPU); the cluster has {_sizes(self.ray.available_resources())} "
                    f"free of {_sizes(self.ray.cluster_resources())}",
                    file=sys.stderr,
                )
        return found[0]

    def _get(self, future: Any) -> Any:
        """What an actor answers. Raises `_Lost` if the actor or its answer is gone."""
        try:
            return self.ray.get(future)
        except self.ray.exceptions.RayTaskError as error:
            raise ExecutorError(f"an actor could not answer: {error}") from error
        except self.ray.exceptions.RayError as error:
            text = " ".join(str(error).split())
            known = re.search(
                r"The actor (?:died|is dead) because .*?(?= There are some| Some common causes| If the process|$)", text
            )
            raise _Lost((known[0] if known else text)[-300:]) from error

    def _hear(self, future: Any) -> Ended | None:
        """Take in an actor's next step: it is ready for the job at hand, must catch up, or has ended."""
        member = self.asked.pop(future)
        try:
            step = self._get(future)
        except _Lost as error:
            self._replace(member, error)
            return None
        if isinstance(step, Ended):
            if step.error is not None:
                _fail(step)
            return step
        if member.steps < len(self.done):
            self._check(member, step, self.done[member.steps][0])
            self._go_on(member)
            return None
        if self.job is None:
            self.job = step
            self._catch_up()
        self._check(member, step, self.job)
        member.ready = True
        return None

    def _go_on(self, member: _Member) -> None:
        member.actor.finish.remote(self.done[member.steps][1])
        member.steps += 1
        self._ask(member)

    def _catch_up(self) -> None:
        """Have the actors that wait at an earlier job go on to this one."""
        for member in self.members:
            if member.steps < len(self.done) and member not in self.asked.values():
                self._go_on(member)

    def _check(self, member: _Member, step: Job, job: Job) -> None:
        if step != job:
            changed = "; ".join(differences(vars(job), vars(step)))
            raise ExecutorError(
                f"actors disagree on what they make ({changed}): rows would depend on who makes them. Have every node load the "
                "same model, with the same version of the code."
            )

    def _replace(self, member: _Member, error: _Lost) -> None:
        self.deaths += 1
        if self.deaths > MOST_DEATHS * len(self.members):
            raise ExecutorError(
                f"{self.deaths} actors were lost in a row and no block was done meanwhile; the last one: {error} Is there memory "
                "enough for the model in each? Finished blocks are safe."
            ) from error
        for future in [future for future, asked in self.asked.items() if asked is member]:
            del self.asked[future]
        print(f"an actor was lost and another takes over what it had in hand: {error}", file=sys.stderr)
        self.ray.kill(member.actor)
        self.members[self.members.index(member)] = self._hire(member.shard)


def _fail(end: Ended) -> NoReturn:
    told = end.expected and not os.environ.get("PREFALIGN_TRACEBACK")
    raise ExecutorError(
        f"{end.error} (in an actor on node {end.node})"
        if told
        else f"the stage failed in an actor on node {end.node}:\n{end.trace}"
    )


def _sizes(resources: dict[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
