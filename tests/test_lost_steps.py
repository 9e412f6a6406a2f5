"""Steps that go wrong: values that are not finite, too little memory, time that is up; and steps of which the memory decides the parts."""

import types

import pytest
import torch
from torch import nn
from toy import same, toy_data, toy_model, toy_trainer, weights

from llmforge import ConfigError, TrainConfig, Trainer
from llmforge.errors import DivergedError
from llmforge.training import find_checkpoint, list_checkpoints, next_token_loss, read_log
from llmforge.training import trainer as trainer_module
from llmforge.training.micro_batch import bytes_per_row


def spoiled(bad_steps, spoil, *, micro_steps=1):
    """The loss, spoiled in some steps (0-based)."""
    calls = []

    def loss_fn(model, batch):
        loss_sum, num_targets = next_token_loss(model, batch)
        if model.training:
            calls.append(None)
            if (len(calls) - 1) // micro_steps in bad_steps:
                loss_sum = spoil(loss_sum)
        return loss_sum, num_targets

    return loss_fn


def infinite_gradient(loss_sum):
    return loss_sum + (loss_sum - loss_sum.detach()).sqrt()  # the value stays, the derivative is 1 / 0


SPOILS = {
    "nan": lambda loss_sum: loss_sum * float("nan"),
    "inf": lambda loss_sum: loss_sum * float("inf"),
    "gradient": infinite_gradient,
}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_step_that_is_not_finite_changes_nothing(spoil, optimizer, tmp_path):
    trainer = toy_trainer(tmp_path / "run", max_steps=6, log_every_steps=1, optimizer=optimizer, eval_every_steps=None)
    trainer.loss_fn = spoiled({2}, SPOILS[spoil])
    before = state = None
    for metrics in trainer:
        after = weights(trainer.model)
        moments = [
            v.clone() for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
        ]
        assert metrics.skipped == (metrics.step == 3)
        if before is not None:
            assert same(before, after) == metrics.skipped
            assert same(state, moments) == metrics.skipped
        before, state = after, moments
        assert metrics.loss == metrics.loss or metrics.skipped
    assert all(p.isfinite().all() for p in before)
    assert int(trainer.skipped_steps) == 1


def test_skipped_steps_are_counted_reported_and_remembered(tmp_path):
    trainer = toy_trainer(
        tmp_path / "run", log_every_steps=1, eval_every_steps=None, save_every_steps=5, max_skipped_steps=3
    )
    trainer.loss_fn = spoiled({1, 2, 5, 6, 8}, SPOILS["nan"])
    result = trainer.train(progress=False)
    assert result.skipped_steps == 5
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "lr" in line]
    assert [line["step"] for line in lines if line.get("skipped")] == [2, 3, 6, 7, 9]
    resumed = toy_trainer(tmp_path / "run", max_steps=11, max_skipped_steps=3)
    with pytest.warns(UserWarning, match="max_steps 10 -> 11"):
        resumed.resume()
    assert resumed.train(progress=False).skipped_steps == 5


def test_too_many_in_a_row_end_the_run_at_the_last_good_checkpoint(tmp_path):
    trainer = toy_trainer(
        tmp_path / "run", eval_every_steps=None, save_every_steps=2, max_steps=20, max_skipped_steps=3
    )
    trainer.loss_fn = spoiled(set(range(6, 20)), SPOILS["nan"])
    with pytest.raises(
        DivergedError,
        match=r"in 3 steps in a row, up to step 9.*step-000008 is the last good checkpoint; lower lr \(0.01\)",
    ):
        trainer.train(progress=False)
    resumed = toy_trainer(
        tmp_path / "run", eval_every_steps=None, save_every_steps=2, max_steps=20, max_skipped_steps=3
    )
    resumed.resume()
    assert all(p.isfinite().all() for p in weights(resumed.model))
    assert resumed.train(progress=False).step == 20


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = toy_trainer(tmp_path / "run", eval_every_steps=None, save_every_steps=4)
    with pytest.raises(
        DivergedError,
        match=r"transformer.wte.weight had values that are not finite after step 8.*step-000004 is the last",
    ):
        step = trainer.optimizer.step

        def overflow(*args):
            step(*args)
            if trainer.step == 7:
                trainer.model.transformer.wte.weight.data[0, 0] = float("inf")

        trainer.optimizer.step = overflow
        trainer.train(progress=False)
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-000004"]


