"""Sweeps: the whole grid is run, once; and muP: what it promises of wide models, with the standard rule as the control."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from toy import TEXT, toy_data, toy_model, toy_tokenizer, toy_trainer

import llmforge as lf
from llmforge.cli.main import main
from llmforge.cli.sweep import shape_of_width
from llmforge.errors import ConfigError
from llmforge.models import BitNetConfig, GPTConfig, LlamaConfig
from llmforge.training import build_optimizer, mup_init_, sweep

TOY = [
    "--preset",
    "char-gpt-cpu",
    "--set",
    "n_layer=1",
    "--set",
    "n_embd=16",
    "--set",
    "n_head=2",
    "--set",
    "block_size=16",
]
QUIET = ["--set", "eval_every_steps=null", "--set", "sample_every_steps=null"]
TOY += ["--set", "device=cpu", "--set", "eval_batches=2", "--set", "warmup_steps=2", "--set", "min_lr=0"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "quijote.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


class Valley:
    """A loss with its lowest point at a rate that the width decides; it remembers what it was asked."""

    def __init__(self, best=None):
        self.best, self.asked = best or {}, []

    def __call__(self, settings, folder):
        self.asked.append(dict(settings))
        best = self.best.get(settings.get("width"), 0.01)
        return {"loss": 1 + math.log2(settings["lr"] / best) ** 2 + 0.1 * settings["seed"], "steps": 5}


# The function


def test_every_point_is_measured_with_every_seed_and_the_lowest_mean_wins(tmp_path):
    measure = Valley()
    result = sweep(measure, {"lr": [0.005, 0.01], "kind": ["b", "a"]}, out_dir=tmp_path / "s", seeds=[0, 2])
    assert measure.asked == [
        {"lr": lr, "kind": kind, "seed": seed} for lr in (0.005, 0.01) for kind in ("b", "a") for seed in (0, 2)
    ]
    assert result.best(kind="a").settings == {"lr": 0.01, "kind": "a"}
    assert [(p.settings["lr"], p.settings["kind"]) for p in result.points()] == [
        (0.005, "b"),
        (0.005, "a"),
        (0.01, "b"),
        (0.01, "a"),
    ]
    point = result.points(lr=0.005, kind="a")[0]  # losses 2 and 2.2
    assert (point.loss, point.stdev) == (pytest.approx(2.1), pytest.approx(math.sqrt(0.02)))
    saved = json.loads((tmp_path / "s" / "results.json").read_text(encoding="utf-8"))
    assert (len(saved["runs"]), saved["runs"][0]["steps"], saved["best"]["settings"]["lr"]) == (8, 5, 0.01)


def test_what_is_done_is_not_done_again_and_values_can_be_added(tmp_path):
    def fails(settings, folder):
        if settings["lr"] == 0.02:
            raise RuntimeError("killed")
        return Valley()(settings, folder)

    with pytest.raises(RuntimeError, match="killed"):
        sweep(fails, {"lr": [0.01, 0.02]}, out_dir=tmp_path)
    measure = Valley()
    result = sweep(measure, {"lr": [0.01, 0.02, 0.04]}, out_dir=tmp_path)
    assert [asked["lr"] for asked in measure.asked] == [0.02, 0.04]
    assert [point.loss for point in result.points()] == [1, 2, 5]


def test_a_sweep_goes_on_with_the_same_inputs_only(tmp_path):
    sweep(Valley(), {"lr": [0.01]}, out_dir=tmp_path, inputs={"train": {"max_steps": 5}, "text": "a"})
    with pytest.raises(ConfigError, match=r"sweep with other settings \(train.max_steps 5 -> 6\)"):
        sweep(Valley(), {"lr": [0.01]}, out_dir=tmp_path, inputs={"train": {"max_steps": 6}, "text": "a"})
    with pytest.raises(ConfigError, match="keys"):
        sweep(Valley(), {"lr": [0.01], "width": [1]}, out_dir=tmp_path, inputs={"train": {"max_steps": 5}, "text": "a"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "book.txt").touch()
    with pytest.raises(ConfigError, match="is not empty, and holds no sweep"):
        sweep(Valley(), {"lr": [0.01]}, out_dir=tmp_path / "other")


def test_extension_doubles_and_halves_each_line_until_its_best_lies_inside(tmp_path):
    measure = Valley({1: 0.08, 2: 0.01, 3: 0.0025})
    result = sweep(measure, {"lr": [0.01], "width": [1, 2, 3]}, out_dir=tmp_path, extend="lr")
    rates = {width: [point.settings["lr"] for point in result.points(width=width)] for width in (1, 2, 3)}
    assert rates == {
        1: pytest.approx([0.005, 0.01, 0.02, 0.04, 0.08, 0.16]),
        2: pytest.approx([0.005, 0.01, 0.02]),
        3: pytest.approx([0.00125, 0.0025, 0.005, 0.01]),
    }
    assert [result.edge("lr", result.best(width=width)) for width in (1, 2, 3)] == [None, None, None]


def test_extension_ends_where_settings_cannot_be_and_after_a_factor_of_1000(tmp_path):
    def check(settings):
        if settings["lr"] > 0.04:
            raise ConfigError("too large")

    def falling(settings, folder):
        return {"loss": 1 / settings["lr"]}

    result = sweep(falling, {"lr": [0.01, 0.02]}, out_dir=tmp_path / "a", extend="lr", check=check)
    assert result.best().settings["lr"] == 0.04
    assert result.edge("lr", result.best()) == "largest"
    result = sweep(falling, {"lr": [0.01]}, out_dir=tmp_path / "b", extend="lr")
    assert result.best().settings["lr"] <= 0.01 * 2**10


def test_a_run_that_diverged_is_no_best_one(tmp_path):
    result = sweep(
        lambda settings, folder: {"loss": math.nan if settings["lr"] > 1 else 3.0}, {"lr": [1, 2]}, out_dir=tmp_path
    )
    assert (result.best().settings["lr"], result.points()[1].loss) == (1, math.inf)
    assert json.loads((tmp_path / "lr=2,seed=0" / "result.json").read_text(encoding="utf-8"))["values"] == {
        "loss": None
    }
    assert sweep(lambda settings, folder: {"loss": math.inf}, {"lr": [3]}, out_dir=tmp_path / "all").best() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": {}}, "needs a setting to vary"),
        ({"grid": {"lr": []}}, "lr has no value to try"),
        ({"grid": {"lr": [1, 2, 1]}}, "lr has the value 1 twice"),
        ({"grid": {"seed": [1, 2]}}, "seed is not varied but averaged over"),
        ({"grid": {"lr": [1]}, "seeds": [3, 3]}, "seeds .* must be different numbers"),
        ({"grid": {"lr": [1]}, "jobs": 0}, r"jobs \(0\) must be at least 1"),
        ({"grid": {"lr": [1]}, "extend": "width"}, "width cannot be extended: it is not in the grid, which has lr"),
        ({"grid": {"lr": [0.0, 1.0]}, "extend": "lr"}, "needs numbers above 0"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_runs(tmp_path, arguments, message):
    measure = Valley()
    with pytest.raises(ConfigError, match=message):
        sweep(measure, out_dir=tmp_path / "s", **arguments)
    assert measure.asked == []
    assert not (tmp_path / "s").exists()


# The command


def test_the_command_trains_the_grid_and_names_the_best(text, tmp_path, capsys):
    out = tmp_path / "s"
    command = [
        "sweep",
        text,
        "--over",
        "lr=1e-3,1e-2",
        "--over",
        "width=16,32",
        "--steps",
        "6",
        "--out",
        str(out),
        *TOY,
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "4 runs of 6 steps" in shown
    assert "best     lr 0.01, width 32: loss" in shown
    assert "warning: lr 0.01 is the largest that was tried, a better one may lie beyond: --extend" in shown
    assert "warning: width" not in shown
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    folder = out / "lr=0.01,width=32,seed=1337"
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml", "log.jsonl", "result.json"]  # small
    runs = json.loads((out / "results.json").read_text(encoding="utf-8"))["runs"]
    assert [run["num_tokens"] for run in runs] == [6 * 12 * 16] * 4
    # The command to type next is the same run, as `train` does it.
    [line] = [line for line in shown.splitlines() if line.startswith("next")]
    words = line.split("llmforge ", 1)[1].split()
    again = tmp_path / "again"
    assert main([*words, "--steps", "6", *QUIET, "--out", str(again)]) == 0
    logged = [json.loads(line) for line in (again / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    [loss] = [line["val_loss"] for line in logged if "val_loss" in line]
    [run] = [run for run in runs if run["folder"] == folder.name]
    assert loss == run["loss"]
    # Nothing is left to do.
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    assert "loss" in captured.err
    assert "run  " not in captured.err
    assert json.loads(captured.out)["runs"] == runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--over", "lr"], "--over needs KEY=VALUES, got 'lr'"),
        (["--over", "learning_rate=1,2"], "did you mean 'lr'"),
        (["--over", "lr=1e-3,40"], r"lr \(40.0\) must be above 0 and below 10"),
        (["--over", "n_embd=16,17"], r"n_embd \(17\) must be divisible by n_head \(2\)"),
        (["--over", "width=16,20"], r"width \(20\) must be a multiple of 8, the width of this model's heads"),
        (["--over", "seq_len=8,32"], r"seq_len \(32\) exceeds the model's context \(16\)"),
        (["--over", "lr=1e-3", "--over", "lr=1e-2"], "--over names lr twice"),
        (["--over", "lr=1e-3", "--seeds", "0"], r"--seeds \(0\) must be at least 1"),
        (["--over", "lr=1e-3", "--extend", "width"], "width cannot be extended"),
    ],
)
def test_bad_sweeps_end_in_a_message_before_anything_runs(text, tmp_path, capsys, arguments, message):
    import re

    assert main(["sweep", text, *arguments, "--steps", "3", "--out", str(tmp_path / "s"), *TOY]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("number", "jobs", "rates"), [(signal.SIGKILL, "2", "1e-3,1e-2"), (signal.SIGTERM, "1", "1e-3")]
)
def test_a_killed_sweep_goes_on_and_leaves_no_process_behind(text, tmp_path, number, jobs, rates):
    steps = 150
    grid = ["--over", f"lr={rates}", "--steps", str(steps), "--set", "save_every_steps=30", *TOY]
    command = [sys.executable, "-m", "llmforge", "sweep", text, *grid, "--out", str(tmp_path / "s"), "--jobs", jobs]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "s").glob("*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)  # until all workers have closed standard error, so have ended
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL), err
    assert ("the same command goes on" in err) == (number == signal.SIGTERM)
    assert not (tmp_path / "s" / f"lr={float(rates.split(',')[0])},seed=1337" / "result.json").exists()
    assert main(["sweep", text, *grid, "--out", str(tmp_path / "s"), "--jobs", jobs]) == 0
    found = json.loads((tmp_path / "s" / "results.json").read_text(encoding="utf-8"))["points"]
    whole = {}  # without a stop
    for rate in rates.split(","):
        out = tmp_path / rate
        assert main(["train", text, "--steps", str(steps), *TOY, *QUIET, "--set", f"lr={rate}", "--out", str(out)]) == 0
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        [whole[float(rate)]] = [line["val_loss"] for line in lines if "val_loss" in line]
    assert {point["settings"]["lr"]: point["loss"] for point in found} == whole  # to the bit


def test_width_scales_heads_and_feed_forward():
    gpt = GPTConfig(vocab_size=1, n_embd=128, n_head=4)
    assert shape_of_width(gpt, 64) == {"n_embd": 64, "n_head": 2}
    llama = LlamaConfig(
        vocab_size=1, hidden_size=512, intermediate_size=1280, num_attention_heads=8, num_key_value_heads=4
    )
    assert shape_of_width(llama, 256) == {
        "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 640, "num_key_value_heads": 2
    }  # fmt: skip
    assert shape_of_width(llama, 64)["num_key_value_heads"] == 1


# muP


def wide_llama(width, **settings):
    torch.manual_seed(0)
    shape = dict(intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=width // 16)
    return lf.Llama(
        lf.LlamaConfig(
            vocab_size=toy_tokenizer().vocab_size,
            hidden_size=width,
            max_position_embeddings=16,
            **{"tie_word_embeddings": True, **shape, **settings},
        )
    )


def wide_gpt(width, **settings):
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=width // 16, n_embd=width, block_size=16)
    return lf.GPT(lf.GPTConfig(vocab_size=toy_tokenizer().vocab_size, **{**shape, **settings}))


def size(x):
    return x.float().square().mean().sqrt().item()


def changes(model, base_width, *, lr=4e-3, steps=3, **settings):
    """How much some steps change the output of the last block, and the logits, on the same text: root mean squares."""
    train_data, _ = toy_data()
    seen = {}
    blocks = model.model.layers if isinstance(model, lf.Llama) else model.transformer.h
    blocks[-1].register_forward_hook(lambda module, inputs, output: seen.update(block=output))
    settings |= dict(max_steps=100, micro_batch_size=8, warmup_steps=0, schedule="constant", lr=lr, device="cpu")
    config = lf.TrainConfig(mup_base_width=base_width, **settings)
    if base_width is not None:
        mup_init_(model, base_width)
    trainer = lf.Trainer(model, train_data, config=config)
    idx = train_data.batch(0, batch_size=8, seq_len=16, seed=5)[0]
    with torch.no_grad():
        before = {"logits": model(idx), "block": seen["block"]}
        for _ in range(steps):
            with torch.enable_grad():
                next(trainer)
        after = {"logits": model(idx), "block": seen["block"]}
    return {name: size(after[name] - before[name]) for name in before}


@pytest.mark.parametrize(
    ("build", "settings"),
    [(wide_llama, {}), (wide_llama, {"tie_word_embeddings": False}), (wide_llama, {"qk_norm": True}), (wide_gpt, {})],
    ids=["llama", "untied", "qk_norm", "gpt"],
)
def test_a_step_changes_a_wide_model_as_much_as_a_narrow_one(build, settings):
    """The coordinate check of Yang et al. 2022, arXiv:2203.03466, D.1, with the standard rule as the control."""
    mup = [changes(build(width, **settings), 32) for width in (32, 256)]
    standard = [changes(build(width, **settings), None) for width in (32, 256)]
    for name in ("block", "logits"):
        growth, control = (found[1][name] / found[0][name] for found in (mup, standard))
        assert 0.7 < growth < 1.4, (name, growth)  # 8 times the width; measured 0.89 to 1.10
        assert control > 2.5, (name, control)  # measured 5 and more


def test_muon_takes_its_rate_over_and_mup_the_logits():
    """An orthogonal update moves outputs equally far at any width; the logits are AdamW's."""
    found = {
        base: [changes(wide_llama(width), base, optimizer="muon", muon_lr=0.02) for width in (32, 256)]
        for base in (32, None)
    }
    growth = {base: {name: wide[name] / narrow[name] for name in wide} for base, (narrow, wide) in found.items()}
    print(growth)
    assert all(0.7 < factor < 1.4 for factor in growth[32].values()), growth
    assert growth[None]["logits"] > 2.0, growth


