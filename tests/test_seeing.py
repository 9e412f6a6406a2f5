"""What a run shows of itself: FLOPs against the peak, the progress line, log.jsonl, and what `llmforge runs` makes of it."""

import json
import os
import re
import sys
import time
import types
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy import toy_model, toy_trainer

from llmforge import TrainConfig
from llmforge.cli.loss_curve import _smooth
from llmforge.cli.main import main
from llmforge.cli.run_folder import differences, find_runs, read_run
from llmforge.finetune import LoRAConfig, apply_lora_
from llmforge.training import metrics as metrics_module
from llmforge.training import progress as progress_module
from llmforge.training import read_log
from llmforge.training.metrics import EvalMetrics, StepMetrics, Throughput, flops_per_token, memory_use
from llmforge.training.peaks import PEAKS, device_peak_flops, peak_flops
from llmforge.training.progress import Progress

# NVIDIA's own figures, TFLOP/s, dense, float32 sums: white papers GA102 V2, Ada V2.1, RTX Blackwell V1.1; A100, H100 V1.04, V100 V1.1.
PUBLISHED = {
    "RTX 3070": 40.6,
    "RTX 3080": 59.5,
    "RTX 3090": 71.0,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "RTX 5070": 61.7,
    "RTX 5070 Ti": 87.9,
    "RTX 5080": 112.6,
    "RTX 5090": 209.5,
}


@pytest.mark.parametrize(("name", "tera"), PUBLISHED.items())
def test_peaks_of_cards_are_the_published_ones(name, tera):
    assert peak_flops(f"NVIDIA GeForce {name}", "bfloat16") / 1e12 == pytest.approx(tera, rel=4e-3)  # rounded in print
    assert peak_flops(f"NVIDIA GeForce {name}", "float16") == peak_flops(f"NVIDIA GeForce {name}", "bfloat16")
    assert peak_flops(f"NVIDIA GeForce {name}", "tf32") / 1e12 == pytest.approx(tera / 2, rel=4e-3)


@pytest.mark.parametrize(
    ("name", "sms", "mhz", "flops_per_clock"),
    # Streaming multiprocessors, boost clock, and bfloat16 (else float16) FLOPs that the tensor cores of one do in a clock.
    [
        ("Tesla V100-SXM2-16GB", 80, 1530, 1024),
        ("Tesla V100-PCIE-32GB", 80, 1380, 1024),
        ("Tesla T4", 40, 1590, 1024),
        ("NVIDIA A100-SXM4-80GB", 108, 1410, 2048),
        ("NVIDIA A100 80GB PCIe", 108, 1410, 2048),
        ("NVIDIA A10", 72, 1695, 1024),
        ("NVIDIA H100 80GB HBM3", 132, 1830, 4096),
        ("NVIDIA H100 PCIe", 114, 1620, 4096),
        ("NVIDIA H200", 132, 1830, 4096),
        ("NVIDIA L4", 60, 2040, 1024),
    ],
)
def test_peaks_of_data_center_cards_are_units_times_clock(name, sms, mhz, flops_per_clock):
    peak = peak_flops(name, "bfloat16") or peak_flops(name, "float16")
    assert peak == pytest.approx(sms * mhz * 1e6 * flops_per_clock, rel=0.04)  # the L4's sheet rounds down by 3.5 %


def test_a_card_is_not_its_namesake():
    of = {
        name: peak_flops(f"NVIDIA GeForce {name}", "bfloat16")
        for name in ("RTX 4070", "RTX 4070 Ti", "RTX 4070 Ti SUPER")
    }
    assert len(set(of.values())) == 3
    for name in ("RTX 4070 Laptop GPU", "RTX 4090 D", "RTX 3080 Ti Laptop GPU", "RTX 9090", "GTX 1080"):
        assert peak_flops(f"NVIDIA GeForce {name}", "bfloat16") is None
    for name in (
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA L40S",
        "NVIDIA A10G",
        "NVIDIA A10-24Q",
        "AMD Instinct MI300X",
        "",
    ):
        assert peak_flops(name, "bfloat16") is None
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") != peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    assert peak_flops("Tesla T4", "bfloat16") is None  # it has none
    assert peak_flops("Tesla T4", "float16") == 65e12
    assert device_peak_flops(torch.device("cpu"), "bfloat16") is None


