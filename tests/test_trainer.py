"""The trainer: its arithmetic against a plain torch loop, the laws of accumulation and resumption, and how a run ends."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import TEXT, same, toy_data, toy_model, toy_tokenizer, toy_trainer, weights

from llmforge import CharTokenizer, CheckpointError, ConfigError, DataError, TokenDataset, TrainConfig, Trainer
from llmforge.errors import OutOfMemoryError
from llmforge.training import IGNORED, build_optimizer, learning_rate, list_checkpoints, next_token_loss, read_log
from llmforge.training.signals import stop_signals


def test_a_step_is_what_a_plain_torch_loop_does():
    trainer = toy_trainer(model=toy_model(dropout=0.0), max_steps=3, grad_clip=0.5)
    model = toy_model(dropout=0.0)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, metrics in enumerate(trainer):
        idx, targets = trainer.train_data.batch(step, batch_size=4, seq_len=16, seed=1337)
        loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, trainer.config)
        optimizer.step()
        assert metrics.step == step + 1
        assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
        assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 0.5  # the clip was at work
    for ours, plain in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)  # AdamW divides by small roots


class Masked:
    """Toy data in which most targets of the later rows carry no loss."""

    def __init__(self):
        self.data = toy_data()[0]

    def batch(self, step, **arguments):
        idx, targets = self.data.batch(step, **arguments)
        hide = (
            torch.rand(targets.shape, generator=torch.Generator().manual_seed(step))
            < torch.linspace(0, 0.99, 8)[:, None]
        )
        return idx, targets.masked_fill(hide, IGNORED)


def test_gradient_does_not_depend_on_micro_batch_split():
    models = []
    for micro_batch_size, grad_accum_steps in ((8, 1), (4, 2), (1, 8)):
        config = TrainConfig(
            max_steps=3,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            device="cpu",
            warmup_steps=0,
        )
        model = toy_model(dropout=0.0)
        trainer = Trainer(model, Masked(), config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        losses = [metrics.loss for metrics in trainer]
        models.append((losses, weights(model)))
    for losses, params in models[1:]:
        assert losses == pytest.approx(models[0][0], rel=1e-5)
        for ours, reference in zip(params, models[0][1], strict=True):
            torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-5)
    assert not same(models[0][1], weights(toy_model(dropout=0.0)))


def test_gradient_is_that_of_the_mean_over_the_targets():
    config = TrainConfig(
        max_steps=1, micro_batch_size=2, grad_accum_steps=4, device="cpu", warmup_steps=0, grad_clip=None
    )
    model, reference = toy_model(dropout=0.0), toy_model(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = next(Trainer(model, Masked(), config=config.replace(lr=1.0), optimizer=optimizer))
    idx, targets = Masked().batch(0, batch_size=8, seq_len=16, seed=1337)
    F.cross_entropy(reference(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - theirs.grad, atol=1e-6, rtol=1e-5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_loss_is_a_sum_and_a_count():
    model, idx = toy_model().eval(), torch.randint(0, 20, (2, 16))
    targets = idx.roll(-1, 1)
    targets[:, :5] = IGNORED
    loss_sum, count = next_token_loss(model, (idx, targets))
    reference = F.cross_entropy(model(idx)[:, 5:].flatten(0, 1), targets[:, 5:].flatten())
    assert count.item() == 22
    assert (loss_sum / count).item() == pytest.approx(reference.item(), rel=1e-6)


def test_a_step_without_targets_changes_nothing_but_decay():
    class Nothing(Masked):
        def batch(self, step, **arguments):
            idx, targets = super().batch(step, **arguments)
            return idx, torch.full_like(targets, IGNORED)

    config = TrainConfig(max_steps=1, micro_batch_size=8, weight_decay=0.0, device="cpu")
    model = toy_model()
    before = weights(model)
    metrics = next(Trainer(model, Nothing(), config=config))
    assert same(before, weights(model))
    assert (metrics.loss, metrics.grad_norm) == (0.0, 0.0)


def test_only_matrices_decay():
    model = toy_model()
    decay, rest = build_optimizer(model, TrainConfig(max_steps=1)).param_groups
    assert {p.ndim for p in decay["params"]} == {2}
    assert {p.ndim for p in rest["params"]} == {1}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert sum(len(group["params"]) for group in (decay, rest)) == len(list(model.parameters()))


def test_cosine_schedule_is_nanogpts():
    config = TrainConfig(max_steps=2000, lr=1e-3, min_lr=1e-4, warmup_steps=100)
    for step in (0, 50, 99, 100, 777, 1999):
        if step < 100:  # nanoGPT's get_lr, written out
            expected = 1e-3 * (step + 1) / 101
        else:
            expected = 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / 1900)) * 9e-4
        assert learning_rate(step, config) == pytest.approx(expected, rel=1e-9)


def test_schedules_by_hand():
    def rates(schedule, steps, **settings):
        config = TrainConfig(max_steps=100, lr=1.0, min_lr=0.0, warmup_steps=0, schedule=schedule, **settings)
        return [round(learning_rate(step, config), 6) for step in steps]

    assert rates("linear", [0, 25, 50, 100]) == [1.0, 0.75, 0.5, 0.0]
    assert rates("wsd", [0, 79, 80, 90, 100]) == [1.0, 1.0, 1.0, 0.5, 0.0]
    assert rates("wsd", [49, 75], decay_fraction=0.5) == [1.0, 0.5]
    assert rates("constant", [0, 99]) == [1.0, 1.0]
    assert learning_rate(200, TrainConfig(max_steps=200, lr=1.0)) == pytest.approx(0.1)  # min_lr None = lr / 10


def test_training_lowers_the_loss():
    trainer = toy_trainer(max_steps=150, lr=1e-2)
    losses = [metrics.loss for metrics in trainer]
    assert losses[0] > 2.5
    assert losses[-1] < 1.9


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(micro_batch_size=2, grad_accum_steps=3),
        dict(dtype="bfloat16"),
        dict(dtype="float16"),
        dict(schedule="wsd", max_steps=13),
    ],
    ids=str,
)
def test_resume_equals_uninterrupted_run(tmp_path, settings):
    steps = settings.get("max_steps", 10)
    whole = toy_trainer(tmp_path / "whole", **settings)
    whole.train(progress=False)
    first = toy_trainer(tmp_path / "parts", **settings)
    for metrics in first:
        if metrics.step == 4:
            first.save()
            break
    second = toy_trainer(tmp_path / "parts", model=toy_model(), **settings)
    torch.manual_seed(99)  # what the caller's generator holds must not matter
    assert second.resume()
    assert second.step == 4
    second.train(progress=False)
    assert second.step == steps
    assert same(weights(whole.model), weights(second.model))
    for a, b in zip(whole.optimizer.state.values(), second.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    assert whole.scaler.state_dict() == second.scaler.state_dict()


def test_resume_restores_each_part_of_the_state(tmp_path):
    """The negative control of the test above: without the optimizer's state the end is another."""
    whole = toy_trainer(tmp_path)
    whole.train(progress=False)
    second = toy_trainer(tmp_path, model=toy_model())
    assert second.resume(tmp_path / "step-000008")
    second.optimizer.state.clear()
    for _ in second:
        pass
    assert not same(weights(whole.model), weights(second.model))


