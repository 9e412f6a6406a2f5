"""A grid of settings, each run in a folder of its own: resumable, some side by side, and what came of it."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmforge.config import read_json_object
from llmforge.errors import ConfigError, shown, some
from llmforge.formats.atomic import atomic_file

Settings = Mapping[str, Any]
Measure = Callable[[Settings, Path], Mapping[str, Any]]
_Task = tuple[Settings, int, str]  # a point of the grid, a seed, the run's folder
_RunAll = Callable[[Sequence[_Task]], Iterator[tuple[_Task, Mapping[str, Any]]]]

_MOST_EXTENSIONS = 10  # of a line, in both directions: a factor of 1000


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep."""

    settings: Settings  # a value of each key of the grid
    seed: int
    folder: str  # within the sweep's
    loss: float | None  # None = it diverged
    values: Mapping[str, Any]  # all that was measured, the loss too


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """A point of the grid, over the seeds that were run."""

    settings: Settings
    loss: float  # mean; infinite where a run diverged
    stdev: float  # sample standard deviation; 0 for one seed


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What came of a sweep, or has so far."""

    grid: Mapping[str, Sequence[Any]]  # as it was asked for; `extend` adds points
    seeds: Sequence[int]
    runs: Sequence[SweepRun] = ()

    def points(self, **settings: Any) -> list[SweepPoint]:
        """The points of the grid, those with these settings where some are given, in the order of the grid."""
        losses: dict[tuple[Any, ...], list[float]] = {}
        for run in self.runs:
            if _has(run.settings, settings):
                losses.setdefault(tuple(run.settings.values()), []).append(math.inf if run.loss is None else run.loss)
        points = []
        for values, found in losses.items():
            stdev = statistics.stdev(found) if len(found) > 1 and max(found) < math.inf else 0.0
            own = dict(zip(self.grid, values, strict=True))
            points.append(SweepPoint(settings=own, loss=sum(found) / len(found), stdev=stdev))
        return sorted(points, key=lambda point: [self._place(*item) for item in point.settings.items()])

    def best(self, **settings: Any) -> SweepPoint | None:
        """The point with the lowest mean loss, among those with these settings; None where there is none that did not diverge."""
        points = [point for point in self.points(**settings) if point.loss < math.inf]
        return min(points, key=lambda point: point.loss, default=None)

    def lines(self, key: str) -> list[Settings]:
        """The combinations of all keys but this one."""
        found = [{name: value for name, value in point.settings.items() if name != key} for point in self.points()]
        return [line for number, line in enumerate(found) if line not in found[:number]]

    def edge(self, key: str, point: SweepPoint) -> str | None:
        """ "smallest" or "largest" where no point beyond this one was tried, of those that differ in this numeric key alone; else None."""
        others = {name: value for name, value in point.settings.items() if name != key}
        values = [other.settings[key] for other in self.points(**others)]
        if not all(map(_is_number, values)) or min(values) < point.settings[key] < max(values):
            return None
        return "smallest" if point.settings[key] == min(values) else "largest"

    def to_dict(self) -> dict[str, Any]:
        """All of it, as results.json has it."""
        best = self.best()
        return {
            "grid": {key: list(values) for key, values in self.grid.items()},
            "seeds": list(self.seeds),
            "best": None if best is None else {"settings": best.settings, "loss": best.loss},
            "points": [
                {"settings": p.settings, "loss": p.loss if p.loss < math.inf else None, "stdev": p.stdev}
                for p in self.points()
            ],
            "runs": [
                {"settings": run.settings, "seed": run.seed, "folder": run.folder, **run.values} for run in self.runs
            ],
        }

    def _place(self, key: str, value: Any) -> Any:
        """Numbers stand by their size, other values as the grid has them."""
        return value if all(map(_is_number, self.grid[key])) else list(self.grid[key]).index(value)


def sweep(
    measure: Measure,
    grid: Mapping[str, Sequence[Any]],
    *,
    out_dir: str | os.PathLike[str],
    seeds: Sequence[int] = (0,),
    jobs: int = 1,
    extend: str | None = None,
    check: Callable[[Settings], object] | None = None,
    inputs: Mapping[str, Any] | None = None,
    on_run: Callable[[SweepRun], None] | None = None,
) -> SweepResult:
    """Measure each point of a grid with each seed. What out_dir holds already is not measured again.

        def measure(settings, folder):
            torch.manual_seed(settings["seed"])
            config = TrainConfig(max_steps=300, lr=settings["lr"], seed=settings["seed"])
            return {"loss": Trainer(new_model(), data, val_data=val_data, config=config).train().val_loss}

        sweep(measure, {"lr": [1e-3, 2e-3, 4e-3]}, out_dir="runs/sweep").best()

    Args:
        measure: (settings, folder) -> {"loss": ..., and what else is to be kept}. Settings are a value of each key, and `seed`; the
            folder is the run's own, where an interrupted one may have left something. A loss that is not finite is one that diverged.
            With jobs above 1 it has to be a function of a module, for other processes to find.
        grid: key -> values; all combinations are run.
        out_dir: gets results.json, and a folder for each run.
        jobs: so many processes measure side by side, and share torch's threads.
        extend: a key of positive numbers, which go on by factors of 2 as long as the best of a line is its first or last.
        check: raises ConfigError for settings that cannot be: all are checked before any is run. An extension ends there.
        inputs: all else that results depend on, as JSON has it: a folder goes on with the same only.
        on_run: called after each run.
    Raises:
        ConfigError: a grid that cannot be, or a folder of something else; nothing has been run then.
    """
    out_dir = Path(out_dir)
    _check_grid(grid, seeds, jobs, extend)
    cells = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if check is not None:
        for settings in cells:
            check(settings)
    _open(out_dir, {"keys": list(grid), **(inputs or {})})
    result = SweepResult(grid=grid, seeds=seeds)
    with _workers(measure, out_dir, jobs) as run_all:
        while cells:
            tasks: list[_Task] = []
            for settings, seed in itertools.product(cells, seeds):
                task = (settings, seed, _folder_name({**settings, "seed": seed}))
                values = _done(out_dir / task[2], settings, seed)
                if values is None:
                    tasks.append(task)
                else:
                    result = _with_run(result, task, values)
            for task, values in run_all(tasks):
                result = _with_run(result, task, values)
                _write_json(out_dir / "results.json", result.to_dict())
                if on_run is not None:
                    on_run(result.runs[-1])
            cells = [] if extend is None else _beyond(result, extend, check)
    _write_json(out_dir / "results.json", result.to_dict())
    return result


def _check_grid(grid: Mapping[str, Sequence[Any]], seeds: Sequence[int], jobs: int, extend: str | None) -> None:
    if not grid:
        raise ConfigError("a sweep needs a setting to vary, for example lr with 1e-3, 2e-3 and 4e-3")
    for key, values in grid.items():
        if not values:
            raise ConfigError(f"{key} has no value to try; name some, or leave it out")
        for number, value in enumerate(values):
            if value in values[:number]:
                raise ConfigError(f"{key} has the value {shown(value)} twice; name each once")
    if "seed" in grid:
        raise ConfigError("seed is not varied but averaged over; say how many seeds instead")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds ({list(seeds)}) must be different numbers, at least one")
    if jobs < 1:
        raise ConfigError(f"jobs ({jobs}) must be at least 1")
    if extend is not None and extend not in grid:
        raise ConfigError(f"{extend} cannot be extended: it is not in the grid, which has {some(list(grid))}")
    if extend is not None and not all(_is_number(value) and value > 0 for value in grid[extend]):
        raise ConfigError(
            f"{extend} cannot go on by factors of 2 from {shown(list(grid[extend]))}: it needs numbers above 0"
        )


def _beyond(result: SweepResult, key: str, check: Callable[[Settings], object] | None) -> list[dict[str, Any]]:
    """The next point of each line whose best lies at its end."""
    cells = []
    for line in result.lines(key):
        best = result.best(**line)
        edge = None if best is None else result.edge(key, best)
        if best is None or edge is None or len(result.points(**line)) >= len(result.grid[key]) + _MOST_EXTENSIONS:
            continue
        value = best.settings[key] / 2 if edge == "smallest" else best.settings[key] * 2
        settings = {**best.settings, key: value}
        try:
            if check is not None:
                check(settings)
        except ConfigError:  # beyond what can be
            continue
        cells.append(settings)
    return cells


@contextmanager
def _workers(measure: Measure, out_dir: Path, jobs: int) -> Iterator[_RunAll]:
    """What runs tasks, here or in processes of their own, and gives each back when it is done."""
    if jobs == 1:
        yield lambda tasks: ((task, _measure(measure, out_dir, task)) for task in tasks)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # Spawned: a fork of a process in which torch has started threads can wait forever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker, initargs=(threads,)) as pool:

        def run_all(tasks: Sequence[_Task]) -> Iterator[tuple[_Task, Mapping[str, Any]]]:
            futures = {pool.submit(_measure, measure, out_dir, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:  # after an error or Ctrl-C nothing new is begun
                for future in futures:
                    future.cancel()

        yield run_all


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    # Ctrl-C reaches all processes of a terminal. A trainer catches it while it trains; one that waits is stopped by its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # else a killed sweep would go on in its workers
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _measure(measure: Measure, out_dir: Path, task: _Task) -> Mapping[str, Any]:
    settings, seed, name = task
    folder = out_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(measure({**settings, "seed": seed}, folder))
    if "loss" not in values:
        raise ConfigError(f"what a sweep measures needs a 'loss'; this measure returns {some(list(values))}")
    values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
    _write_json(folder / "result.json", {"settings": settings, "seed": seed, "values": values})
    return values


def _done(folder: Path, settings: Settings, seed: int) -> Mapping[str, Any] | None:
    """What a run measured; None where it is still to be done."""
    if not (folder / "result.json").is_file():
        return None
    found = read_json_object(folder / "result.json")
    if (found.get("settings"), found.get("seed")) != (json.loads(json.dumps(settings)), seed):
        raise ConfigError(f"{folder} has the result of other settings ({shown(found.get('settings'))}); delete it")
    values: Mapping[str, Any] = found["values"]
    return values


def _open(out_dir: Path, inputs: Mapping[str, Any]) -> None:
    """Begin a sweep in an empty folder, or go on with the same one."""
    inputs = json.loads(json.dumps(inputs))
    path = out_dir / "sweep.json"
    if path.is_file():
        before = read_json_object(path)
        changed = _differences(before, inputs)
        if changed:
            raise ConfigError(
                f"{out_dir} holds a sweep with other settings ({some(changed)}); choose another folder, or delete it"
            )
    elif out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty, and holds no sweep; choose another folder")
    else:
        _write_json(path, inputs)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in dict.fromkeys([*before, *now])
            for difference in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [f"{name} {shown(before)} -> {shown(now)}"]


def _with_run(result: SweepResult, task: _Task, values: Mapping[str, Any]) -> SweepResult:
    settings, seed, folder = task
    run = SweepRun(settings=settings, seed=seed, folder=folder, loss=values["loss"], values=values)
    return dataclasses.replace(result, runs=[*result.runs, run])


def _folder_name(settings: Settings) -> str:
    """`lr=0.001,hidden_size=64,seed=0`, and a checksum where a file system could not have that."""
    name = ",".join(f"{key}={value}" for key, value in settings.items())
    safe = re.sub(r"[^\w.=,+-]", "-", name)[:120]
    return safe if safe == name else f"{safe},{zlib.crc32(name.encode()):08x}"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as tmp:
        tmp.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _has(settings: Settings, part: Settings) -> bool:
    return all(settings[key] == value for key, value in part.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
