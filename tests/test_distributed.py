"""Several processes train one model: the run is that of one process, whatever their number, and one that dies ends it with a reason.

What the processes do is in distributed_worker.py; they are started once, and do one thing after the other.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from toy import TEXT, toy_data

from llmforge import load
from llmforge.training import list_checkpoints, next_token_loss, read_log
from llmforge.training.checkpoint import unique_tensors
from llmforge.training.trainer import _own_randomness

if not torch.distributed.is_available() or sys.platform == "win32":
    pytest.skip("torch.distributed with gloo is tested on Linux and macOS", allow_module_level=True)

WORKER = Path(worker.__file__)
TIMEOUT = 900  # seconds; a process that waits for another would wait for half an hour


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more) -> dict[str, str]:
    path = os.pathsep.join([str(WORKER.parent), str(WORKER.parents[1])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def start(folder, world_size, *names):
    """`run_processes` of the worker."""
    return run_processes(world_size, WORKER, folder, *names)


def run_processes(world_size, *command, cwd=None):
    """As torchrun does it, without its own seconds of start-up: exit code, output and errors of each process."""
    found = dict(WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **found),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def once(tmp_path_factory, name, make):
    """What `make(folder)` leaves in a folder, made once, also where several processes of pytest share the tests."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done, failed = base / name, base / f"{name}.done", base / f"{name}.failed"
    try:
        folder.mkdir()
    except FileExistsError:
        while not (done.exists() or failed.exists()):
            time.sleep(0.2)
        assert done.exists(), failed.read_text()
        return folder
    try:
        make(folder)
    except BaseException as error:
        failed.write_text(str(error))
        raise
    done.touch()
    return folder