def test_the_log_of_a_resumed_run_is_the_log_of_the_whole_run(tmp_path):
    measured = {"tokens_per_second", "seconds", "flops_per_second", "memory_bytes"}

    def lines(folder):
        log = [line for line in read_log(folder / "log.jsonl") if "run" not in line]  # which says when it went on
        return [{k: v for k, v in line.items() if k not in measured} for line in log]

    settings = dict(log_every_steps=1, sample_every_steps=3)
    toy_trainer(tmp_path / "whole", **settings).train(progress=False)
    toy_trainer(tmp_path / "parts", **settings, max_steps=10).train(progress=False)
    with (tmp_path / "parts" / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 11, "loss": 1')  # a killed run may leave half a line
    second = toy_trainer(tmp_path / "parts", model=toy_model(), **settings)
    second.resume(tmp_path / "parts" / "step-000008")
    second.train(progress=False)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole") if "sample" in line] == [3, 6, 9, 10]
    assert [line["step"] for line in lines(tmp_path / "whole") if "val_loss" in line] == [5, 10]


def test_evaluation_and_samples_do_not_change_the_run(tmp_path):
    quiet = toy_trainer(eval_every_steps=None)
    for _ in quiet:
        pass
    busy = toy_trainer(tmp_path, eval_every_steps=1, sample_every_steps=1)
    busy.train(progress=False)
    assert same(weights(quiet.model), weights(busy.model))


def test_training_leaves_the_callers_generator_alone():
    trainer = toy_trainer()
    state = torch.get_rng_state()
    next(trainer)
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_is_the_mean_over_its_batches():
    trainer = toy_trainer(eval_batches=3)
    for _ in range(2):  # the batches are the same ones, whatever the step
        next(trainer)
    evaluation = trainer.evaluate()
    losses = []
    for number in range(3):
        idx, targets = trainer.val_data.batch(number, batch_size=4, seq_len=16, seed=0)
        trainer.model.eval()
        losses.append(F.cross_entropy(trainer.model(idx).flatten(0, 1), targets.flatten()).item())
    assert evaluation.loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert evaluation.perplexity == pytest.approx(math.exp(evaluation.loss))
    assert evaluation.num_targets == 3 * 4 * 16
    assert evaluation.bits_per_byte is None  # ids alone do not know


def test_bits_per_byte_by_hand(tmp_path):
    # "ñ" is one token of two bytes: a loss of ln 2 per token is half a bit per byte.
    (tmp_path / "n.txt").write_text("ñ" * 400, encoding="utf-8")
    tokenizer = CharTokenizer.from_text("ñ")
    data = TokenDataset.from_text_file(tmp_path / "n.txt", tokenizer)
    config = TrainConfig(max_steps=1, device="cpu", eval_batches=1, micro_batch_size=1)

    def coin(model, batch):
        return torch.tensor(math.log(2) * 16), torch.tensor(16)

    trainer = Trainer(toy_model(), data, val_data=data, config=config, loss_fn=coin)
    assert trainer.evaluate().bits_per_byte == pytest.approx(0.5)


def test_a_module_of_ones_own_trains():
    class Bigram(nn.Module):
        def __init__(self, vocab_size):
            super().__init__()
            self.table = nn.Embedding(vocab_size, vocab_size)

        def forward(self, idx):
            return self.table(idx)

    train_data, val_data = toy_data()
    config = TrainConfig(max_steps=60, seq_len=8, lr=0.1, device="cpu")
    trainer = Trainer(Bigram(toy_tokenizer().vocab_size), train_data, val_data=val_data, config=config)
    before = trainer.evaluate().loss
    trainer.train(progress=False)
    assert trainer.evaluate().loss < before - 1


def test_mixed_precision_keeps_float32_weights_and_learns():
    for dtype in ("bfloat16", "float16"):
        trainer = toy_trainer(dtype=dtype, max_steps=60)
        losses = [metrics.loss for metrics in trainer]
        assert losses[-1] < losses[0] - 0.5
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        assert trainer.scaler.is_enabled() == (dtype == "float16")


def test_float16_overflow_skips_the_update_and_lowers_the_scale():
    trainer = toy_trainer(dtype="float16", max_steps=2)
    before, scale = weights(trainer.model), trainer.scaler.get_scale()
    trainer.loss_fn = lambda model, batch: (next_token_loss(model, batch)[0] * torch.inf, torch.tensor(1))
    next(trainer)
    assert same(before, weights(trainer.model))
    assert trainer.scaler.get_scale() == scale / 2


# How a run ends


def test_the_result_says_what_happened(tmp_path):
    result = toy_trainer(tmp_path).train(progress=False)
    assert (result.step, result.stopped_by) == (10, None)
    assert result.checkpoint == tmp_path / "step-000010"
    assert result.best_val_loss == min(
        line["val_loss"] for line in read_log(tmp_path / "log.jsonl") if "val_loss" in line
    )


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    toy_trainer(tmp_path).train(progress=False)
    again = toy_trainer(tmp_path, model=toy_model())
    assert again.resume()
    result = again.train(progress=False)
    assert (result.step, result.train_loss, result.checkpoint) == (10, None, None)


def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
    toy_trainer(tmp_path).train(progress=False)
    with pytest.raises(CheckpointError, match=r"already holds step-000010; go on with resume\(\) or --resume"):
        toy_trainer(tmp_path).train(progress=False)


def test_resume_without_a_checkpoint_says_so(tmp_path):
    assert toy_trainer(tmp_path).resume() is False
    with pytest.raises(CheckpointError, match="is not a folder"):
        toy_trainer(tmp_path).resume(tmp_path / "nothing")


def test_resuming_with_other_settings_warns_which(tmp_path):
    toy_trainer(tmp_path).train(progress=False)
    other = toy_trainer(tmp_path, model=toy_model(), lr=2e-2, keep_last=5)
    with pytest.warns(UserWarning, match=r"not the same run: lr 0.01 -> 0.02$"):
        other.resume()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_the_run_goes_on_exactly(tmp_path, name):
    whole = toy_trainer(tmp_path / "whole", max_steps=40)
    whole.train(progress=False)
    stopped = toy_trainer(tmp_path / "stopped", max_steps=40)
    step = stopped.__class__.__next__

    def interrupt_at_seven(trainer):
        metrics = step(trainer)
        if metrics.step == 7:
            os.kill(os.getpid(), getattr(signal, name))
        return metrics

    stopped.__class__ = type("Interrupted", (Trainer,), {"__next__": interrupt_at_seven})
    result = stopped.train(progress=False)
    assert (result.stopped_by, result.step) == (name, 7)
    assert result.checkpoint == tmp_path / "stopped" / "step-000007"
    resumed = toy_trainer(tmp_path / "stopped", model=toy_model(), max_steps=40)
    resumed.resume()
    resumed.train(progress=False)
    assert same(weights(whole.model), weights(resumed.model))


def test_a_second_signal_interrupts_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)

    def two_signals():
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert stop.requested == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        two_signals()
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(toy_trainer(tmp_path).train(progress=False)))
    thread.start()
    thread.join()
    assert results[0].step == 10


