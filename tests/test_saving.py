"""Checkpoints that are written while training goes on: what they hold, when they are there, and what a disk that fails costs."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn
from toy import same, toy_data, toy_model, toy_trainer, weights

from llmforge import CheckpointError, TrainConfig, Trainer
from llmforge.formats.atomic import WriteError
from llmforge.training import find_checkpoint, list_checkpoints, saving, verify_manifest
from llmforge.training.adamw8bit import AdamW8bit
from llmforge.training.checkpoint import Snapshot, WholeModel
from llmforge.training.metrics import RunLog, read_log
from llmforge.training.optim import load_optimizer_state_
from llmforge.training.saving import HostCopies

REPOSITORY = Path(__file__).parent.parent


class Spied(WholeModel):
    """All weights, with something to do in the thread that writes them.

    Args:
        act: called before the files of a checkpoint are written, with the step that it is of.
    """

    def __init__(self, act):
        self.act, self.trainer = act, None

    def capture(self, model, tokenizer, copy):
        write, step = super().capture(model, tokenizer, copy), self.trainer.step

        def spied(folder):
            self.act(step)
            write(folder)

        return spied


def spied_trainer(out_dir, act, **settings):
    """A trainer without evaluation, whose checkpoints begin with `act`."""
    trainer = toy_trainer(out_dir, **{"eval_every_steps": None, "keep_last": 9, **settings})
    trainer.val_data = None
    trainer.model_files = Spied(act)
    trainer.model_files.trainer = trainer
    return trainer


def names(run):
    return [folder.name for folder in list_checkpoints(run)]


def full(path="somewhere"):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


# What is written, and when


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_snapshot_holds_the_moment_at_which_it_was_taken(tmp_path, optimizer):
    trainer = toy_trainer(tmp_path / "at-once", optimizer=optimizer, eval_every_steps=None, model=toy_model(n_embd=64))
    for _ in range(3):
        next(trainer)
    reference = trainer.save()
    copies = HostCopies()
    snapshot = trainer._snapshot(copies)
    for _ in range(3):
        next(trainer)
    copies.wait()
    later = snapshot.write(tmp_path / "later")
    for name in ("model.safetensors", "trainer.pt", "trainer.json", "manifest.json"):
        assert (later / name).read_bytes() == (reference / name).read_bytes(), name
    assert (trainer.save() / "trainer.pt").read_bytes() != (reference / "trainer.pt").read_bytes()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    gone_on = threading.Event()
    seen = []
    trainer = spied_trainer(
        tmp_path / "run", lambda step: step == 4 and seen.append(gone_on.wait(60)), save_every_steps=4, max_steps=7
    )
    batch = trainer.train_data.batch

    def watched(step, **sizes):
        if step == 6:
            assert names(tmp_path / "run") == []  # what is being written does not count
            gone_on.set()
        return batch(step, **sizes)

    trainer.train_data.batch = watched
    result = trainer.train(progress=False)
    assert seen == [True]
    assert names(tmp_path / "run") == ["step-000004", "step-000007"]
    assert result.checkpoint == tmp_path / "run" / "step-000007"
    for folder in list_checkpoints(tmp_path / "run"):
        verify_manifest(folder)


def test_checkpoints_of_the_background_are_those_written_at_once(tmp_path):
    """Bits of every file, with pruning and the best one, whether or not training goes on meanwhile."""
    for name, in_background in (("behind", True), ("before", False)):
        toy_trainer(tmp_path / name, async_save=in_background, save_every_steps=2, max_steps=11).train(progress=False)
    behind, before = tmp_path / "behind", tmp_path / "before"
    assert names(behind) == names(before) == ["step-000010", "step-000011"]
    for folder in list_checkpoints(behind):
        for file in ("model.safetensors", "trainer.pt"):
            assert (folder / file).read_bytes() == (before / folder.name / file).read_bytes()


def test_a_save_waits_for_the_one_before(tmp_path):
    events = []

    def slow(step):
        events.append(f"{step} begins")
        time.sleep(0.3)
        events.append(f"{step} ends")

    trainer = spied_trainer(tmp_path / "run", slow, save_every_steps=1, max_steps=3)
    trainer.train(progress=False)
    assert events == ["1 begins", "1 ends", "2 begins", "2 ends", "3 begins", "3 ends"]


def test_a_checkpoint_is_there_when_save_returns(tmp_path):
    trainer = spied_trainer(tmp_path / "run", lambda step: time.sleep(0.3))
    next(trainer)
    trainer._writer.begin(trainer._snapshot)
    next(trainer)
    assert trainer.save().is_dir()
    assert names(tmp_path / "run") == ["step-000001", "step-000002"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_in_training_does_not_cost_the_checkpoint_that_is_being_written(tmp_path, error):
    trainer = spied_trainer(tmp_path / "run", lambda step: time.sleep(0.3), save_every_steps=4)
    batch = trainer.train_data.batch

    def failing(step, **sizes):
        if step == 4:
            raise error
        return batch(step, **sizes)

    trainer.train_data.batch = failing
    with pytest.raises(type(error)):
        trainer.train(progress=False)
    assert names(tmp_path / "run") == ["step-000004"]


def test_checkpoints_by_time(tmp_path, monkeypatch):
    saved, clock = [], iter(range(0, 1000, 4))  # each look at it is 4 seconds later, one look per step
    trainer = spied_trainer(tmp_path / "run", saved.append, save_every_steps=None, save_every_seconds=10.0)
    monkeypatch.setattr("llmforge.training.trainer.time.monotonic", lambda: next(clock))
    trainer.train(progress=False)
    # Looks: 0 at the start, 4 8 12 after steps 1 2 3; 16 notes the save; 20 24 28 after steps 4 5 6, and so on.
    assert saved == [3, 6, 9, 10]


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_times_that_cannot_be_are_refused(seconds):
    with pytest.raises(ValueError, match=rf"save_every_seconds \({seconds}\) must be above 0"):
        TrainConfig(max_steps=1, save_every_seconds=seconds)


def test_without_memory_for_a_copy_a_checkpoint_is_written_at_once(tmp_path, monkeypatch):
    threads = []

    def no_room(self, tensor):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(saving.HostCopies, "__call__", no_room)
    trainer = spied_trainer(
        tmp_path / "run", lambda step: threads.append(threading.current_thread().name), save_every_steps=4
    )
    trainer.train(progress=False)
    assert names(tmp_path / "run") == ["step-000004", "step-000008", "step-000010"]
    assert set(threads) == {"MainThread"}


def test_copies_from_a_gpu_are_read_after_they_have_arrived(monkeypatch):
    """A stand-in for CUDA: which calls are made, in which order, for which device."""
    calls = []

    class Event:
        def record(self, stream):
            calls.append(f"record on {stream}")

        def synchronize(self):
            calls.append("synchronize")

    class OnGPU:
        device, shape, dtype = torch.device("cuda", 1), (2, 3), torch.float32

        def detach(self):
            return self

    class Pinned:
        shape, dtype = (2, 3), torch.float32

        def copy_(self, source, *, non_blocking):
            calls.append(f"copy, non_blocking={non_blocking}")
            return self

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            calls.append(f"enter {self.device}")

        def __exit__(self, *error):
            calls.append("leave")

    def empty_like(tensor, *, device, pin_memory):
        assert device == "cpu"
        assert pin_memory
        calls.append("memory")
        return Pinned()

    monkeypatch.setattr(saving.torch, "empty_like", empty_like)
    monkeypatch.setattr(saving.torch.cuda, "Event", Event)
    monkeypatch.setattr(saving.torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(saving.torch.cuda, "device", Device)
    copies = HostCopies()
    for _ in range(2):
        copies.start()
        assert isinstance(copies(OnGPU()), Pinned)
        copies(OnGPU())
        copies.sent()
        copies.wait()
    copied, waited = "copy, non_blocking=True", ["enter cuda:1", "synchronize", "leave"]
    assert calls == [
        *["memory", copied, "memory", copied, "record on the stream of cuda:1", *waited],
        *[copied, copied, "record on the stream of cuda:1", *waited],  # into the same memory
    ]


def test_a_save_marks_the_end_of_its_copies_and_waits_for_it(tmp_path, monkeypatch):
    calls = []
    for name in ("start", "sent", "wait"):
        method = getattr(HostCopies, name)

        def spied(self, name=name, method=method):
            calls.append((name, threading.current_thread().name))
            method(self)

        monkeypatch.setattr(HostCopies, name, spied)
    trainer = spied_trainer(tmp_path / "run", lambda step: calls.append(("write", threading.current_thread().name)))
    next(trainer)
    trainer._writer.begin(trainer._snapshot)
    trainer._writer.close()
    here = "MainThread"  # asks; the other one reads
    start, *rest = calls
    assert start == ("start", here)
    assert rest[-3:] == [("sent", here), ("wait", "checkpoint"), ("write", "checkpoint")]


def test_copies_take_the_memory_of_the_last_ones_where_it_fits():
    copies = HostCopies()
    first = [copies(torch.full(shape, 1.0)) for shape in ((2, 3), (4,), (5, 1))]
    places = [copy.data_ptr() for copy in first]
    copies.start()
    source = torch.full((2, 3), 2.0)
    again = copies(source)
    assert again.data_ptr() == places[0]
    source.fill_(3.0)
    assert again.eq(2.0).all()
    copies.start()
    other = [copies(torch.full(shape, value)) for value, shape in enumerate(((4, 2), (4,), (5, 1), (4, 2)))]
    assert [copy.unique().tolist() for copy in other] == [[0], [1], [2], [3]]  # each has memory of its own
    copies.start()
    assert copies(torch.full((4, 2), 0.5)).unique().tolist() == [0.5]  # not in the memory of whole numbers


# Disks that fail


def test_a_full_disk_costs_a_warning_and_the_next_save_tries_again(tmp_path):
    def act(step):
        if step in (4, 6):
            raise full()

    trainer = spied_trainer(tmp_path / "run", act, save_every_steps=2)
    with pytest.warns(UserWarning, match="the disk is full") as warned:
        trainer.train(progress=False)
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 1, messages
    assert "cannot write" in messages[0]
    assert "step-000004: the disk is full; free some space" in messages[0]
    assert "training goes on, older checkpoints stay, the next save tries again" in messages[0]
    assert names(tmp_path / "run") == ["step-000002", "step-000008", "step-000010"]
    assert not list((tmp_path / "run").glob(".tmp-*"))
    reference = toy_trainer(eval_every_steps=None)
    reference.val_data = None
    reference.train(progress=False)
    assert same(weights(trainer.model), weights(reference.model))


def test_a_disk_that_is_full_once_more_is_announced_once_more(tmp_path):
    def act(step):
        if step in (2, 6):
            raise full()

    with pytest.warns(UserWarning, match="the disk is full") as warned:
        spied_trainer(tmp_path / "run", act, save_every_steps=2).train(progress=False)
    messages = [str(warning.message) for warning in warned]
    assert ["step-000002" in text or "step-000006" in text for text in messages] == [True, True]


@pytest.mark.parametrize("in_background", [True, False])
def test_the_warning_comes_before_the_next_save(tmp_path, in_background):
    seen = []

    def act(step):
        if step == 4:
            raise full()

    trainer = spied_trainer(tmp_path / "run", act, save_every_steps=4, max_steps=8, async_save=in_background)
    batch = trainer.train_data.batch

    def watched(step, **sizes):
        if step == 5 and trainer._writer._thread is not None:
            trainer._writer._thread.join()
        seen.append((step, len(warned)))
        return batch(step, **sizes)

    trainer.train_data.batch = watched
    with pytest.warns(UserWarning, match="the disk is full") as warned:
        trainer.train(progress=False)
    assert dict(seen)[3] == 0
    assert dict(seen)[6] == 1


def test_that_the_last_checkpoint_cannot_be_written_is_an_error(tmp_path):
    def act(step):
        if step == 10:
            raise full()

    trainer = spied_trainer(tmp_path / "run", act)
    with pytest.raises(WriteError, match="cannot write .*step-000010: the disk is full"):
        trainer.train(progress=False)
    assert names(tmp_path / "run") == ["step-000004", "step-000008"]


def test_something_in_the_place_of_a_checkpoint_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-000004").write_text("mine", encoding="utf-8")
    with pytest.warns(UserWarning, match="cannot write .*step-000004: is a file; name a folder; training goes on"):
        spied_trainer(tmp_path / "run", lambda step: None).train(progress=False)
    assert (tmp_path / "run" / "step-000004").read_text(encoding="utf-8") == "mine"
    assert names(tmp_path / "run") == ["step-000008", "step-000010"]


def test_another_error_in_the_thread_ends_the_run(tmp_path):
    def act(step):
        if step == 4:
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        spied_trainer(tmp_path / "run", act).train(progress=False)
    assert names(tmp_path / "run") == []


def test_a_disk_that_is_really_full_does_not_end_a_run(tmp_path):
    """RLIMIT_FSIZE makes writes fail part way, log and all; a child process, since it cannot be raised again there."""
    code = f"""
