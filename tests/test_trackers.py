"""The trackers against the packages themselves: what was sent is read back with their own readers."""

import json
import struct
import sys
import threading
import time

import pytest
from toy import toy_model, toy_trainer

from llmforge import ConfigError
from llmforge.cli.main import main
from llmforge.training import read_log
from llmforge.training import trackers as trackers_module
from llmforge.training.trackers import Trackers

SETTINGS = dict(log_every_steps=1, sample_every_steps=5, schedule="constant")


def train_and_resume(folder, name, **settings):
    """Ten steps with a checkpoint at 8, as if the process had been killed after step 10, and on from there to 12."""
    trainer = toy_trainer(folder, **SETTINGS, trackers=(name,), **settings)
    trainer.train(progress=False)
    resumed = toy_trainer(folder, model=toy_model(), max_steps=12, **SETTINGS, trackers=(name,), **settings)
    with pytest.warns(UserWarning, match="max_steps 10 -> 12"):
        resumed.resume(folder / "step-000008")
    resumed.train(progress=False)
    return trainer, resumed


def logged(folder, key):
    return [(line["step"], line[key]) for line in read_log(folder / "log.jsonl") if key in line]


def test_tensorboard_reads_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_and_resume(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("train/tokens", "tokens"), ("val/loss", "val_loss")):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = logged(tmp_path / "run", key)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("sample/text_summary")]
    samples = [sample for _, sample in logged(tmp_path / "run", "sample")]
    assert [" ".join(text.split()) for text in texts] == [" ".join(text.split()) for text in samples]
    settings = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(settings)["train"]["lr"] == 1e-2