KILLED_RUN = """
import sys
sys.path.insert(0, {tests!r})
from toy import toy_trainer
trainer = toy_trainer({out!r}, max_steps=400, save_every_steps=1, eval_every_steps=50, keep_last=1)
trainer.resume()
trainer.train(progress=False)
"""


def test_a_run_killed_while_saving_resumes_to_the_same_bits(tmp_path):
    """A few kill -9 of a run that saves at every step; benchmarks/kill_and_resume.py does many."""
    whole = toy_trainer(tmp_path / "whole", max_steps=400, save_every_steps=None)
    whole.train(progress=False)
    code = KILLED_RUN.format(tests=os.path.dirname(__file__), out=str(tmp_path / "killed"))
    (tmp_path / "killed").mkdir()
    for wait in (0.1, 0.3):
        before = list_checkpoints(tmp_path / "killed")
        run = subprocess.Popen([sys.executable, "-c", code])
        while list_checkpoints(tmp_path / "killed") == before:
            assert run.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        run.kill()
        run.wait()
    killed = toy_trainer(tmp_path / "killed", model=toy_model(), max_steps=400, save_every_steps=None)
    killed.resume()
    assert 0 < killed.step < 400  # the kills did land in the middle
    killed.train(progress=False)
    assert same(weights(whole.model), weights(killed.model))