import resource, signal, sys, warnings
sys.path.insert(0, {os.path.dirname(__file__)!r})
from toy import toy_trainer
warnings.simplefilter("always")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trainer = toy_trainer({str(tmp_path / "run")!r}, save_every_steps=2, max_steps=12, log_every_steps=1, eval_every_steps=None)
batch = trainer.train_data.batch
def watched(step, **sizes):
    if step in (4, 8):
        trainer._writer.finish()
        soft = 900 if step == 4 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
    return batch(step, **sizes)
trainer.train_data.batch = watched
print(trainer.train(progress=False).checkpoint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "run") == ["step-000010", "step-000012"]
    assert done.stderr.count("cannot write") == 1, done.stderr
    assert "step-000006: the file would be larger than this system allows" in done.stderr
    assert done.stderr.count("log.jsonl loses lines: File too large; training goes on") == 1, done.stderr
    logged = [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert logged[:4] == [1, 2, 3, 4]
    assert logged[-4:] == [9, 10, 11, 12]


# What killed runs leave, and what disks damage


def test_half_a_checkpoint_is_neither_counted_nor_kept(tmp_path):
    run = tmp_path / "run"
    toy_trainer(run).train(progress=False)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):  # in a container, the next process often has the number of the killed one
        (run / f".tmp-{pid}-x").mkdir()
        (run / f".tmp-{pid}-x" / "model.safetensors").write_bytes(b"half")
    (run / ".tmp-1-x").mkdir()  # of a process that lives
    assert names(run) == ["step-000008", "step-000010"]
    assert find_checkpoint(run).name == "step-000010"
    assert toy_trainer(run).resume()
    assert [entry.name for entry in run.iterdir() if entry.name.startswith(".")] == [".tmp-1-x"]