def test_every_card_asked_for_is_there():
    consumer = [
        "3060",
        "3070",
        "3080",
        "3090",
        "4060",
        "4060TI",
        "4070",
        "4070SUPER",
        "4070TI",
        "4080",
        "4090",
        "5070",
        "5070TI",
        "5080",
        "5090",
    ]
    names = {name.replace(" ", "") for name in PEAKS}
    assert {f"RTX{name}" for name in consumer} <= names
    assert {"A100SXM", "A100PCIE", "H100HBM3", "H100PCIE", "H200", "T4", "L4", "A10", "V100SXM"} <= names


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_a_model_are_those_that_torch_counts(frozen):
    """A LoRA model as well: the frozen weights' own gradients are not computed."""
    model = toy_model(n_embd=64, n_head=2, block_size=32, dropout=0.0, tie_word_embeddings=False)
    trained = sum(p.numel() for p in model.parameters())
    if frozen:
        apply_lora_(model, LoRAConfig(r=1))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained < 0.1 * sum(p.numel() for p in model.parameters())
    idx = torch.randint(0, 20, (2, 32))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(idx).sum().backward()
    # The adapters' own work, the head's gradient and what the first layer need not pass on are a few percent of so small a model.
    assert flops_per_token(model, 32) == pytest.approx(
        counter.get_total_flops() / idx.numel(), rel=0.12 if frozen else 0.02
    )


def test_models_that_do_not_say_have_no_mfu():
    assert flops_per_token(nn.Linear(3, 3), 16) is None
    step = dict(
        step=1, lr=0.1, num_tokens=100, seconds=0.5, loss_tensor=torch.ones(()), grad_norm_tensor=torch.ones(())
    )
    step["skipped_tensor"] = torch.tensor(False)
    assert StepMetrics(**step).mfu is None
    assert StepMetrics(**step).flops_per_second is None
    assert StepMetrics(**step, flops=3e12).mfu is None
    assert StepMetrics(**step, flops=3e12).flops_per_second == 6e12
    assert StepMetrics(**step, flops=3e12, peak_flops=24e12).mfu == 0.25


def test_steps_of_the_trainer_say_their_flops(monkeypatch):
    monkeypatch.setattr(
        "llmforge.training.trainer.device_peak_flops", lambda device, arithmetic: {"float32": 1e9}[arithmetic]
    )
    trainer = toy_trainer(max_steps=1)
    metrics = next(trainer)
    assert metrics.flops == trainer.model.flops_per_token(16) * 4 * 16
    assert metrics.mfu == pytest.approx(metrics.flops / metrics.seconds / 1e9)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    now = types.SimpleNamespace(seconds=1000.0)
    for module in (metrics_module, progress_module):
        monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)
    return now


def test_throughput_is_that_of_the_last_seconds(clock):
    speed = Throughput(window_seconds=20.0, min_steps=3)
    clock.seconds += 60  # compiling
    speed.step(100)
    assert speed.tokens_per_second == pytest.approx(100 / 60)
    clock.seconds += 1
    speed.step(100, 1e9)
    assert speed.tokens_per_second == pytest.approx(100)  # from the second step on, compiling does not count
    for _ in range(49):
        clock.seconds += 1
        speed.step(100, 1e9)
    assert speed.tokens_per_second == pytest.approx(100)
    assert speed.flops_per_second == pytest.approx(1e9)
    for _ in range(50):
        clock.seconds += 4
        speed.step(100)
    assert speed.tokens_per_second == pytest.approx(25)
    assert (speed.tokens, speed.seconds) == (10_100, 60 + 50 + 200)


def test_evaluations_are_no_training_but_they_delay_the_end(clock):
    speed = Throughput()
    for _ in range(10):
        clock.seconds += 1
        speed.step(100)
        clock.seconds += 1  # evaluated, or saved
        speed.resume()
    assert speed.tokens_per_second == pytest.approx(100)
    assert speed.seconds_per_step == pytest.approx(2.0)


