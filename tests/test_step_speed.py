"""What makes a step fast changes nothing of what it computes: compiled steps, batches made ahead, TF32, threads, the default loss."""

import copy
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from toy import same, toy_data, toy_model, toy_trainer, weights

from llmforge import ConfigError, TrainConfig, Trainer
from llmforge.errors import DataError
from llmforge.models import Llama, LlamaConfig
from llmforge.nn import Documents
from llmforge.training import IGNORED, chunked_next_token_loss, next_token_loss
from llmforge.training import compiling as compiling_module
from llmforge.training import loss as loss_module
from llmforge.training.batches import Batches, on_device
from llmforge.training.compiling import CompiledModel, compiling_pays
from llmforge.training.devices import arithmetic, arithmetic_dtype, own_randomness
from llmforge.training.loss import default_loss

CPU = torch.device("cpu")


def toy_llama() -> Llama:
    torch.manual_seed(0)
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return Llama(LlamaConfig(**shape, max_position_embeddings=16))


# --- Compiled steps


@pytest.fixture
def compilations(monkeypatch):
    """Counts graphs that are compiled, and runs them without a C++ compiler."""
    torch._dynamo.reset()
    counters.clear()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=counter, **options))
    loss_module._compiled_cross_entropy.cache_clear()
    yield counter
    loss_module._compiled_cross_entropy.cache_clear()


@pytest.mark.parametrize(
    ("build", "loss_fn"),
    [
        pytest.param(toy_model, chunked_next_token_loss, id="GPT, in chunks"),
        pytest.param(toy_llama, next_token_loss, id="Llama"),
    ],
)
def test_a_compiled_step_is_the_eager_step_in_one_graph(compilations, build, loss_fn):
    model, twin = build(), copy.deepcopy(build())
    names = list(model.state_dict())
    config = TrainConfig(max_steps=3, micro_batch_size=2, grad_accum_steps=2, device="cpu", warmup_steps=0)
    trainer = Trainer(model, toy_data()[0], config=config.replace(compile=True), loss_fn=loss_fn)
    eager = Trainer(twin, toy_data()[0], config=config.replace(compile=False), loss_fn=loss_fn)
    for metrics, expected in zip(trainer, eager, strict=True):
        assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)  # the compiled loss sums in another order
    # The model, and for the loss in chunks its cross-entropy: each once for all steps and micro-steps.
    assert compilations.frame_count == (2 if loss_fn is chunked_next_token_loss else 1)
    assert compilations.op_count > 20
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("mode", ["blocks", "offload"])
def test_compiled_steps_recompute_blocks(compilations, mode):
    config = TrainConfig(max_steps=2, micro_batch_size=2, device="cpu", activation_checkpointing=mode)
    found = [
        [m.loss for m in Trainer(toy_model(dropout=0.0), toy_data()[0], config=config.replace(compile=on))]
        for on in (True, False)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    if mode == "blocks":
        assert not counters["graph_break"]


def test_outside_of_steps_the_model_is_not_compiled(compilations):
    trainer = toy_trainer(model=toy_model(), compile=True, max_steps=4)
    before = set(vars(trainer.model))
    next(trainer)
    graphs = compilations.frame_count
    assert graphs == 1
    trainer.evaluate()
    trainer.model.eval()
    for length in (3, 5, 7):
        trainer.model(torch.zeros(1, length, dtype=torch.int64))
    copy.deepcopy(trainer.model)
    next(trainer)
    assert compilations.frame_count == graphs
    assert set(vars(trainer.model)) == before


def test_a_model_that_was_compiled_before_stays_so(compilations):
    model = toy_model()
    model.compile()
    own = vars(model)["_compiled_call_impl"]
    with CompiledModel(model, insist=True):
        assert vars(model)["_compiled_call_impl"] is not own
    assert vars(model)["_compiled_call_impl"] is own


def test_modules_of_torch_itself_are_compiled_too(compilations):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())  # torch skips this one's own frame
    with CompiledModel(model, insist=True):
        model(torch.randn(2, 4))
    assert compilations.frame_count == 1


def test_many_models_of_a_process_are_each_compiled(compilations):
    limit = torch._dynamo.config.recompile_limit
    for width in range(1, limit + 3):
        model = nn.Sequential(nn.Linear(width, 4))
        with CompiledModel(model, insist=True):
            model(torch.randn(2, width))
    assert compilations.frame_count == limit + 2


def test_packed_rows_and_caches_are_not_compiled(compilations):
    model = toy_model().eval()
    idx = torch.arange(16)[None] % 7
    positions = torch.cat([torch.arange(10), torch.arange(6)])[None]
    with CompiledModel(model, insist=True):
        chunked_next_token_loss(model, [idx, idx.masked_fill(idx == 3, IGNORED), positions])
    assert compilations.frame_count == 0


