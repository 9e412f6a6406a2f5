"""run.py, its referee and its tables at toy size: every contestant computes the same, and no number of the page is typed by hand."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
import training  # noqa: E402
import turns  # noqa: E402
from contestants import Task, dier, hoarder, liar, quitter, sleeper, slow_sleeper  # noqa: E402

RACE = peers.Training("gpt", "char-gpt-cpu", {"vocab_size": 65}, device_name="cpu", threads=1)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(turns, "PRELOADED", ["torch"])


@pytest.mark.parametrize("together", [True, False])
def test_turns_measure_what_is_known(together):
    who = {"slow": slow_sleeper, "quick": sleeper}
    outcomes, failed, steps = turns.take_turns(
        who, Task(), blocks=4, block_seconds=0.1, warmup_steps=2, together=together
    )
    assert not failed
    assert steps >= 2
    # The first ones are 0.01 and 0.04 seconds by construction; a loaded machine makes them longer, never shorter.
    assert 0.01 <= min(outcomes["quick"].seconds) < 0.019  # per step, of two and more
    assert min(outcomes["slow"].seconds) >= 0.04
    assert len(outcomes["quick"].seconds) == len(outcomes["slow"].seconds) == 4
    assert outcomes["quick"].notes == [1, 2, 3, 4, 5]
    assert sum(outcomes["quick"].cpu_seconds) < sum(outcomes["quick"].seconds)  # asleep
    ratio = turns.compared(outcomes, "quick")["slow"]
    assert ratio["p10"] <= ratio["median"] <= ratio["p90"]
    assert ratio["median"] > 1.5  # 4 on a machine of its own
    assert turns.compared(outcomes, "slow")["quick"]["median"] < 1 / 1.5


def test_memory_is_each_contestants_own():
    outcomes, _, _ = turns.take_turns(
        {"hoarder": hoarder, "sleeper": sleeper}, Task(), blocks=1, block_seconds=0.0, warmup_steps=1
    )
    assert 62 * 2**20 < outcomes["hoarder"].memory_bytes < 80 * 2**20  # 64 MiB and what is around
    assert outcomes["sleeper"].memory_bytes < 20 * 2**20


def test_who_fails_leaves_the_race_and_is_named(capsys):
    who = {"liar": liar, "sleeper": sleeper, "dier": dier, "quitter": quitter}
    outcomes, failed, _ = turns.take_turns(who, Task(), blocks=2, block_seconds=0.0, warmup_steps=1)
    assert failed["liar"] == "ValueError: no more steps"
    assert "died" in failed["dier"]
    assert failed["quitter"] == "RuntimeError: it ended before the race did"
    assert list(outcomes) == ["sleeper"]
    assert len(outcomes["sleeper"].seconds) == 2
    assert "no more steps" in capsys.readouterr().err


def test_rows_are_those_that_the_trainer_reads():
    race = peers.Training(
        "gpt", "char-gpt-cpu", {"vocab_size": 65}, device_name="cpu", micro_batch_size=2, grad_accum_steps=2
    )
    rows = peers.Rows(race, lambda row: row)
    for step in (0, 3):
        batch = race.data().batch(step, batch_size=4, seq_len=64, seed=race.config.seed)
        for number in range(4):
            assert rows[step * 4 + number][:-1].tolist() == batch.idx[number].tolist()
            assert rows[step * 4 + number][1:].tolist() == batch.targets[number].tolist()


def test_quick_suite_and_its_tables(tmp_path):
    environment = {**os.environ, "LLMFORGE_BENCHMARK_RESULTS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "run.py"),
        "--suite",
        "quick",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "suite-quick.json").read_text(encoding="utf-8"))
    assert {"commit", "torch", "load_average", "hardware", "packages", "minutes"} <= set(result)

    race = result["training"]["toy"]
    assert race["failed"] == {}
    installed = {name for name, peer in peers.PEERS.items() if all(map(importlib.util.find_spec, peer.packages))}
    installed.remove("llmforge_compiled")  # has no place in this suite
    assert {"llmforge", "plain_loop", "transformers_trainer"} <= set(race["tokens_per_second"]) == installed
    assert all(race["skipped"][name].startswith("not installed: ") for name in set(run.ALL) - installed)
    # One module, one loss: our step, nanoGPT's and transformers' are the same arithmetic over two micro-batches and five steps.
    assert {"plain_loop", "transformers_trainer"} <= set(race["largest_loss_difference"])
    assert max(race["largest_loss_difference"].values()) < 1e-4
    losses = race["losses"]["llmforge"]
    assert len(losses) == 5
    assert losses[0] - losses[-1] > 0.01  # it learns: equal losses say something about the optimizer too
    for spread in race["times_as_fast_as"].values():
        assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
    assert all(bytes_used > 2**20 for bytes_used in race["peak_memory_bytes"].values())
    # 2 * 2 rows of 16 tokens; tokens/s, seconds and MFU say the same.
    assert race["tokens_per_step"] == 64
    seconds = race["seconds_per_step"]["llmforge"]["median"]
    assert race["tokens_per_second"]["llmforge"] == pytest.approx(64 / seconds, rel=0.01)
    flops = race["flops_per_token"] * 64 / seconds
    assert race["mfu_of_measured_matmul"]["llmforge"] == pytest.approx(flops / race["matmul_tflops"] / 1e12, abs=0.001)

    text = result["generation"]["toy"]
    assert text["failed"] == {}
    assert text["same_tokens_as_llmforge"] == {"llmforge": True, "llmforge_without_cache": True, "transformers": True}
    assert result["largest_micro_batch"]["toy"]["contestants"]["llmforge"]["micro_batch_size"] >= 2

    page = tables.filled("# x\n<!-- suite-quick -->\nold\n<!-- end -->\nrest\n", tmp_path)
    assert "old" not in page
    assert page.endswith("rest\n")
    assert tables.filled(page, tmp_path) == page
    assert f"{race['times_as_fast_as']['transformers_trainer']['median']:.2f} x" in page
    assert tables.of_suite(result) in done.stderr
    for name in set(run.ALL) - installed:
        assert f"{name} skipped (not installed" in page


def test_the_page_is_what_the_script_writes():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page) == page, "run python benchmarks/tables.py"


def test_a_number_typed_by_hand_is_found(tmp_path):
    (tmp_path / "suite-x.json").write_text(
        json.dumps({"device": "d", "commit": "c", "load_average": 1.0, "minutes": 7, "hardware": {"cpu_cores": 2}})
    )
    page = tables.filled("<!-- suite-x -->\n<!-- end -->", tmp_path)
    assert "7 minutes" in page
    assert tables.filled(page.replace("7 minutes", "6 minutes"), tmp_path) == page
    absent = tables.filled("<!-- suite-y -->\n<!-- end -->", tmp_path)
    assert "Not measured yet" in absent


def test_suites_can_be_planned_without_the_machine_they_are_for():
    for suite in run.SUITES.values():
        assert all(part.seconds > 0 for part in suite("cpu", 1))
    parts = {part.name: part for part in run.rtx4070(None, None)}
    assert sum(part.seconds for part in parts.values()) < 35 * 60
    assert sum(part.seconds for part in run.cpu(None, None)) < 13 * 60
    gpt2 = peers.Training("gpt", "gpt2", micro_batch_size=4, grad_accum_steps=4)
    assert peers.describe(gpt2)["parameters"] == 124_439_808
    assert gpt2.tokens_per_step == 16 * 1024
    # 124 M weights less the positions, 6 FLOPs each, and attention's 12 * 12 * 1024 * 768.
    assert peers.describe(gpt2)["flops_per_token"] == pytest.approx(6 * 123.5e6 + 12 * 12 * 1024 * 768, rel=0.01)


def test_a_suite_for_gpus_says_what_to_do_without_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--suite", "rtx4070"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main()
    assert "--suite cpu" in capsys.readouterr().err


def test_contestants_of_other_families_and_with_dropout_are_left_out_by_name():
    ternary = peers.Training("bitnet", "bitnet-15m", device_name="cpu")
    able, skipped = peers.contestants(ternary, list(peers.PEERS))
    assert {"llmforge", "plain_loop", "transformers_trainer"} <= set(able)
    assert skipped["x_transformers"] == "has no bitnet model"
    with_dropout = peers.Training("gpt", "char-gpt", {"vocab_size": 65}, device_name="cpu")
    assert "dropout" in peers.contestants(with_dropout, ["litgpt_model"])[1]["litgpt_model"]


def test_largest_micro_batch_is_reckoned_from_two_and_tried(monkeypatch):
    """A device of 1000 bytes, 100 of them for the weights and 64 a row: 14 rows fit, 15 do not."""
    tried = []

    def fake(who, race, **_):
        rows = race.micro_batch_size
        tried.append(rows)
        if 100 + 64 * rows > 1000:
            return {}, {"llmforge": "OutOfMemoryError: full"}, 1
        return {"llmforge": turns.Outcome(seconds=[0.5], memory_bytes=100 + 64 * rows)}, {}, 1

    monkeypatch.setattr(turns, "take_turns", fake)
    found = run.largest_micro_batch(RACE, "llmforge", 1000)
    assert found["micro_batch_size"] == 14
    assert found["peak_memory_bytes"] == 996
    assert found["tokens_per_second"] == 14 * 64 / 0.5
    assert found["memory_bytes_per_row"] == 64
    assert tried[:2] == [1, 2]


def test_losses_are_compared_with_ours_and_step_by_step():
    ours, theirs = turns.Outcome(notes=[1.0, 2.0]), turns.Outcome(notes=[1.0, 2.5])
    outcomes = {"llmforge": ours, "plain_loop": theirs, "x_transformers": turns.Outcome(notes=[9.0])}
    assert training.loss_differences(outcomes) == {"plain_loop": 0.5}