def test_a_checkpoint_that_was_to_be_replaced_comes_back(tmp_path):
    run = tmp_path / "run"
    toy_trainer(run, eval_every_steps=None, save_every_steps=None).train(progress=False)
    os.rename(
        run / "step-000010", run / ".old-step-000010"
    )  # killed between the two renames, with one checkpoint in all
    trainer = toy_trainer(run, max_steps=12, eval_every_steps=None)
    with pytest.warns(UserWarning, match="max_steps 10 -> 12"):
        assert trainer.resume()
    assert trainer.step == 10
    (run / ".old-step-000010").mkdir()  # killed after them
    (run / ".old-step-000010" / "trainer.json").write_text("{}", encoding="utf-8")
    trainer.save()
    trainer.save()
    assert names(run) == ["step-000010"]
    assert not list(run.glob(".old-*"))


def rewritten(folder, name, content):
    """A file with other content, and a manifest that says so."""
    from llmforge.training.checkpoint import _checksum

    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest[name] = _checksum(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("trainer.pt", b"PK nonsense", "trainer.pt cannot be read as plain tensors"),
        ("trainer.pt", b"", "trainer.pt cannot be read as plain tensors"),
        ("trainer.json", b"{}", "trainer.json or trainer.pt lacks 'step'"),
        ("trainer.json", b"{", "step-000010 is damaged: .*trainer.json"),
    ],
)
def test_a_state_that_cannot_be_read_is_passed_over_even_with_a_fitting_manifest(tmp_path, name, content, reason):
    run = tmp_path / "run"
    toy_trainer(run).train(progress=False)
    rewritten(run / "step-000010", name, content)
    trainer = toy_trainer(run)
    with pytest.warns(UserWarning, match=f"{reason}.*using step-000008 instead"):
        assert trainer.resume()
    assert trainer.step == 8
    before = weights(toy_model())
    fresh = toy_trainer(run, model=toy_model())
    with pytest.raises(CheckpointError, match=reason):  # named by the user, there is no other
        fresh.resume(run / "step-000010")
    assert same(before, weights(fresh.model))


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path):
    """keep_last=1, the newest one damaged: what is saved on the way there must not be deleted as older than it."""
    run = tmp_path / "run"
    settings = dict(eval_every_steps=None, keep_last=1, save_every_steps=5)
    trainer = toy_trainer(run, **settings)
    trainer.val_data = None
    for _ in trainer:
        if trainer.step in (8, 10):
            Snapshot.write(trainer._snapshot(), run)
    (run / "step-000010" / "trainer.pt").unlink()
    resumed = toy_trainer(run, **settings)
    with pytest.warns(UserWarning, match="step-000010 is damaged.*using step-000008"):
        resumed.resume()
    next(resumed)
    resumed.save()
    assert names(run) == ["step-000009", "step-000010"]
    with pytest.warns(UserWarning, match="step-000010 is damaged.*using step-000009"):
        assert find_checkpoint(run).name == "step-000009"
    next(resumed)
    resumed.save()
    assert names(run) == ["step-000010"]
    verify_manifest(run / "step-000010")