# What does not fit together


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_steps=0), r"max_steps \(0\) must be at least 1"),
        (dict(micro_batch_size=0), r"micro_batch_size \(0\) must be at least 1"),
        (dict(lr=0.0), r"lr \(0.0\) must be above 0"),
        (dict(min_lr=1.0), r"min_lr \(1.0\) must be between 0 and lr \(0.01\)"),
        (dict(warmup_steps=-1), r"warmup_steps \(-1\) must be 0"),
        (dict(schedule="cosin"), "schedule .'cosin'. must be"),
        (dict(betas=(0.9, 1.0)), r"betas \(\(0.9, 1.0\)\) must be two numbers"),
        (dict(grad_clip=0.0), r"grad_clip \(0.0\) must be above 0"),
        (dict(dtype="int8"), "dtype .'int8'. must be"),
        (dict(seq_len=17), r"seq_len \(17\) exceeds the model's context \(16\)"),
        (dict(device="tpu9"), "unknown device 'tpu9'"),
        (dict(keep_last=0), r"keep_last \(0\) must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        toy_trainer(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is for machines without CUDA")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="device 'cuda' is not available here"):
        toy_trainer(device="cuda")


def test_a_vocabulary_larger_than_the_models_is_refused():
    with pytest.raises(
        ConfigError, match=r"train_data has a vocabulary of \d+ tokens, the model only 5; build .* vocab_size=\d+"
    ):
        toy_trainer(model=toy_model(vocab_size=5))