def wandb_records(file):
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # the rest of a block that holds no header
            at += left
            continue
        length, kind = struct.unpack("<4xHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


def test_wandb_reads_the_log(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "quijote")
    train_and_resume(tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    found = {"train/loss": [], "val/loss": [], "sample": []}
    for file in files:
        records = list(wandb_records(file))
        runs = [record.run for record in records if record.HasField("run")]
        assert {(run.run_id, run.project, run.display_name) for run in runs} == {(known, "quijote", "run")}
        config = {update.key: update.value_json for run in runs for update in run.config.update}
        assert json.loads(config["train"])["lr"] == 1e-2
        for record in records:
            if record.HasField("history"):
                for item in record.history.item:
                    name = item.key or item.nested_key[0]
                    if name in found:
                        found[name].append((record.history.step.num, json.loads(item.value_json)))
    for name, key in (("train/loss", "loss"), ("val/loss", "val_loss")):
        assert found[name] == logged(
            tmp_path / "run", key
        )  # no step twice: the second process begins where the first ended
    assert list(dict(found["sample"])) == [5, 10, 12]


def test_mlflow_reads_the_log(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # its artifacts
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "quijote")
    train_and_resume(tmp_path / "run", "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("quijote")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["train.lr"] == "0.01"
    assert run.data.params["config.n_layer"] == "2"
    for name, key in (("train/loss", "loss"), ("val/bits_per_byte", "val_bits_per_byte"), ("val/loss", "val_loss")):
        found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        assert found == [point for point in logged(tmp_path / "run", key) if point[1] is not None]
    samples = {artifact.path: None for artifact in client.list_artifacts(run.info.run_id, "sample")}
    assert list(samples) == [f"sample/step-{step:06}.txt" for step in (5, 10, 12)]


def test_nothing_is_imported_unless_asked_for(tmp_path):
    before = {name for name in sys.modules if name.split(".")[0] in ("tensorboard", "wandb", "mlflow")}
    toy_trainer(tmp_path / "run").train(progress=False)
    assert {name for name in sys.modules if name.split(".")[0] in ("tensorboard", "wandb", "mlflow")} == before
    assert not (tmp_path / "run" / "trackers.json").exists()
    assert "llmforge-trackers" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_with_the_way_out(name, tmp_path, monkeypatch):
    for module in list(sys.modules):
        if module.split(".")[0] == name or module.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    trainer = toy_trainer(tmp_path / "run", trackers=(name,))
    with pytest.raises(
        ConfigError, match=rf"tracker '{name}' needs the package {name}.*pip install 'llmforge\[{name}\]'"
    ):
        trainer.train(progress=False)


class Recorded:
    """A tracker that does as it is told."""

    place, forgets = "here", False

    def __init__(self, folder, run_id, settings, *, after_step):
        self.run_id = run_id or f"id-{len(made)}"
        self.calls = []
        made.append(self)
        if behaviour["broken_from"] == 0:
            raise ConnectionError("nobody answers")

    def _do(self, *call):
        if behaviour["broken_from"] is not None and call[1] >= behaviour["broken_from"]:
            raise ConnectionError("nobody answers")
        time.sleep(behaviour["seconds"])
        self.calls.append(call)

    def log(self, step, values):
        self._do("log", step, values)

    def text(self, step, name, text):
        self._do("text", step, name, text)

    def finish(self):
        self.calls.append(("finish",))


made: list[Recorded] = []
behaviour: dict = {}


@pytest.fixture
def recorded(monkeypatch):
    made.clear()
    behaviour.update(broken_from=None, seconds=0.0)
    monkeypatch.setattr(
        trackers_module, "_TRACKERS", dict.fromkeys(("tensorboard", "wandb", "mlflow"), (Recorded, "x"))
    )
    return behaviour


@pytest.mark.parametrize("broken_from", [0, 1, 4])
def test_a_tracker_out_of_reach_does_not_end_the_run(broken_from, recorded, tmp_path):
    recorded["broken_from"] = broken_from
    trainer = toy_trainer(tmp_path / "run", log_every_steps=1, trackers=("wandb",), eval_every_steps=None)
    with pytest.warns(UserWarning, match=r"tracker 'wandb' failed.*\(ConnectionError: nobody answers\)") as warned:
        result = trainer.train(progress=False)
    assert len(warned) == 1
    assert result.step == 10
    assert [step for step, _ in logged(tmp_path / "run", "loss")] == list(range(1, 11))
    assert [call[1] for call in made[0].calls] == list(range(1, broken_from))


def test_a_slow_tracker_does_not_slow_the_run(recorded, tmp_path, monkeypatch):
    recorded["seconds"] = 0.2
    trackers = Trackers(["wandb"], tmp_path, {}, after_step=0, last_step=0)
    start = time.perf_counter()
    for step in range(1, 6):
        trackers.log(step, {"loss": 1.0})
    assert time.perf_counter() - start < 0.1
    trackers.close()
    assert [call[1] for call in made[0].calls[:-1]] == [1, 2, 3, 4, 5]
    assert made[0].calls[-1] == ("finish",)

    monkeypatch.setattr(trackers_module, "_SECONDS_TO_FINISH", 0.05)
    trackers = Trackers(["wandb"], tmp_path, {}, after_step=0, last_step=0)
    trackers.log(1, {"loss": 1.0})
    with pytest.warns(UserWarning, match="wandb did not take all of the run within"):
        trackers.close()


def test_what_is_sent(recorded, tmp_path):
    trackers = Trackers(["wandb", "wandb", "mlflow"], tmp_path, {}, after_step=0, last_step=0)
    assert trackers.places == ["wandb: here", "mlflow: here"]
    trackers.log(1, {"loss": 2.0, "grad_norm": float("nan"), "skipped": True, "what": "text", "val_loss": 3})
    trackers.log(2, {"skipped": True})
    trackers.close()
    for tracker in made:
        assert tracker.calls == [("log", 1, {"train/loss": 2.0, "val/loss": 3.0}), ("finish",)]


def test_a_resumed_run_is_the_same_run_there_and_repeats_nothing(recorded, tmp_path):
    first = Trackers(["wandb"], tmp_path, {}, after_step=0, last_step=0)
    first.close()
    again = Trackers(["wandb", "mlflow"], tmp_path, {}, after_step=8, last_step=10)  # saved at 8, killed after 10
    for step in range(9, 13):
        again.log(step, {"loss": 1.0})
    again.close()
    assert [tracker.run_id for tracker in made] == ["id-0", "id-0", "id-2"]
    assert [call[1] for call in made[1].calls[:-1]] == [11, 12]
    assert [call[1] for call in made[2].calls[:-1]] == [9, 10, 11, 12]  # to it the run is new
    anew = Trackers(["wandb"], tmp_path, {}, after_step=0, last_step=10)  # nothing was saved: another run
    anew.close()
    assert made[3].run_id == "id-3"
    (tmp_path / "trackers.json").write_text("noise", encoding="utf-8")
    Trackers(["wandb"], tmp_path, {}, after_step=8, last_step=8).close()
    assert made[4].run_id == "id-4"


def test_wandb_without_a_login_says_so_at_once(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**settings):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(
        ConfigError, match="No API key configured. Log in with: wandb login, or keep the run here with WANDB_MODE"
    ):
        toy_trainer(tmp_path / "run", trackers=("wandb",)).train(progress=False)


def test_trackers_on_the_command_line(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("una y otra vez " * 300, encoding="utf-8")
    settings = ["n_layer=1", "n_head=2", "n_embd=16", "block_size=16", "device=cpu", "micro_batch_size=2"]
    words = [word for text in settings for word in ("--set", text)]
    assert main(["train", "t.txt", "--steps", "4", "--tracker", "wandb", "--tracker", "mlflow", *words]) == 0
    assert len(made) == 2
    assert "wandb: here" in capsys.readouterr().err
    assert "trackers:\n  - wandb\n  - mlflow\n" in (tmp_path / "runs" / "t" / "config.yaml").read_text()
    assert main(["train", "--resume", "runs/t", "--steps", "6", "--tracker", "wandb"]) == 0
    assert made[2].run_id == made[0].run_id
    assert main(["train", "t.txt", "--out", "x", "--tracker", "wand"]) == 2
    assert "'tensorboard', 'wandb', 'mlflow'" in capsys.readouterr().err


def test_trackers_need_a_run_folder():
    with pytest.raises(ConfigError, match=r"trackers \(wandb\) need a run folder"):
        toy_trainer(trackers=("wandb",))
