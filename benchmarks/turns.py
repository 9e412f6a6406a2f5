"""Contestants that take turns: each in a process of its own, all of them waiting but one.

Who is measured is a function `contestant(task, turn)` that works for ever and calls `turn(note)` after each step. Here it is started in
a process, told to do so many steps, timed, and told to wait (in the middle of its loop, whoever wrote that). So all meet the same noise of the machine, none shares caches, settings of
torch or memory with another, and the memory of each is its own. On one GPU they can also come one at a time (`together=False`), where
their memory would not fit side by side.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import machine
import torch

NOTES = 5  # so many steps leave a note: losses, or the tokens that were generated
# Imported once and then forked, where the system can: a contestant starts in a moment, not in ten seconds.
PRELOADED = ["torch", "llmforge.models", "llmforge.training", "llmforge.convert", "transformers.trainer"]


class Task(Protocol):
    """What all contestants of a race are given; it is sent to their processes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def threads(self) -> int | None: ...

    @property
    def gpu_gb(self) -> float | None: ...  # memory that torch may use, to be a smaller card


Contestant = Callable[[Any, "Turn"], None]


class Turn:
    """The contestant's end: it is called after each step, and returns when the next one may begin."""

    def __init__(self, connection: Connection, device: torch.device) -> None:
        self._connection, self._device = connection, device
        self._notes: list[Any] = []
        self._profile: torch.profiler.profile | None = None
        self._before = 0
        self._wait()

    def begin(self) -> None:
        """Called when everything is imported and nothing built: memory counts from here."""
        self._before = resident_bytes()

    def __call__(self, note: Callable[[], Any] | None = None) -> None:
        if note is not None and len(self._notes) < NOTES:
            self._notes.append(note())
        self._left -= 1
        if self._left:
            return
        synchronize(self._device)
        answer = {
            "seconds": time.perf_counter() - self._start,
            "cpu_seconds": time.process_time() - self._cpu_start,
            "notes": self._notes,
        }
        if self._device.type == "cuda":
            answer["memory_bytes"] = torch.cuda.max_memory_allocated(self._device)
        else:
            answer["memory_bytes"] = max(0, peak_resident_bytes() - self._before)
        if self._profile is not None:
            self._profile.stop()
            answer["profile"], self._profile = where_time_goes(self._profile, self._device), None
        self._connection.send(answer)
        self._wait()

    def _wait(self) -> None:
        try:
            steps, profiled = self._connection.recv()
        except (EOFError, OSError):
            raise SystemExit from None  # the race is over
        if profiled:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        self._left = steps
        synchronize(self._device)
        self._start, self._cpu_start = time.perf_counter(), time.process_time()


def _work(contestant: Contestant, task: Task, connection: Connection) -> None:
    """A contestant's process."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    try:
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        if task.gpu_gb is not None and task.device.type == "cuda":
            total = torch.cuda.get_device_properties(task.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, task.gpu_gb * 2**30 / total), task.device)
        contestant(task, Turn(connection, task.device))
        raise RuntimeError("it ended before the race did")
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()})


class _Process:
    """The referee's end of a contestant."""

    def __init__(self, contestant: Contestant, task: Task) -> None:
        # A process that has used a GPU cannot be forked, and one that never did can.
        forks = sys.platform == "linux"
        context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload(PRELOADED)
        self._connection, theirs = context.Pipe()
        # Not a daemon, which may have no children of its own: torch.compile and data loaders want some.
        self._process = context.Process(target=_work, args=(contestant, task, theirs))
        self._process.start()
        theirs.close()

    def steps(self, number: int, *, profiled: bool = False) -> dict[str, Any]:
        self._connection.send((number, profiled))
        try:
            answer: dict[str, Any] = self._connection.recv()
        except EOFError:
            answer = {"error": f"its process died (exit code {self._process.exitcode})", "traceback": ""}
        if "error" in answer:
            raise ContestantFailed(answer["error"], answer["traceback"])
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class ContestantFailed(Exception):
    """What it raised, and its traceback."""


@dataclass
class Outcome:
    """What one contestant did."""

    seconds: list[float] = field(default_factory=list)  # per step, one value for each block
    # Of all its threads, per step: on a CPU that others use too, the steadier measure.
    cpu_seconds: list[float] = field(default_factory=list)
    notes: list[Any] = field(default_factory=list)
    memory_bytes: int = 0  # most it ever had, without what was there before its model was built
    profile: list[dict[str, Any]] | None = None