def toy_step(step, *, loss=2.5, flops=None, peak=None, tokens=1000):
    return StepMetrics(
        step=step, lr=0.1, num_tokens=tokens, seconds=1.0, loss_tensor=torch.tensor(loss), grad_norm_tensor=torch.ones(()),
        skipped_tensor=torch.tensor(False), flops=flops, peak_flops=peak,
    )  # fmt: skip


def test_lines_where_there_is_no_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "memory_use", lambda device: (3 * 2**30, 12 * 2**30))
    screen = Progress(total=100, initial=0, enabled=True, device=torch.device("cpu"))
    for step in range(1, 101):
        clock.seconds += 1.0
        screen.step(toy_step(step, flops=4e12, peak=1e13), torch.tensor(2))
    screen.evaluation(EvalMetrics(step=100, loss=2.0, num_targets=5), True)
    screen.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[4] == "step 50/100  loss 2.500  1k tok/s  MFU 40%  3.0/12 GB  ETA 0:50  2 skipped"
    assert lines[9] == "step 100/100  loss 2.500  1k tok/s  MFU 40%  3.0/12 GB  ETA 0:00  2 skipped"
    assert lines[10] == "step 100  val loss 2.0000  perplexity 7.39  (best so far)"


@pytest.mark.parametrize("width", [10, 30, 40, 60, 80, 200])
def test_a_line_fits(width, clock):
    screen = Progress(total=600_000, initial=0, enabled=False, device=torch.device("cpu"))
    metrics = toy_step(599_999, flops=4e12, peak=1e13, tokens=123_456)
    clock.seconds += 1
    screen.step(metrics)
    line = screen._line(metrics, 10.982, 12, width)
    assert len(line) <= width
    assert ("ETA" in line) == (width >= 40)
    assert ("tok/s" in line and "MFU" in line and "GB" in line) == (width >= 80)