def test_too_little_text_is_refused_before_training():
    train_data, _ = toy_data()
    config = TrainConfig(max_steps=1, device="cpu")
    short = type(train_data)(train_data.ids[:16], vocab_size=train_data.vocab_size)
    with pytest.raises(DataError, match="val_data has 16 tokens; one sequence needs 17"):
        Trainer(toy_model(), train_data, val_data=short, config=config)


def test_seq_len_must_be_known():
    with pytest.raises(ConfigError, match="seq_len must be set"):
        Trainer(nn.Embedding(99, 99), toy_data()[0], config=TrainConfig(max_steps=1, device="cpu"))


def test_a_run_without_a_folder_writes_nothing_and_cannot_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = toy_trainer()
    trainer.train(progress=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="save needs an out_dir"):
        trainer.save()


def test_evaluate_and_sample_need_what_they_use():
    trainer = Trainer(toy_model(), toy_data()[0], config=TrainConfig(max_steps=1, device="cpu"))
    with pytest.raises(ConfigError, match="evaluate needs data"):
        trainer.evaluate()
    with pytest.raises(ConfigError, match="a sample needs a tokenizer"):
        trainer.sample()


def test_the_screen_shows_loss_speed_and_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llmforge.training.progress._SECONDS_BETWEEN_LINES", 0.0)
    toy_trainer(tmp_path, sample_every_steps=10).train()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/10  loss ")
    assert re.search(r" tok/s  \d+\.\d GB  ETA 0:\d\d$", lines[0])
    assert any(line.startswith("step 5  val loss ") and "best so far" in line for line in lines)
    assert any(line.startswith("sample> ") for line in lines)


def test_a_diverged_loss_is_null_in_the_log(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=1, log_every_steps=1)
    trainer.loss_fn = lambda model, batch: (next_token_loss(model, batch)[0] * torch.nan, torch.tensor(1))
    trainer.train(progress=False)
    text = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    line = json.loads(text.splitlines()[1])  # after that of the run
    assert line["loss"] is None


def test_the_sample_begins_with_the_prompt(tmp_path):
    assert toy_trainer(tmp_path, sample_prompt="En un ").sample().startswith("En un ")
    assert TEXT.startswith("En un ")


def runs_out_of_memory_in(step):
    """A loss function that does, once `step` steps are done."""
    calls = []

    def loss_fn(model, batch):
        calls.append(model)
        if len(calls) > step:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 11.76 GiB"
            )
        return next_token_loss(model, batch)

    return loss_fn


def test_out_of_memory_says_what_to_change_and_loses_nothing(tmp_path):
    train_data = toy_data()[0]
    reference = toy_trainer(tmp_path / "whole", eval_every_steps=None, save_every_steps=None)
    reference.train(progress=False)
    config = reference.config.replace(out_dir=str(tmp_path / "run"))
    broken = Trainer(
        toy_model(), train_data, config=config, tokenizer=toy_tokenizer(), loss_fn=runs_out_of_memory_in(6)
    )
    message = (
        r"out of memory in step 7 on cpu \(CUDA out of memory\), and the step was not done; try "
        r"activation_checkpointing=blocks .*; .*step-000006 holds the steps before it"
    )
    with pytest.raises(OutOfMemoryError, match=message), pytest.warns(UserWarning, match="with micro-batches of 1"):
        broken.train(progress=False)
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-000006"]
    resumed = Trainer(toy_model(), train_data, config=config, tokenizer=toy_tokenizer())
    assert resumed.resume()
    resumed.train(progress=False)
    assert same(weights(resumed.model), weights(reference.model))


def test_out_of_memory_in_the_evaluation_loses_nothing(tmp_path):
    trainer = toy_trainer(tmp_path / "run", eval_every_steps=4, save_every_steps=None)
    loss_fn, trainer.loss_fn = (
        trainer.loss_fn,
        lambda model, batch: loss_fn(model, batch) if model.training else runs_out_of_memory_in(0)(model, batch),
    )
    with pytest.raises(OutOfMemoryError, match=r"in the evaluation after step 4 on cpu .*step-000004 holds"):
        trainer.train(progress=False)
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-000004"]