def take_turns(
    contestants: dict[str, Contestant],
    task: Task,
    *,
    blocks: int,
    block_seconds: float,
    warmup_steps: int = NOTES,
    together: bool = True,
    profiled: Sequence[str] = (),
) -> tuple[dict[str, Outcome], dict[str, str], int]:
    """Let all do the same number of steps, a block each in turn.

    Args:
        blocks: blocks that count, of each.
        block_seconds: about how long the block of a middling contestant takes; a block is one step at least.
        warmup_steps: done before, and not counted; one more step chooses the size of a block.
        together: False: one process at a time, half of the blocks, and then all again.
        profiled: of these also a profile of a few more steps, at the end.
    Returns:
        the outcomes; why others failed; steps of a block.
    """
    outcomes: dict[str, Outcome] = {}
    failed: dict[str, str] = {}
    steps = 0
    groups = [list(contestants)] if together else [[name] for name in contestants]
    rounds = [blocks] if together or blocks < 2 else [blocks - blocks // 2, blocks // 2]
    for number, blocks_now in enumerate(rounds):
        for group in groups:
            running: dict[str, _Process] = {}
            warm: dict[str, float] = {}
            try:
                for name in group:
                    if name in failed:
                        continue
                    running[name] = process = _Process(contestants[name], task)
                    with _failures(name, running, outcomes, failed):
                        process.steps(warmup_steps)
                        warm[name] = process.steps(1)["seconds"]
                        outcomes.setdefault(name, Outcome())
                if not running:
                    continue
                steps = steps or max(1, round(block_seconds / statistics.median(warm.values())))
                for block in range(blocks_now):
                    # Who begins changes from turn to turn.
                    names = list(running)
                    for name in names[block % len(names) :] + names[: block % len(names)]:
                        with _failures(name, running, outcomes, failed):
                            answer, outcome = running[name].steps(steps), outcomes[name]
                            outcome.seconds.append(answer["seconds"] / steps)
                            outcome.cpu_seconds.append(answer["cpu_seconds"] / steps)
                            outcome.memory_bytes = max(outcome.memory_bytes, answer["memory_bytes"])
                            outcome.notes = answer["notes"]
                    if not running:
                        break
                for name in set(profiled) & set(running) if number == len(rounds) - 1 else ():
                    with _failures(name, running, outcomes, failed):
                        outcomes[name].profile = running[name].steps(3, profiled=True)["profile"]
            finally:
                for process in running.values():
                    process.close()
    return outcomes, failed, steps


@contextlib.contextmanager
def _failures(name: str, running: dict[str, _Process], outcomes: dict[str, Outcome], failed: dict[str, str]) -> Any:
    """A contestant that fails leaves the race; the others go on."""
    try:
        yield
    except ContestantFailed as error:
        failed[name] = error.args[0]
        print(f"{name} failed: {error.args[0]}\n{error.args[1]}", file=sys.stderr)
        running.pop(name).close()
        outcomes.pop(name, None)


def compared(
    outcomes: dict[str, Outcome], ours: str = "llmforge", *, by: str = "seconds"
) -> dict[str, dict[str, float]]:
    """How many times as fast as each other one `ours` is: of the ratio within each turn, median and spread.

    Args:
        by: "seconds", or "cpu_seconds", which say more on a machine that others use too.
    """
    if ours not in outcomes:
        return {}
    mine = getattr(outcomes[ours], by)
    return {
        name: rounded(machine.spread([theirs / own for theirs, own in zip(getattr(outcome, by), mine, strict=True)]))
        for name, outcome in outcomes.items()
        if name != ours
    }


def rounded(values: dict[str, float], digits: int = 3) -> dict[str, float]:
    return {key: round(value, digits) for key, value in values.items()}


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """The most memory that this process ever had. Not getrusage: its peak is inherited from the process that forked."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return int(found.group(1)) * 1024 if found else 0


def where_time_goes(profile: torch.profiler.profile, device: torch.device, rows: int = 8) -> list[dict[str, Any]]:
    """The operators that take the most time by themselves, and their share of all operators' time."""
    times = {
        event.key: float(event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
        for event in profile.key_averages()
    }
    total = sum(times.values()) or 1.0
    ordered = sorted(times.items(), key=lambda item: -item[1])[:rows]
    return [{"operator": name, "fraction": round(value / total, 3)} for name, value in ordered if value > 0]