def test_the_bar_of_a_terminal_fits_and_does_not_ask_the_device_at_every_step(clock, monkeypatch):
    shown = []
    stream = types.SimpleNamespace(isatty=lambda: True, write=shown.append, flush=lambda: None, encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    screen = Progress(total=1000, initial=0, enabled=True, device=torch.device("cpu"))
    asked = []

    class Asked(StepMetrics):
        @property
        def loss(self):
            asked.append(self.step)
            return 2.5

    for step in range(1, 1001):
        clock.seconds += 0.01
        screen.step(Asked(**vars(toy_step(step))))
    screen.close()
    assert 45 <= len(asked) <= 51  # in 10 s, five times a second
    lines = [text.strip("\r\n") for text in shown if "loss" in text]
    assert all(len(line) <= 79 for line in lines)
    middle = lines[len(lines) // 2]
    bar = re.fullmatch(r"step 5\d\d/1000 \|(.{8,24})\| loss 2\.500  100k tok/s  \d+\.\d GB  ETA 0:05", middle)
    assert bar is not None, middle
    assert bar[1].count("█") == len(bar[1]) // 2


def test_memory_of_the_process_is_the_systems_word():
    used, total = memory_use(torch.device("cpu"))
    assert total is None
    with open("/proc/self/status", encoding="ascii") as status:
        resident = int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) * 1024
    assert used == pytest.approx(resident, rel=0.05)


def test_the_log_goes_on_counting_tokens_and_seconds(tmp_path):
    toy_trainer(tmp_path / "run", log_every_steps=2, sample_every_steps=5).train(progress=False)
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert lines[0]["run"]["parameters"] == sum(p.numel() for p in toy_model().parameters())
    assert lines[0]["run"]["model"] == "GPT"
    steps = [line for line in lines if "loss" in line]
    assert [line["tokens"] for line in steps] == [64 * step for step in (2, 4, 6, 8, 10)]
    assert all(line["flops_per_second"] > 0 and line["memory_bytes"] > 0 and "mfu" not in line for line in steps)
    seconds = [line["seconds"] for line in steps]
    assert seconds == sorted(seconds)
    again = toy_trainer(tmp_path / "run", max_steps=12, log_every_steps=2)
    with pytest.warns(UserWarning, match="max_steps"):
        again.resume(tmp_path / "run" / "step-000008")
    again.train(progress=False)
    resumed = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert [line["tokens"] for line in resumed] == [64 * step for step in (2, 4, 6, 8, 10, 12)]
    assert resumed[4]["seconds"] > seconds[3]


def test_a_run_that_ends_early_says_why(tmp_path):
    trainer = toy_trainer(tmp_path / "stopped", max_seconds=1e-6)
    assert trainer.train(progress=False).stopped_by == "max_seconds"
    assert read_log(tmp_path / "stopped" / "log.jsonl")[-1] == {"step": 1, "stopped_by": "max_seconds"}

    trainer = toy_trainer(tmp_path / "broken", log_every_steps=1)
    batch = trainer.train_data.batch

    def break_off(step, **sizes):
        if step == 3:
            raise ValueError("no more text")
        return batch(step, **sizes)

    trainer.train_data.batch = break_off
    with pytest.raises(ValueError, match="no more text"):
        trainer.train(progress=False)
    assert read_log(tmp_path / "broken" / "log.jsonl")[-1] == {"step": 3, "stopped_by": "error"}
    assert read_run(tmp_path / "broken").state == "stopped"


# llmforge runs


def write_run(folder, *, losses, val=(), max_steps=100, lr=1e-3, vocab_size=50, age=0.0, **more):
    """A run folder as training leaves it, by hand."""
    folder.mkdir(parents=True)
    model = f"{{vocab_size: {vocab_size}, n_layer: 2, block_size: 16}}"
    train = f"{{max_steps: {max_steps}, lr: {lr}, micro_batch_size: 4, out_dir: {folder}}}"
    (folder / "config.yaml").write_text(f"text: a.txt\nfamily: gpt\nmodel: {model}\ntrain: {train}\n", encoding="utf-8")
    lines = [{"step": 0, "run": {"model": "GPT", "parameters": 1_234_567, "max_steps": max_steps}}]
    lines += [
        {"step": step, "loss": loss, "tokens": 64 * step, "seconds": step * 36.0, "tokens_per_second": 1000.0, **more}
        for step, loss in losses
    ]
    lines += [{"step": step, "val_loss": loss, "val_bits_per_byte": loss / 2} for step, loss in val]
    log = folder / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.utime(log, (time.time() - age, time.time() - age))
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # wherever the tests run
    curve = [(step, 4 - step / 50) for step in range(10, 101, 10)]
    write_run(tmp_path / "runs" / "good", losses=curve, val=[(50, 3.0), (80, 2.0), (100, 2.5)], age=7300, mfu=0.41)
    write_run(tmp_path / "runs" / "cut", losses=curve[:4], val=[(40, 3.25)], lr=3e-3, age=86400 * 3)
    write_run(tmp_path / "runs" / "sweep" / "now", losses=curve[:2], max_steps=200, age=1)
    return tmp_path / "runs"


def test_runs_are_listed(runs, capsys):
    assert main(["runs"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["run", "model", "size", "steps", "val", "best", "bits/B", "tok/s", "MFU", "state", "when"]
    assert lines[1] == ["sweep/now", "gpt", "1.23M", "20/200", "-", "-", "-", "1k", "-", "running?", "now"]
    assert lines[2] == [
        "good",
        "gpt",
        "1.23M",
        "100/100",
        "2.500",
        "2.000",
        "1.250",
        "1k",
        "41%",
        "finished",
        "2",
        "h",
        "ago",
    ]
    assert lines[3] == [
        "cut",
        "gpt",
        "1.23M",
        "40/100",
        "3.250",
        "3.250",
        "1.625",
        "1k",
        "-",
        "stopped",
        "3",
        "d",
        "ago",
    ]


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("when", "now good cut"),
        ("name", "cut good now"),
        ("best", "good cut now"),
        ("val", "good cut now"),
        ("steps", "good cut now"),
    ],
)
def test_runs_are_sorted(by, order, runs, capsys):
    assert main(["runs", "--sort", by, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"].split("/")[-1] for record in records] == order.split()
    best = next(record for record in records if record["name"] == "good")
    assert (best["best_step"], best["best_val_loss"], best["state"], best["parameters"]) == (
        80,
        2.0,
        "finished",
        1_234_567,
    )


def test_a_narrow_terminal_shows_what_matters(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert "100/100" in out
    assert "2.500" in out


def test_damaged_and_foreign_folders_are_named(runs, capsys):
    (runs / "photos").mkdir()
    (runs / "photos" / "x.jpg").write_bytes(b"x")
    (runs / "yaml").mkdir()
    (runs / "yaml" / "config.yaml").write_bytes(b"\xff{")
    (runs / "yaml" / "log.jsonl").write_text(
        '{"step": 3, "loss": "much", "run": 7}\nnoise\n[1]\n{"step": 4, "loss": 1e999}\n'
    )
    (runs / "noise").mkdir()
    (runs / "noise" / "log.jsonl").write_bytes(bytes(range(256)))
    (runs / "lost" / "step-000010").mkdir(parents=True)
    (runs / "lost" / "step-000010" / "model.safetensors").write_bytes(b"no tensors")
    (runs / "folder" / "log.jsonl").mkdir(parents=True)
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    assert {line.split()[0] for line in out.splitlines()[1:]} == {
        "sweep/now", "good", "cut", "yaml", "noise", "lost", "folder",
    }  # fmt: skip
    assert f"note: no runs in {os.path.join('runs', 'photos')}" in err
    assert "config.yaml is not valid YAML" in err
    assert "log.jsonl has no line that can be read" in err
    assert "lost has no log.jsonl: its curves are lost" in err
    assert "cannot read" in err
    for other in ("yaml", "noise", "lost", "folder"):
        assert main(["runs", "--compare", str(runs / "good"), str(runs / other), "--out", "x.png"]) == 0


def test_there_may_be_no_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert "no runs yet" in capsys.readouterr().out
    assert main(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["runs", "nowhere"]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_what_a_real_run_leaves_is_read_back(tmp_path):
    toy_trainer(tmp_path / "run", log_every_steps=1).train(progress=False)
    run = read_run(tmp_path / "run")
    assert (run.state, run.step, run.max_steps, run.family) == ("finished", 10, 10, "gpt")
    assert run.parameters == sum(p.numel() for p in toy_model().parameters())
    assert run.train["lr"] == 1e-2  # of the checkpoint: this run has no config.yaml
    (tmp_path / "run" / "log.jsonl").unlink()
    bare = read_run(tmp_path / "run")
    assert (bare.state, bare.step, bare.parameters) == ("finished", 10, run.parameters)
    assert list(find_runs(tmp_path)) == [(tmp_path / "run", True)]


def test_axes_of_old_and_new_logs_agree(tmp_path):
    """tokens = steps x 4 x 16, one step takes 0.064 s at 1000 tokens/s; a log of today says so itself."""
    new = write_run(tmp_path / "new", losses=[(10, 3.0), (20, 2.0)], val=[(15, 2.5), (20, 2.4)])
    assert read_run(new).axis("tokens") == {0: 0, 10: 640, 15: 960, 20: 1280}
    assert read_run(new).axis("time") == pytest.approx({0: 0, 10: 0.1, 15: 0.15, 20: 0.2})
    old = [{"step": step, "loss": 1.0, "tokens_per_second": 1000.0} for step in (10, 20)] + [
        {"step": 25, "val_loss": 1.0}
    ]
    (new / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old), encoding="utf-8")
    assert read_run(new).axis("tokens") == {10: 640, 20: 1280, 25: 1600}
    assert read_run(new).axis("time") == pytest.approx({10: 0.64 / 3600, 20: 1.28 / 3600, 25: 1.6 / 3600})


def test_only_what_differs_is_compared(runs):
    assert differences([read_run(runs / "good"), read_run(runs / "cut")]) == ({"train.lr": [1e-3, 3e-3]}, {})


def pixels(path, color):
    """How many pixels are about of this color (#rrggbb)."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(image - wanted).max(-1) < 8).sum())


def test_runs_are_compared_in_one_picture(runs, capsys):
    assert main(["runs", "--compare", "runs/good", "runs/cut", "--by", "time", "--out", "c.png"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train\.lr +0\.001 +0\.003\n", out)
    assert re.search(r"best validation loss +2\.0000 +3\.2500\n", out)
    assert pixels("c.png", "#0b6e99") > 500  # the first run
    assert pixels("c.png", "#d9730d") > 100  # the second
    assert pixels("c.png", "#0f7b4f") == 0  # no third
    with pytest.raises(SystemExit):
        main(["runs", "--compare"])


def test_the_page_needs_nothing_but_itself(runs, capsys):
    with (runs / "cut" / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"step": 40, "sample": "<script>alert(1)</script> & más"}) + "\n")
    os.rename(runs / "cut", runs / "a$b^$<i>")
    assert main(["runs", "--compare", "runs/good", "runs/a$b^$<i>", "--out", "c.html"]) == 0
    page = (runs.parent / "c.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; más" in page
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page.replace("xmlns:", ""))
    svg = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    texts = {"".join(text.itertext()).strip() for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"good", "a$b^$<i>", "step"} <= texts
    lines = [
        path for path in svg.iter("{http://www.w3.org/2000/svg}path") if "stroke: #d9730d" in path.get("style", "")
    ]
    assert lines


def test_a_run_draws_its_own_curve_and_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("una y otra vez " * 300, encoding="utf-8")
    settings = [
        "n_layer=1",
        "n_head=2",
        "n_embd=16",
        "block_size=16",
        "device=cpu",
        "micro_batch_size=2",
        "eval_every_steps=3",
        "sample_tokens=9",
    ]
    assert main(["train", "t.txt", "--steps", "6", *(word for text in settings for word in ("--set", text))]) == 0
    assert "loss.png, loss.html" in capsys.readouterr().out
    page = (tmp_path / "runs" / "t" / "loss.html").read_text(encoding="utf-8")
    sample = next(line["sample"] for line in read_log(tmp_path / "runs" / "t" / "log.jsonl") if "sample" in line)
    assert "<h2>Samples</h2>" in page
    assert sample.strip() in page
    assert "train.micro_batch_size" in page
    assert Image.open(tmp_path / "runs" / "t" / "loss.png").size[0] > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "runs/good", "nowhere"], "nowhere is no run folder"),
        (["--compare", "runs/good", "--out", "c.jpg"], r"--out (c.jpg) must end in .png, .svg, .pdf or .html"),
        (["--out", "c.png"], "--out is the picture of --compare"),
    ],
)
def test_comparisons_that_cannot_be(words, message, runs, capsys):
    assert main(["runs", *words]) == 2
    assert message in capsys.readouterr().err


def test_losses_of_other_vocabularies_do_not_compare(runs, capsys):
    write_run(runs / "bpe", losses=[(10, 5.0)], val=[(10, 5.0)], vocab_size=4000)
    assert main(["runs", "--compare", "runs/good", "runs/bpe"]) == 0
    assert "vocabularies of 50, 4,000 tokens" in capsys.readouterr().err
    assert main(["runs", "--compare", "runs/good", "runs/bpe", "--metric", "bits", "--out", "c.svg"]) == 0
    assert capsys.readouterr().err == ""


def test_trackers_can_be_set_as_one_word():
    assert TrainConfig.from_dict({"max_steps": 1, "out_dir": "x", "trackers": "wandb, mlflow"}).trackers == (
        "wandb",
        "mlflow",
    )
    assert TrainConfig.from_dict({"max_steps": 1, "trackers": ""}).trackers == ()


def test_mean_curves_do_not_lag():
    line = [5.0 - 0.01 * step for step in range(400)]
    assert _smooth(line)[50:350] == pytest.approx(line[50:350])
    assert _smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    noise = [(-1.0) ** step for step in range(400)]
    assert max(map(abs, _smooth(noise)[20:-20])) < 0.02