def test_a_grad_scaler_that_looks_for_its_scale_is_no_divergence():
    trainer = toy_trainer(dtype="float16", max_steps=14, max_skipped_steps=1)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows float16 some dozen times
    results = [metrics.skipped for metrics in trainer]
    assert results[:5] == [True] * 5
    assert trainer.scaler.get_scale() < 2.0**40


@pytest.mark.parametrize("skipped", [True, False])
def test_a_gpu_decides_by_itself_whether_to_skip(skipped):
    """The fused kernel takes the flag; that of the CPU does, too."""
    by_flag, by_hand = toy_trainer(max_steps=3), toy_trainer(max_steps=3)
    for trainer in (by_flag, by_hand):
        next(trainer)
        torch.manual_seed(0)
        for p in trainer.model.parameters():
            p.grad = torch.randn_like(p)
    before = weights(by_flag.model)
    assert by_flag.optimizer.defaults["fused"]
    by_flag.device = types.SimpleNamespace(type="cuda")
    by_flag._update_weights(torch.tensor(skipped))
    by_hand._update_weights(torch.tensor(skipped))
    assert same(weights(by_flag.model), weights(by_hand.model))
    assert same(before, weights(by_flag.model)) == skipped
    assert not hasattr(by_flag.optimizer, "found_inf")