def test_mup_at_the_base_width_leaves_learning_rates_alone():
    model = toy_model()
    for base_width, factors in ((16, {1.0}), (8, {0.5, 1.0})):
        groups = build_optimizer(model, lf.TrainConfig(max_steps=1, mup_base_width=base_width)).param_groups
        assert {group["lr_factor"] for group in groups} == factors
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_mup_learning_rates_and_initial_weights_are_those_of_the_table():
    plain, model = wide_llama(64), mup_init_(wide_llama(64), 16)
    optimizer = build_optimizer(model, lf.TrainConfig(max_steps=1, mup_base_width=16))
    factor = {p: group["lr_factor"] for group in optimizer.param_groups for p in group["params"]}
    for (name, p), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        hidden, norm = name.endswith("proj.weight"), name == "model.norm.weight"
        assert factor[p] == (0.25 if hidden or norm else 1.0), name
        torch.testing.assert_close(p, before * (math.sqrt(768 / 64) if hidden else 0.25 if norm else 1.0))
    untied = mup_init_(wide_llama(64, tie_word_embeddings=False), 16)
    assert size(untied.lm_head.weight) == pytest.approx(0.02 / 4, rel=0.1)
    torch.testing.assert_close(untied.model.norm.weight, torch.ones(64))


def test_the_schedule_moves_all_groups_in_proportion(tmp_path):
    trainer = toy_trainer(tmp_path, mup_base_width=4, lr=1e-2, warmup_steps=0, schedule="constant")
    next(trainer)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-2, 1e-2 / 4}
    trainer.save()
    resumed = toy_trainer(tmp_path, mup_base_width=4, lr=1e-2, warmup_steps=0, schedule="constant")
    assert resumed.resume()
    next(trainer), next(resumed)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_mup_model_exports_like_any_other(tmp_path):
    model = mup_init_(wide_llama(64), 16)
    lf.export_hf(model, toy_tokenizer(), tmp_path / "hf")
    again, _ = lf.load(tmp_path / "hf")
    idx = torch.arange(16)[None]
    torch.testing.assert_close(again(idx), model(idx))