IN_TWO = ["agreement", "refusals", "own_optimizer", "aside", "half_blocks", "compiled", "stopping", "undisturbed"]
IN_TWO += ["checkpoints", "gone_on_with", "to_go_on", "finetuned", "unused"]
IN_FOUR = ["gpt-ddp-accumulation", "llama-fsdp-chunked", "agreement", "gone_on_with"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Results of two processes."""

    def make(folder):
        (folder / "text.txt").write_text(TEXT * 3, encoding="utf-8")
        worker.export_base(folder / "base")
        worker.trainer(max_steps=4, out_dir=folder / "old" / "of-1").train(progress=False)
        for code, _, errors in start(folder, 2, *worker.PARITY, *IN_TWO):
            assert code == 0, errors

    folder = once(tmp_path_factory, "two", make)
    return lambda name: torch.load(folder / f"{name}.pt", weights_only=False) if name else folder


@pytest.fixture(scope="module")
def four(two, tmp_path_factory):
    """Results of four processes."""

    def make(folder):
        shutil.copytree(two(None) / "old", folder / "old")
        for code, _, errors in start(folder, 4, *IN_FOUR):
            assert code == 0, errors

    folder = once(tmp_path_factory, "four", make)
    return lambda name: torch.load(folder / f"{name}.pt", weights_only=False)


# The same run as of one process


def check_parity(found, name):
    alone = worker.parity(name)
    ternary, half = "bitnet" in name, "float16" in name
    # float32: sums in another order, which AdamW, dividing by small roots, makes larger in the weights. Ternary: a weight at the edge
    # between two codes takes the other one, and then the losses part. float16: the order of its sums.
    tolerance = 1e-3 if ternary else 1e-4 if half else 1e-5
    assert len(found["steps"]) == len(alone["steps"]) == 10
    for (loss, norm, tokens), (loss_alone, norm_alone, tokens_alone) in zip(
        found["steps"], alone["steps"], strict=True
    ):
        assert loss == pytest.approx(loss_alone, abs=tolerance)
        assert norm == pytest.approx(norm_alone, rel=10 * tolerance)
        assert tokens == tokens_alone
    assert found["steps"][0] == pytest.approx(
        alone["steps"][0], rel=1e-4 if half else 1e-6
    )  # before anything could add up
    assert found["weights"].keys() == alone["weights"].keys()
    for key, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][key], weight, atol=tolerance * 10 if half else tolerance, rtol=0)
    assert found["scale"] == alone["scale"]


@pytest.mark.parametrize("name", worker.PARITY)
def test_two_processes_train_as_one_does(two, name):
    check_parity(two(name), name)


@pytest.mark.parametrize("name", IN_FOUR[:2])
def test_four_processes_train_as_one_does(four, name):
    check_parity(four(name), name)


def test_compiled_models_train_on_several_ranks(two):
    alone = worker.trainer("llama", max_steps=3)
    losses, names = [m.loss for m in alone], list(alone.model.state_dict())
    for found in two("compiled").values():
        assert found["losses"] == pytest.approx(losses, abs=1e-5)
        assert found["names"] == names


def test_an_optimizer_of_ones_own_goes_with_the_divided_weights(two):
    losses, refused = two("own_optimizer")
    alone = worker.trainer(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1), max_steps=3, lr=0.1)
    assert losses == pytest.approx([m.loss for m in alone], abs=1e-5)
    assert "an optimizer must be new" in refused


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_evaluation_and_samples_are_those_of_one_process(two, kind):
    found = two("aside")[kind]
    model = worker.MODELS["gpt"]()
    model.load_state_dict(found["weights"], strict=False)
    alone = worker.trainer(model, micro_batch_size=4)  # the evaluation reads micro-batches: 3, an odd number
    alone.tokenizer = worker.toy_tokenizer()
    evaluation = alone.evaluate()
    assert found["loss"] == pytest.approx(evaluation.loss, abs=1e-6)
    assert found["num_targets"] == evaluation.num_targets == 3 * 4 * 16
    assert found["sample"] == alone.sample()


def test_what_is_done_beside_the_steps_changes_none(two):
    alone = worker.trainer()
    losses = [next(alone).loss for _ in range(2)]
    for kind in ("ddp", "fsdp"):
        assert two("aside")[kind]["next"] == pytest.approx(losses[1], abs=1e-5)
    ternary = worker.trainer("bitnet", max_steps=3)
    *_, last = (m.loss for m in ternary)
    assert two("aside")["ternary"] == pytest.approx(last, abs=1e-3)


def test_blocks_in_16_bits_keep_float32_weights_and_gradients(two):
    loss, grads = two("half_blocks")
    model = worker.llama()
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, count = next_token_loss(model, toy_data()[0].batch(0, batch_size=8, seq_len=16, seed=0))
    (loss_sum / count).backward()
    assert loss == pytest.approx((loss_sum / count).item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert grads[name].dtype == torch.float32
        error = (grads[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.01, name  # bfloat16 has 8 bits


def test_each_rank_has_dropout_of_its_own():
    draws = []
    for rank in (0, 1, 0):
        with _own_randomness(1337, 5, torch.device("cpu"), rank):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


# Checkpoints


@pytest.mark.parametrize("name", worker.CHECKPOINTED)
def test_a_resumed_run_of_two_ends_with_the_same_bits(two, name):
    """With dropout and accumulation, weights and the optimizer's state on both ranks; the folder is a model like any other."""
    found = two("checkpoints")[name]
    assert found["bitwise"]
    folder = two(None) / name / "step-000008"
    assert found["paths"] == [folder, folder]
    model, _ = load(folder)
    stored = unique_tensors(model)
    assert stored.keys() == found["weights"].keys()
    assert all(torch.equal(stored[key], weight) for key, weight in found["weights"].items())
    losses = [line["loss"] for line in read_log(two(None) / name / "log.jsonl") if "loss" in line]
    assert losses[4:] == found["losses"]  # one line for each step


def test_saves_by_the_clock_are_those_of_all_ranks(two):
    """save_every_seconds, of next to nothing: from step 2 on, when the first wish has come round."""
    assert [folder.name[-1] for folder in list_checkpoints(two(None) / "fsdp")] == list("2345678")
    assert [folder.name[-1] for folder in list_checkpoints(two(None) / "ddp")] == list("458")  # 5 was the best, then 8


@pytest.fixture(scope="module")
def left_alone():
    own = worker.trainer(max_steps=8)
    return [m.loss for m in own], worker.whole(own.model)


@pytest.mark.parametrize("ranks", [2, 4, 1])
def test_any_number_of_ranks_goes_on_with_any_checkpoint(two, four, left_alone, ranks, monkeypatch):
    """Checkpoints of one process, and of two with DDP and FSDP, each gone on with by the other of the two ways."""
    if ranks == 1:
        monkeypatch.setattr(worker, "FOLDER", two(None))
        found = worker.gone_on_with()
    else:
        found = (two if ranks == 2 else four)("gone_on_with")
    losses, weights = left_alone
    assert found.keys() >= ({"of-1"} if ranks == 2 else {"of-1", "of-2-ddp", "of-2-fsdp"})
    for name, (step, losses_then, weights_then) in found.items():
        assert step == 4, name
        assert losses_then == pytest.approx(losses[4:], abs=1e-5), name
        for key, weight in weights.items():
            torch.testing.assert_close(weights_then[key], weight, atol=1e-5, rtol=0)


def test_finetuning_with_two_processes_is_that_with_one(two, monkeypatch):
    monkeypatch.setattr(worker, "FOLDER", two(None))
    worker.finetuned()
    losses = [
        [line["loss"] for line in read_log(two(None) / f"tuned-by-{number}" / "log.jsonl") if "loss" in line]
        for number in (1, 2)
    ]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_parameter_without_a_gradient_is_left_or_refused(two):
    alone = [m.loss for m in worker.trainer(max_steps=3)]
    assert two("unused")["fsdp"] == pytest.approx(alone, abs=1e-5)
    assert "some parameters had no gradient" in two("unused")["ddp"]


# What the processes agree on


def test_the_first_rank_decides_for_all(two, four):
    assert two("agreement") == [["rank 0", 5, "no"]] * 2
    assert four("agreement") == [["rank 0", 5, "no"]] * 4


def test_a_wish_to_stop_of_one_rank_stops_all_after_the_same_step(two):
    first, second = two("stopping")
    assert first == second
    (by_signal, step, checkpoint), (by_time, _, _) = first
    assert (by_signal, step, by_time) == (
        "SIGTERM",
        5,
        "max_seconds",
    )  # the signal came in step 4: all know of it after the next
    assert checkpoint == two(None) / "stopped" / "step-000005"
    assert list_checkpoints(two(None) / "stopped") == [checkpoint]


def test_settings_that_cannot_be_are_refused(two):
    scalar, device, rows, auto, eight_bits = two("refusals")
    assert "scale has no dimension that could be sharded" in scalar
    assert "CUDA_VISIBLE_DEVICES" in device
    assert "3 sequences of 16, which cannot be divided over 2 processes; use 32" in rows
    assert "micro_batch_size 'auto' is not for distributed='fsdp'" in auto
    assert "'adamw8bit' needs whole weights" in eight_bits


# A process that is lost


def test_a_lost_process_ends_the_others_with_a_reason(tmp_path):
    """The second of two runs out of memory; the first one saves what was done."""
    outcomes = start(tmp_path, 2, "lost")
    assert [code for code, _, _ in outcomes] == [1, 1]
    first, second = ((tmp_path / f"lost-{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1))
    assert second.startswith("OutOfMemoryError: out of memory in step 4")
    assert "micro_batch_size=2 with grad_accum_steps=2" in second
    saved = tmp_path / "lost" / "step-000003"
    assert first.startswith("LostRankError: rank 0 of 2 lost another process in step 4")
    assert f"{saved} is the last checkpoint, from which --resume goes on" in first
    assert list_checkpoints(tmp_path / "lost") == [saved]


def test_torchrun_starts_again_after_kill_9_and_the_end_is_the_same(two, tmp_path):
    """`llmforge train` under torchrun --max-restarts 1; rank 1 is killed in step 8."""
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path), "killed"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lost another process in step 8" in done.stderr
    assert "from which torchrun starts all processes again" in done.stderr
    assert re.search(r"going on after step [67]", done.stdout)
    assert done.stdout.count("2 processes (ddp)") == 2  # each time said once, not by each rank
    left_alone = two(None) / "undisturbed"
    for name in ("model.safetensors", "trainer.pt"):
        weights = [(run / "step-000012" / name).read_bytes() for run in (left_alone, tmp_path / "killed")]
        assert weights[0] == weights[1], name
    losses = [
        [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line]
        for run in (left_alone, tmp_path / "killed")
    ]
    assert losses[0] == losses[1]


def test_the_example_script_trains_with_one_process_and_goes_on_with_two(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 10, encoding="utf-8")
    script = WORKER.parents[1] / "examples" / "torchrun_script.py"
    sizes = ["text.txt", "--tokens-per-step", 512]
    [(code, alone, errors)] = run_processes(1, script, *sizes, "--steps", 2, cwd=tmp_path)
    assert code == 0, errors
    arguments = [*sizes, "--steps", 3, "--distributed", "fsdp"]
    (code, first, errors), (code_too, second, errors_too) = run_processes(2, script, *arguments, cwd=tmp_path)
    assert (code, code_too) == (0, 0), errors + errors_too
    assert "going on" not in alone
    assert "going on after step 2" in first
    for printed in (alone, first):
        assert "En un lugar" in printed
    assert second == ""
    assert [folder.name for folder in list_checkpoints(tmp_path / "runs" / "torchrun")] == [
        "step-000002",
        "step-000003",
    ]