def fits(rows):
    """The loss on a device that has memory for so many sequences at a time."""

    def loss_fn(model, batch):
        if len(batch[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return next_token_loss(model, batch)

    return loss_fn


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("rows", [3, 2, 1])
def test_a_step_without_enough_memory_is_done_again_in_more_parts(rows, tmp_path):
    reference = toy_trainer(tmp_path / "reference", model=toy_model(dropout=0.0), micro_batch_size=8)
    trainer = toy_trainer(tmp_path / "run", model=toy_model(dropout=0.0), micro_batch_size=8)
    trainer.loss_fn = fits(rows)
    for expected, metrics in zip(reference, trainer, strict=True):
        assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
        assert metrics.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert trainer.micro_batch_size == {3: 2, 2: 2, 1: 1}[rows]
    assert trainer.evaluate().loss == pytest.approx(reference.evaluate().loss, rel=1e-5)
    assert trainer.evaluate().num_targets == reference.evaluate().num_targets
    trainer.save()
    resumed = toy_trainer(tmp_path / "run", model=toy_model(dropout=0.0), micro_batch_size=8)
    resumed.resume()
    assert resumed.micro_batch_size == trainer.micro_batch_size


def test_it_says_that_it_goes_on_in_smaller_parts():
    trainer = toy_trainer(micro_batch_size=8)
    trainer.loss_fn = fits(4)
    with pytest.warns(
        UserWarning, match="out of memory in step 1 on cpu: doing it again, and going on, with micro-batches of 4"
    ):
        next(trainer)


def test_gradients_of_the_attempt_that_failed_do_not_count():
    trainer, reference = (toy_trainer(model=toy_model(dropout=0.0), max_steps=1, micro_batch_size=4) for _ in "ab")
    calls = []

    def second_part_fails(model, batch):
        calls.append(len(batch[0]))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return next_token_loss(model, batch)

    trainer.loss_fn = second_part_fails
    trainer._micro_batch_size = 1
    with pytest.raises(RuntimeError, match="the step was not done"):
        next(trainer)
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer._micro_batch_size = 2
    calls[:] = [2]  # the second part of the first attempt fails
    with pytest.warns(UserWarning, match="micro-batches of 1"):
        metrics = next(trainer)
    assert calls == [2, 2, 2, 1, 1, 1, 1]
    assert metrics.grad_norm == pytest.approx(next(reference).grad_norm, rel=1e-5)


def test_tokens_per_step_is_another_way_to_say_grad_accum_steps():
    said, derived = toy_trainer(grad_accum_steps=3), toy_trainer(tokens_per_step=4 * 3 * 16)
    for trainer in (said, derived):
        list(trainer)
    assert same(weights(said.model), weights(derived.model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(tokens_per_step=100), r"tokens_per_step \(100\) must be a multiple of seq_len \(16\); 96 is the nearest"),
        (dict(tokens_per_step=8), r"must be a multiple of seq_len \(16\); 16 is"),
        (dict(tokens_per_step=96), r"is 6 sequences of 16, no whole number of micro-batches of 4; use 64, "),
        (dict(tokens_per_step=64, grad_accum_steps=2), "say the same thing; leave one out"),
        (dict(micro_batch_size="auto"), "or 'auto' together with tokens_per_step"),
        (dict(micro_batch_size="most", tokens_per_step=64), r"micro_batch_size \('most'\) must be"),
        (dict(micro_batch_size=0), r"micro_batch_size \(0\) must be at least 1"),
        (dict(max_skipped_steps=0), r"max_skipped_steps \(0\) must be at least 1"),
        (dict(max_seconds=0.0), r"max_seconds \(0.0\) must be above 0"),
    ],
)
def test_steps_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        toy_trainer(**settings)


def test_what_a_sequence_keeps_for_the_backward_pass():
    """By hand: a matrix product keeps its input, a ReLU its output, which is the next input: the same storage."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5), nn.Sigmoid())

    def loss_fn(model, batch):
        return model(batch[0]).sum(), torch.tensor(1)

    x = torch.randn(3, 10)
    assert bytes_per_row(loss_fn, model, [x]) == 4 * 3 * (10 + 20 + 5)
    twice = bytes_per_row(next_token_loss, toy_model(), toy_data()[0].batch(0, batch_size=4, seq_len=16, seed=0))
    once = bytes_per_row(next_token_loss, toy_model(), toy_data()[0].batch(0, batch_size=2, seq_len=16, seed=0))
    assert 1.8 < twice / once < 2.1


@pytest.mark.parametrize(("room", "size"), [(0, 1), (2.5, 2), (3.5, 3), (5, 4), (11, 6), (100, 12)])
def test_auto_takes_the_largest_equal_parts_that_fit(room, size, monkeypatch, tmp_path):
    settings = dict(micro_batch_size="auto", tokens_per_step=12 * 16, model=toy_model(dropout=0.0))
    trainer = toy_trainer(tmp_path / "run", **settings)
    row = bytes_per_row(next_token_loss, trainer.model, trainer.train_data.batch(0, batch_size=1, seq_len=16, seed=0))
    trained = 4 * sum(p.numel() for p in trainer.model.parameters())
    monkeypatch.setattr(trainer_module, "free_bytes", lambda device: 3 * trained + room * row)
    assert trainer.micro_batch_size == size
    reference = toy_trainer(micro_batch_size=12, model=toy_model(dropout=0.0))
    assert next(trainer).loss == pytest.approx(next(reference).loss, rel=1e-5)
    trainer.save()
    monkeypatch.setattr(trainer_module, "free_bytes", lambda device: 0)
    resumed = toy_trainer(tmp_path / "run", **settings)
    resumed.resume()
    assert resumed.micro_batch_size == size  # the same bits, whatever is free today


def test_auto_on_this_machine():
    trainer = toy_trainer(micro_batch_size="auto", tokens_per_step=16 * 16)
    state = torch.get_rng_state()
    assert trainer.micro_batch_size == 16
    assert torch.equal(state, torch.get_rng_state())


def test_time_that_is_up(tmp_path):
    settings = dict(max_steps=10_000, eval_every_steps=None, save_every_steps=None)
    trainer = toy_trainer(tmp_path / "run", max_seconds=1.0, **settings)
    result = trainer.train(progress=False)
    assert result.stopped_by == "max_seconds"
    assert 0 < result.step < 10_000
    assert 0.5 < result.seconds < 5.0  # a slow machine may need long for a save
    assert find_checkpoint(tmp_path / "run").name == f"step-{result.step:06d}"
    resumed = toy_trainer(tmp_path / "run", **settings)
    assert resumed.resume()
    assert resumed.step == result.step


def test_modules_without_sequences_need_no_seq_len():
    class Points:
        def batch(self, step, *, batch_size, seq_len, seed):
            x = torch.randn(batch_size, 3, generator=torch.Generator().manual_seed(step))
            return x, x.sum(1, keepdim=True)

    def squared_error(model, batch):
        x, y = batch
        return (model(x) - y).square().sum(), torch.tensor(len(x))

    torch.manual_seed(0)
    config = TrainConfig(max_steps=200, micro_batch_size=16, lr=3e-2, weight_decay=0.0, device="cpu")
    result = Trainer(nn.Linear(3, 1), Points(), config=config, loss_fn=squared_error).train(progress=False)
    assert result.train_loss < 1e-3
    with pytest.raises(ConfigError, match="seq_len must be set"):
        Trainer(nn.Linear(3, 1), Points(), config=config)
