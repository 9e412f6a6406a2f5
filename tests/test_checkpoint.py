"""Checkpoints: complete or absent, checked on reading, kept and deleted as promised, and atomic writing under all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import same, toy_model, toy_trainer, weights

from llmforge import CheckpointError
from llmforge.formats.atomic import WriteError, atomic_file, atomic_folder, sweep_leftovers
from llmforge.training import find_checkpoint, list_checkpoints, validation_loss, verify_manifest
from llmforge.training.checkpoint import load_weights_

FILES = ["config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "trainer.json"]
FILES += ["trainer.pt"]


@pytest.fixture
def run(tmp_path):
    """A finished run of 10 steps with checkpoints 5 (evaluated), 8 and 10."""
    toy_trainer(tmp_path / "run", keep_last=3, save_every_steps=4).train(progress=False)
    return tmp_path / "run"


def test_a_checkpoint_is_a_model_folder(run):
    assert sorted(file.name for file in (run / "step-000010").iterdir()) == FILES
    model = toy_model()
    load_weights_(model, run / "step-000010")
    assert not same(weights(model), weights(toy_model()))


def test_nothing_temporary_is_left(run):
    assert not [entry.name for entry in run.rglob("*") if entry.name.startswith(".")]


def test_keep_last_and_the_best_stay(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=12, keep_last=2)
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 2.6, 12: None}
    for metrics in trainer:
        if metrics.step in losses:
            loss = losses[metrics.step]
            if loss is not None:
                object.__setattr__(trainer.evaluate(), "loss", loss)
            trainer.save()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-000004", "step-000010", "step-000012"]
    assert find_checkpoint(tmp_path).name == "step-000012"
    assert find_checkpoint(tmp_path, "best").name == "step-000004"
    assert find_checkpoint(tmp_path, "step-000010").name == "step-000010"
    assert validation_loss(tmp_path / "step-000012") is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_found_and_the_one_before_used(run, name, damage):
    file = run / "step-000010" / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-3])  # the last byte of a JSON file is a line end, which says nothing
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match="step-000010 is damaged"):
        verify_manifest(run / "step-000010")
    with pytest.warns(UserWarning, match="step-000010 is damaged.*using step-000008 instead"):
        assert find_checkpoint(run).name == "step-000008"
    assert (run / "step-000010").is_dir()  # a damaged one is never deleted


def test_when_all_are_damaged_each_is_named(run):
    for folder in list_checkpoints(run):
        (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged: .*step-000010.*step-000005"):
        find_checkpoint(run)


def test_a_manifest_cannot_point_outside(run):
    manifest = run / "step-000010" / "manifest.json"
    manifest.write_text('{"../../secret": {"bytes": 1, "sha256": "0"}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"\.\./\.\./secret is missing"):
        verify_manifest(run / "step-000010")


def test_missing_runs_and_names_are_explained(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in .*: it has no step-... folder"):
        find_checkpoint(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint 'step-000007' in .*; there are step-000005, step-000008"):
        find_checkpoint(run, "step-000007")


def test_best_needs_an_evaluation(tmp_path):
    trainer = toy_trainer(tmp_path)
    next(trainer)
    trainer.save()
    with pytest.raises(CheckpointError, match="no checkpoint in .* was evaluated"):
        find_checkpoint(tmp_path, "best")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n_layer=3), "missing: transformer.h.2.ln_1.weight, .* and 9 more"),
        (dict(n_layer=1), "not in this model: transformer.h.1"),
        (dict(block_size=32), r"of another shape: transformer.wpe.weight \(16, 16\) instead of \(32, 16\)"),
    ],
)
def test_weights_of_another_shape_are_refused_and_the_model_untouched(run, change, message):
    model = toy_model(**change)
    before = weights(model)
    with pytest.raises(CheckpointError, match=message):
        load_weights_(model, run / "step-000010")
    assert same(before, weights(model))


def test_a_state_with_code_in_it_is_not_run(run, tmp_path):
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return (Path.touch, (canary,))

    torch.save({"optimizer": Attack(), "scaler": {}}, run / "step-000010" / "trainer.pt")
    manifest = run / "step-000010" / "manifest.json"
    manifest.write_text("{}", encoding="utf-8")  # an attacker writes a fitting one
    with pytest.raises(CheckpointError, match="trainer.pt cannot be read"):
        toy_trainer(run, model=toy_model()).resume(run / "step-000010")
    assert not canary.exists()


def test_a_disk_that_fills_up_leaves_the_old_checkpoints_and_a_clear_message(run, tmp_path):
    """RLIMIT_FSIZE makes writes fail part way, as a full disk does; a child process, since it cannot be raised again."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from toy import toy_trainer
from llmforge.errors import LLMForgeError
trainer = toy_trainer({str(run)!r}, max_steps=20)
trainer.resume()
next(trainer)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in range(0, 60000, 4000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        trainer.save()
    except LLMForgeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) > 5
    assert all("cannot write" in line and "step-000011" in line for line in messages), messages
    assert find_checkpoint(run).name in ("step-000010", "step-000011")
    assert not list(run.glob(".tmp-*"))


# formats/atomic.py


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with atomic_file(target) as tmp:
        tmp.write_text("new", encoding="utf-8")
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "new"
    with pytest.raises(RuntimeError, match="boom"), atomic_file(target) as tmp:
        tmp.write_text("half", encoding="utf-8")
        raise RuntimeError("boom")
    assert target.read_text(encoding="utf-8") == "new"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_a_file_is_replaced_by_renaming_not_by_writing_into_it(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old", encoding="utf-8")
    with target.open(encoding="utf-8") as reader:  # who has it open, or mapped, keeps the old one
        with atomic_file(target) as tmp:
            tmp.write_text("new", encoding="utf-8")
        assert reader.read() == "old"
    assert target.read_text(encoding="utf-8") == "new"


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as tmp:
        (tmp / "a").write_text("1", encoding="utf-8")
    with pytest.raises(WriteError, match="exists and is not empty"), atomic_folder(target):
        pytest.fail("the block must not run")
    with atomic_folder(target, overwrite=True) as tmp:
        (tmp / "b").write_text("2", encoding="utf-8")
    assert [file.name for file in target.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_whose_writer_was_killed_between_the_renames_comes_back(tmp_path):
    old = tmp_path / ".old-out"
    old.mkdir()
    (old / "a").write_text("precious", encoding="utf-8")
    with pytest.raises(RuntimeError, match="fails"), atomic_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError("fails")
    assert (tmp_path / "out" / "a").read_text(encoding="utf-8") == "precious"


def test_leftovers_of_dead_writers_are_swept_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f".tmp-{pid}-x").mkdir()
    sweep_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [f".tmp-{os.getpid()}-x"]


def test_targets_that_cannot_be_are_explained(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(WriteError, match="a part of that path is a file"), atomic_file(tmp_path / "file" / "a"):
        pass
    with pytest.raises(WriteError, match="is a folder; name a file inside it"), atomic_file(tmp_path):
        pass
    with pytest.raises(WriteError, match="is a file; name a folder"), atomic_folder(tmp_path / "file"):
        pass