def test_weights_of_half_a_step_are_not_saved(tmp_path):
    class Torn(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["params"][0].sum() != start:  # the second step
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            super().step(closure)

    model = toy_model()
    optimizer = Torn(model.parameters(), lr=0.1)
    start = optimizer.param_groups[0]["params"][0].sum()
    config = toy_trainer(tmp_path / "run", eval_every_steps=None, save_every_steps=None).config.replace(warmup_steps=0)
    trainer = Trainer(model, toy_data()[0], config=config, optimizer=optimizer)
    with pytest.raises(
        OutOfMemoryError, match="step 2 on cpu .* some weights have changed already: go on from a checkpoint; try"
    ):
        trainer.train(progress=False)
    assert list_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize(("first", "then"), [("adamw8bit", "adamw"), ("adamw", "adamw8bit")])
def test_a_run_does_not_go_on_with_another_optimizer(first, then, tmp_path):
    trainer = toy_trainer(tmp_path / "run", optimizer=first, eval_every_steps=None)
    next(trainer)
    trainer.save()
    with pytest.raises(
        CheckpointError, match=f"the state of the optimizer '{first}', with which '{then}' cannot go on"
    ):
        toy_trainer(tmp_path / "run", optimizer=then, eval_every_steps=None).resume()


def test_another_runtime_error_is_not_taken_for_out_of_memory():
    def loss_fn(model, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer = Trainer(toy_model(), toy_data()[0], config=TrainConfig(max_steps=1, device="cpu"), loss_fn=loss_fn)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        next(trainer)


class OnlyTheHead:
    """A checkpoint of one matrix."""

    def capture(self, model, tokenizer, copy):
        head = copy(model.lm_head.weight.detach())
        return lambda folder: torch.save({"head": head}, folder / "head.pt")

    def load_(self, folder, model):
        with torch.no_grad():
            model.lm_head.weight.copy_(torch.load(folder / "head.pt", weights_only=True)["head"])


def test_a_checkpoint_holds_what_the_model_files_say(tmp_path):
    def trainer():
        model = toy_model(tie_word_embeddings=False)
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        config = toy_trainer(tmp_path / "run", save_every_steps=4).config
        return Trainer(model, toy_data()[0], config=config, model_files=OnlyTheHead())

    whole = trainer()
    for _ in whole:
        if whole.step == 4:
            whole.save()
    assert sorted(file.name for file in (tmp_path / "run" / "step-000004").iterdir()) == [
        "head.pt",
        "manifest.json",
        "trainer.json",
        "trainer.pt",
    ]
    resumed = trainer()
    assert resumed.resume(tmp_path / "run")
    assert resumed.step == 4
    for _ in resumed:
        pass
    assert same(weights(resumed.model), weights(whole.model))
    assert not same(weights(whole.model), weights(toy_model(tie_word_embeddings=False)))


def test_optimizers_by_name():
    model = toy_model()
    assert type(build_optimizer(model, TrainConfig(max_steps=1))) is torch.optim.AdamW
    assert type(build_optimizer(model, TrainConfig(max_steps=1, optimizer="adamw8bit"))).__name__ == "AdamW8bit"
    with pytest.raises(ConfigError, match="'paged_adamw8bit' needs an NVIDIA GPU and bitsandbytes"):
        build_optimizer(model, TrainConfig(max_steps=1, optimizer="paged_adamw8bit"))
    with pytest.raises(
        ConfigError, match=r"optimizer \('sgd'\) must be 'adamw', 'muon', 'adamw8bit' or 'paged_adamw8bit'"
    ):
        TrainConfig(max_steps=1, optimizer="sgd")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(model, TrainConfig(max_steps=1))


def test_activation_checkpointing_is_the_models_matter():
    class Plain(nn.Module):
        context_length = 16

        def __init__(self):
            super().__init__()
            self.layer = nn.Embedding(100, 100)

        def forward(self, idx):
            return self.layer(idx)

    with pytest.raises(ConfigError, match=r"activation_checkpointing \('blocks'\) needs a model .*Plain has none"):
        Trainer(
            Plain(), toy_data()[0], config=TrainConfig(max_steps=1, activation_checkpointing="blocks", device="cpu")
        )
    runs = []
    for mode in ("none", "blocks", "offload"):
        trainer = toy_trainer(max_steps=3, activation_checkpointing=mode)  # with dropout
        losses = [metrics.loss for metrics in trainer]
        runs.append((losses, weights(trainer.model)))
    for losses, params in runs[1:]:
        assert losses == runs[0][0]
        assert same(params, runs[0][1])