def test_without_a_compiler_one_line_says_so_and_training_goes_on(tmp_path):
    """For real: a process that finds no C++ compiler, and one whose compiler fails."""
    program = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("always")
from toy import toy_trainer, toy_model
for on in (True, False):
    print([m.loss for m in toy_trainer(model=toy_model(), compile=on, max_steps=2, grad_accum_steps=2)])
"""
    environment = {
        **os.environ,
        "PATH": str(tmp_path),
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    compiled, eager = run.stdout.splitlines()
    assert compiled == eager
    said = [line for line in run.stderr.splitlines() if "without torch.compile" in line]
    assert len(said) == 1, run.stderr
    assert "there is no working C++ compiler" in said[0]


def with_errors(monkeypatch, make_error):
    def compile(function, **options):
        def fail(*args, **kwargs):
            raise make_error()

        return fail

    monkeypatch.setattr(torch, "compile", compile)


def test_errors_of_the_compiler_about_the_model_are_raised_where_compiling_was_asked_for(monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError

    with_errors(monkeypatch, lambda: InternalTorchDynamoError("a bug\nin many lines"))
    with pytest.raises(InternalTorchDynamoError, match="a bug"):
        next(toy_trainer(model=toy_model(), compile=True))
    # By default it is a warning of one line.
    monkeypatch.setattr("llmforge.training.trainer.compiling_pays", lambda device, *, micro_steps: True)
    trainer = toy_trainer(model=toy_model(), compile=None, max_steps=2)
    with pytest.warns(UserWarning, match="^training without torch.compile: a bug$"):
        losses = [m.loss for m in trainer]
    assert losses == [m.loss for m in toy_trainer(model=toy_model(), compile=False, max_steps=2)]
    # Triton's launchers need a C compiler, and say so in a RuntimeError.
    no_gcc = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    with_errors(monkeypatch, lambda: BackendCompilerFailed(lambda: None, no_gcc, None))
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        next(toy_trainer(model=toy_model(), compile=True))


def test_errors_of_the_users_own_code_are_not_the_compilers(monkeypatch):
    with_errors(monkeypatch, lambda: ValueError("my own mistake"))
    monkeypatch.setattr("llmforge.training.trainer.compiling_pays", lambda device, *, micro_steps: True)
    for asked_for in (True, None):
        with pytest.raises(ValueError, match="my own mistake"), warnings.catch_warnings():
            warnings.simplefilter("error")
            next(toy_trainer(model=toy_model(), compile=asked_for))


def test_where_compiling_pays(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(compiling_module, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert compiling_pays(cuda, micro_steps=1000)
    assert not compiling_pays(cuda, micro_steps=999)
    assert not compiling_pays(CPU, micro_steps=10**6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not compiling_pays(cuda, micro_steps=1000)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(compiling_module, "find_spec", lambda name: None)
    assert not compiling_pays(cuda, micro_steps=1000)


def test_the_loss_that_is_compiled_is_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(6, 11, requires_grad=True)
    targets = torch.tensor([3, IGNORED, 0, 10, IGNORED, 5])
    loss_sum, gradient = loss_module._fused_cross_entropy(logits.detach(), targets)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss_sum, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_chunks_of_compiled_loss_are_of_one_length():
    assert [loss_module._even(n, most) for n, most in ((12288, 667), (100, 100), (64, 1000), (7, 4))] == [
        512, 100, 1000, 4,
    ]  # fmt: skip


# --- The loss of a Trainer that is given none


def test_the_default_loss_is_in_chunks_where_the_vocabulary_is_large():
    large = toy_model(vocab_size=loss_module._LARGE_VOCABULARY)
    assert default_loss(large) is chunked_next_token_loss
    assert default_loss(toy_model()) is next_token_loss
    plain = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    assert default_loss(plain) is next_token_loss
    plain.lm_head = nn.Linear(4, 10**6)  # without features there are no chunks
    assert default_loss(plain) is next_token_loss
    losses = [[m.loss for m in toy_trainer_of(copy.deepcopy(large), loss_fn)] for loss_fn in (None, next_token_loss)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def toy_trainer_of(model, loss_fn):
    config = TrainConfig(max_steps=2, micro_batch_size=2, device="cpu")
    return Trainer(model, toy_data()[0], config=config, loss_fn=loss_fn)


# --- Batches


def test_batches_made_ahead_are_those_asked_for():
    made = []

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        return (torch.full((2, 3), step),)

    batches = Batches(CPU, ahead=True, pin=lambda tensor: tensor + 100)
    source = object()
    found = [int(batches.get(step, make, source=source, is_last=step == 3)[0][0, 0]) for step in range(4)]
    batches.wait()
    assert found == [100, 101, 102, 103]
    assert made == [(0, True), (1, False), (2, False), (3, False)]  # each once, none beyond the last


def test_a_batch_made_ahead_for_another_step_or_other_data_is_not_used():
    batches = Batches(CPU, ahead=True)
    first, second = (lambda step: (torch.tensor([step]),)), (lambda step: (torch.tensor([-step]),))
    batches.get(0, first, source=first, is_last=False)
    assert int(batches.get(7, first, source=first, is_last=False)[0]) == 7
    assert int(batches.get(8, second, source=second, is_last=False)[0]) == -8


def test_what_goes_wrong_in_the_thread_is_said_in_its_own_step():
    def make(step):
        if step == 1:
            raise DataError("the file of step 1 is gone")
        return (torch.zeros(1),)

    batches = Batches(CPU, ahead=True)
    batches.get(0, make, source=make, is_last=False)
    batches.wait()  # says nothing yet
    with pytest.raises(DataError, match="the file of step 1 is gone"):
        batches.get(1, make, source=make, is_last=False)
    assert int(batches.get(2, make, source=make, is_last=True)[0]) == 0


def test_a_run_with_batches_made_ahead_is_the_same_run(tmp_path):
    runs = []
    for ahead in (False, True):
        trainer = toy_trainer(tmp_path / str(ahead), model=toy_model(), max_steps=9, save_every_steps=4, keep_last=9)
        trainer._batches = Batches(CPU, ahead=ahead, pin=torch.clone)
        trainer.train(progress=False)
        assert trainer.resume(tmp_path / str(ahead) / "step-000004")
        for _ in trainer:
            pass
        runs.append(weights(trainer.model))
    assert same(*runs)


def test_documents_and_answers_are_read_from_the_hosts_copy(monkeypatch):
    """On a device both would wait for it. The meta device stands for one: it has no values to wait for."""
    positions = torch.cat([torch.arange(5), torch.arange(3)])[None]
    targets = torch.tensor([[1, IGNORED, 2, 3, IGNORED, 4, 5, 6]])
    there = on_device([positions, targets], torch.device("meta"))
    assert Documents(there[0]).lengths == (5, 3)
    answers = loss_module._answers(there[1])
    assert answers.device.type == "meta"
    assert len(answers) == 6
    assert loss_module._answers(targets).tolist() == [0, 2, 3, 5, 6, 7]


# --- Arithmetic


def test_tf32_is_for_cuda_and_leaves_no_trace():
    with pytest.raises(ConfigError, match="'tf32' is of NVIDIA's matrix units, and the device is cpu"):
        toy_trainer(dtype="tf32")
    assert arithmetic_dtype("tf32", torch.device("cuda")) is torch.float32
    for before in ("highest", "medium"):
        torch.set_float32_matmul_precision(before)
        try:
            with pytest.raises(KeyError), arithmetic(tf32=True):
                assert torch.backends.cuda.matmul.allow_tf32
                raise KeyError
            assert torch.get_float32_matmul_precision() == before
        finally:
            torch.set_float32_matmul_precision("highest")


def test_num_threads_holds_during_steps_alone():
    seen = []

    def loss_fn(model, batch):
        seen.append(torch.get_num_threads())
        return next_token_loss(model, batch)

    before = torch.get_num_threads()
    train_data, val_data = toy_data()
    config = TrainConfig(max_steps=1, micro_batch_size=2, eval_batches=1, device="cpu", num_threads=before + 1)
    trainer = Trainer(toy_model(), train_data, val_data=val_data, config=config, loss_fn=loss_fn)
    next(trainer)
    trainer.evaluate()
    assert seen == [before + 1, before + 1]
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match=r"num_threads \(0\) must be at least 1"):
        TrainConfig(max_steps=1, num_threads=0)


def test_own_randomness_is_torchs_manual_seed_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(1)
    undisturbed = torch.rand(2)
    torch.manual_seed(1)
    first = torch.rand(1)
    with pytest.raises(KeyError), own_randomness(5, CPU):
        assert torch.equal(torch.rand(3), expected)
        raise KeyError
    assert torch.equal(torch.cat([first, torch.rand(1)]), undisturbed)


def test_a_step_puts_all_of_the_model_into_training_mode():
    trainer = toy_trainer(model=toy_model())
    trainer.model.transformer.h[0].eval()
    next(trainer)
    assert all(module.training for module in trainer.model.modules())