def test_the_command_line_scales_the_initial_weights(text, tmp_path):
    arguments = ["train", text, "--steps", "1", *TOY, "--set", "lr=1e-9", "--set", "weight_decay=0"]
    for name, settings in (("plain", []), ("mup", ["--set", "mup_base_width=8"])):
        assert main([*arguments, *settings, "--out", str(tmp_path / name)]) == 0
    plain, mup = (load_file(tmp_path / name / "step-000001" / "model.safetensors") for name in ("plain", "mup"))
    weight = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(mup[weight], plain[weight] * math.sqrt(768 / 16), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mup["transformer.ln_f.weight"], plain["transformer.ln_f.weight"] / 2)


def test_mup_refuses_models_whose_output_it_does_not_know():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(5, 4)
            self.head = torch.nn.Linear(4, 5)

    with pytest.raises(ConfigError, match="needs a model with an lm_head, and Other has none"):
        mup_init_(Other(), 4)
    other = Other()
    other.lm_head = other.head
    other.lm_head.weight = other.wte.weight
    with pytest.raises(ConfigError, match="say its path as Other.final_norm_name"):
        mup_init_(other, 4)
    bitnet = lf.BitNet(
        BitNetConfig(vocab_size=5, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ConfigError, match="mup_base_width is for float weights"):
        mup_init_(bitnet, 4)
    with pytest.raises(ConfigError, match=r"mup_base_width \(0\) must be at least 1"):
        mup_init_(toy_model(), 0)