def test_a_hundred_kills_lose_nothing_in_small(tmp_path):
    """benchmarks/kill_and_resume.py with few of them; it fails by itself when something is lost."""
    environment = {**os.environ, "LLMFORGE_BENCHMARK_RESULTS": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    script = REPOSITORY / "benchmarks" / "kill_and_resume.py"
    command = [sys.executable, str(script), "--kills", "5", "--steps", "150", "--seed", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kill-and-resume.json").read_text(encoding="utf-8"))
    assert result["kills"] == 5
    assert [result[f"same_{what}"] for what in ("weights", "optimizer_state", "log")] == [True, True, True]


# The same run in other parts


def test_a_run_goes_on_in_other_micro_batches(tmp_path):
    """The same batches and, without dropout, the same weights to rounding: 4 x 2, then 8 x 1, then 2 x 4."""

    def trainer(size, parts, out="run"):
        trainer = toy_trainer(
            tmp_path / out,
            model=toy_model(dropout=0.0),
            micro_batch_size=size,
            grad_accum_steps=parts,
            eval_every_steps=None,
        )
        trainer.val_data, batch = None, trainer.train_data.batch

        def watched(step, **sizes):
            rows = batch(step, **sizes)
            read.append((step, rows[0].sum().item()))
            return rows

        trainer.train_data.batch = watched
        return trainer

    read = []
    whole = trainer(8, 1, "whole")
    losses = [metrics.loss for metrics in whole]
    expected, read = read, []
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is the same run
        for size, parts, until in ((4, 2, 3), (8, 1, 6), (2, 4, 10)):
            part = trainer(size, parts)
            part.resume()
            while part.step < until:
                found.append(next(part).loss)
            part.save()
    assert read == expected
    assert found == pytest.approx(losses, abs=1e-5)
    for mine, theirs in zip(weights(part.model), weights(whole.model), strict=True):
        torch.testing.assert_close(
            mine, theirs, atol=2e-5, rtol=0
        )  # Adam divides rounding errors of small gradients up
    assert not same(weights(part.model), weights(toy_model(dropout=0.0)))


@pytest.mark.parametrize(
    ("now", "other"),
    [
        (dict(micro_batch_size=4, tokens_per_step=4 * 16), False),
        (dict(micro_batch_size=2, grad_accum_steps=2), False),
        (dict(micro_batch_size=2, tokens_per_step=4 * 16), False),
        (dict(micro_batch_size=4, grad_accum_steps=2), True),
        (dict(micro_batch_size=2), True),
        (dict(micro_batch_size=4, tokens_per_step=8 * 16), True),
    ],
)
def test_only_another_number_of_rows_is_another_run(tmp_path, now, other):
    for before in (dict(micro_batch_size=4), dict(micro_batch_size=1, tokens_per_step=4 * 16)):
        trainer = toy_trainer(tmp_path, **before)
        next(trainer)
        trainer.save()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            toy_trainer(tmp_path, **now).resume()
        assert [("not the same run" in str(w.message)) for w in warned] == [True] * other


# Optimizer states of other programs


def test_a_run_that_began_without_bitsandbytes_goes_on_with_it():
    """The 8-bit state has no tables of codes, without which bitsandbytes' step fails."""
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.full(shape, 0.5)) for shape in ((64, 128), (5,)))
    mine = AdamW8bit([p, q], lr=1e-2)
    for _ in range(4):
        p.grad, q.grad = torch.randn(64, 128), torch.randn(5)
        mine.step()
    r, s = (nn.Parameter(x.detach().clone()) for x in (p, q))
    theirs = bitsandbytes.optim.AdamW8bit([r, s], lr=1e-2)
    load_optimizer_state_(theirs, mine.state_dict())
    assert theirs.state[r]["step"] == 4
    before = p.detach().clone()
    p.grad, q.grad = torch.randn(64, 128), torch.randn(5)
    r.grad, s.grad = p.grad.clone(), q.grad.clone()
    mine.step()
    theirs.step()
    assert (r - p).norm() < 1e-2 * (p - before).norm()
    torch.testing.assert_close(s, q)
    again = AdamW8bit([p, q], lr=1e-2)
    load_optimizer_state_(again, theirs.state_dict())  # and back
    assert again.state[p]["step"] == 5


def test_the_log_goes_on_when_there_is_room_again(tmp_path):
    class Failing:
        def __init__(self, file):
            self.file, self.fails = file, False

        def write(self, text):
            if self.fails:
                raise full()
            self.file.write(text)

        def flush(self):
            self.file.flush()

        def close(self):
            self.file.close()

    log = RunLog(tmp_path / "log.jsonl", after_step=0)
    log._file = Failing(log._file)
    log.write(step=1)
    log._file.fails = True
    with pytest.warns(UserWarning, match="log.jsonl loses lines: No space left on device; training goes on"):
        log.write(step=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write(step=3)  # without another one
    log._file.fails = False
    log.write(step=4)
    log.close()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 4]


def test_a_module_of_ones_own_without_a_folder_needs_no_writer():
    trainer = Trainer(toy_model(), toy_data()[0], config=TrainConfig(max_steps=1, device="cpu", micro_batch_size=2))
    assert trainer.train(progress=False).checkpoint is None
