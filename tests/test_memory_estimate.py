"""Memory of a tuning run: a dry run beside a real one, a case by hand, torch's own profiler, and what fits."""

import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from llmforge import ConfigError, GPTConfig
from llmforge.cli.dry_run import dry_run, flash_attention_scratch, profile_run
from llmforge.errors import OutOfMemoryError
from llmforge.finetune import LoRAConfig, NF4Config
from llmforge.finetune.memory import (
    GPU,
    ITEMS,
    LADDER,
    GiB,
    MemoryEstimate,
    MemoryPlan,
    MemoryTracker,
    estimate_memory,
    extrapolated,
    fit,
    profile_memory,
)
from llmforge.models import Llama, LlamaConfig
from llmforge.training import TrainConfig, Trainer, chunked_next_token_loss

T = 64


def small_llama(layers: int = 4) -> Llama:
    torch.manual_seed(0)
    return Llama(
        LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=T,
        )
    )  # fmt: skip


def loop(mode: str, layers: int = 4):
    """A plain training loop: two micro-steps and AdamW."""

    def build(tracker):
        model = small_llama(layers)
        model.set_activation_checkpointing(mode)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tracker.watch(model, optimizer, blocks=model.model.layers)
        idx = torch.zeros(2, T, dtype=torch.long)

        def step():
            for _ in range(2):
                logits = model(idx)
                nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()
                del logits
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


# The tracker


def test_memory_of_one_linear_layer_is_what_arithmetic_says():
    n, rows = 256, 512

    def build(tracker):
        model = nn.Linear(n, n, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tracker.watch(model, optimizer)
        x = torch.zeros(rows, n, requires_grad=True)
        x.grad = torch.zeros(rows, n)

        def step():
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    for fake in (True, False):
        estimate = estimate_memory(build, fake=fake)
        weights = n * n * 4
        assert estimate.items["linear layers"] == weights
        assert (
            estimate.items["optimizer state"] == 2 * weights + 512
        )  # two moments, and the number of the step in a block
        # x, its gradient; y, kept by the square, whose own gradient is 2 y * 1: y.pow(1) and its product with the ones of the sum, and
        # the scalars of the sum, of its gradient and of the loss.
        activations = estimate.items["activations"]
        assert activations >= 4 * rows * n * 4
        assert activations <= 6 * rows * n * 4 + 8 * 512


def test_gradients_are_counted_once_they_are_there_and_no_longer_once_they_are_gone():
    with MemoryTracker() as tracker:
        model = nn.Linear(128, 128, bias=False)
        tracker.watch(model)
        before = tracker.live_bytes
        model(torch.ones(1, 128)).sum().backward()
        assert tracker.live_bytes == before + 128 * 128 * 4
        model.zero_grad()
        assert tracker.live_bytes == before


def test_what_a_view_shows_is_counted_once_and_until_the_last_view_dies():
    with MemoryTracker() as tracker:
        x = torch.ones(1000)
        assert tracker.live_bytes == 4096  # 4000 bytes in blocks of 512
        view = x.view(10, 100)[3:]
        assert tracker.live_bytes == 4096
        del x
        assert tracker.live_bytes == 4096
        del view
        assert tracker.live_bytes == 0


@pytest.mark.parametrize("mode", ["none", "blocks", "offload"])
def test_dry_run_sees_every_byte_that_a_real_run_does(mode):
    fake, real = profile_memory(loop(mode)), profile_memory(loop(mode), fake=False)
    assert fake.parts == real.parts
    assert (fake.estimate.host_bytes > 0) == (mode == "offload")


@pytest.mark.parametrize("mode", ["none", "blocks"])
def test_many_layers_are_extrapolated_to_the_byte(mode):
    expected = profile_memory(loop(mode, layers=6)).estimate
    assert extrapolated(lambda layers: profile_memory(loop(mode, layers=layers)), 6).estimate == expected
    assert expected != profile_memory(loop(mode, layers=5)).estimate


def test_peak_is_that_of_the_profiler_of_torch():
    """The profiler hears of allocations from the allocator itself; kernels' own scratch, which it hears of too, is small here."""
    tracker = MemoryTracker(block_bytes=1)
    with tracker:
        step = loop("none")(tracker)
        step()
        start = tracker.live_bytes
        tracker.start()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        grown = tracker.profile.estimate.peak_bytes - start
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert grown == pytest.approx(peak, rel=0.02)


# The run that llmforge finetune would do

QLORA = dict(nf4=NF4Config(), lora=LoRAConfig(r=8))
PLANS = {
    "as it comes": (QLORA, {}),
    "nothing saved": (QLORA, dict(activation_checkpointing="none", chunked_loss=False)),
    "everything saved": (
        QLORA,
        dict(
            embedding_on_host=True,
            activation_checkpointing="offload",
            optimizer="adamw8bit",
            mlp_tiles=4,
            grad_accum_steps=2,
        ),
    ),
    "all weights": (dict(nf4=None, lora=None), dict(grad_accum_steps=2)),
    "16-bit base, two rows": (dict(nf4=None, lora=LoRAConfig(r=8), dtype=torch.bfloat16), dict(micro_batch_size=2)),
    "DoRA with dropout, and a head of its own": (
        dict(
            nf4=NF4Config(), lora=LoRAConfig(r=8, use_dora=True, lora_dropout=0.1, modules_to_save=("lm_head",))
        ),
        {},
    ),
}  # fmt: skip


def llama_config(layers: int = 2, **changes) -> LlamaConfig:
    shape = dict(
        vocab_size=1024, hidden_size=128, intermediate_size=320, num_hidden_layers=layers, num_attention_heads=4
    )
    return LlamaConfig(**{**shape, "num_key_value_heads": 2, "max_position_embeddings": 512, **changes})


@pytest.mark.parametrize("name", PLANS)
def test_dry_run_of_a_tuning_run_is_the_run(name):
    how, switches = PLANS[name]
    plan = MemoryPlan(seq_len=128, **switches)
    fake, real = (
        profile_run(llama_config(), plan=plan, answer_tokens=50, device_type="cpu", fake=fake, **how).estimate
        for fake in (True, False)
    )
    # A process that has values keeps tables of codes from its first 4-bit layer on.
    assert 0 <= real.peak_bytes - fake.peak_bytes <= (8192 if how["nf4"] else 0)
    assert fake.host_bytes == real.host_bytes
    for item in ITEMS:
        assert abs(fake.items.get(item, 0) - real.items.get(item, 0)) <= 8192


def test_dry_run_of_a_gpt_is_the_run():
    config = GPTConfig(vocab_size=1024, block_size=128, n_layer=2, n_head=4, n_embd=128)
    plan = MemoryPlan(seq_len=128)
    fake, real = (
        profile_run(config, plan=plan, device_type="cpu", packed=False, fake=fake, **QLORA).estimate
        for fake in (True, False)
    )
    assert 0 <= real.peak_bytes - fake.peak_bytes <= 8192


def test_one_micro_step_with_gradients_and_state_is_what_two_steps_of_two_come_to():
    plan = MemoryPlan(seq_len=128, grad_accum_steps=2)

    class Rows:
        def batch(self, step, *, batch_size, seq_len, seed):
            idx = torch.zeros(batch_size, seq_len, dtype=torch.int64)
            return idx, idx.clone(), torch.arange(seq_len).expand(batch_size, -1).contiguous()

    def build(tracker):
        config = TrainConfig(
            max_steps=2,
            micro_batch_size=1,
            grad_accum_steps=2,
            seq_len=128,
            device="cpu",
            activation_checkpointing="blocks",
        )
        trainer = Trainer(Llama(llama_config()), Rows(), config=config, loss_fn=chunked_next_token_loss)
        tracker.watch(trainer.model, trainer.optimizer)
        return lambda: next(trainer)

    long_way = estimate_memory(build, fake=False)
    short = profile_run(llama_config(), plan=plan, nf4=None, lora=None, device_type="cpu").estimate
    second_row = 3 * 128 * 8
    assert 0 <= long_way.peak_bytes - short.peak_bytes <= second_row + 4 * 512


@pytest.mark.parametrize("name", ["everything saved", "all weights"])
def test_dry_run_of_many_layers_is_extrapolated_to_the_byte(name):
    how, switches = PLANS[name]
    plan = MemoryPlan(seq_len=128, **switches)
    whole = profile_run(llama_config(6), plan=plan, **how).estimate
    assert dry_run(llama_config(6), plan=plan, **how) == whole


def test_peak_that_moves_to_another_part_as_layers_are_added_is_found():
    """With few layers the logits are the peak, with many the gradients of all weights: the peak itself is no straight line."""
    how = dict(nf4=None, lora=None, plan=MemoryPlan(seq_len=256, chunked_loss=False), device_type="cpu")

    def config(layers: int) -> LlamaConfig:
        return llama_config(layers, vocab_size=4096, tie_word_embeddings=True)

    three, four, whole = (profile_run(config(layers), **how).estimate for layers in (3, 4, 14))
    assert "gradients" not in four.items
    assert "gradients" in whole.items
    assert dry_run(config(14), **how) == whole
    assert whole.peak_bytes > three.peak_bytes + 11 * (four.peak_bytes - three.peak_bytes)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_what_stands_for_the_gpu_stands_in_the_backward_pass_too(packed, chunked):
    """What is computed again there keeps as many tensors as before, or torch refuses; and fused norms never take more than the CPU's way."""
    plan = MemoryPlan(seq_len=256, chunked_loss=chunked)
    cuda, cpu = (
        profile_run(
            llama_config(), plan=plan, packed=packed, dtype=torch.bfloat16, device_type=device, **QLORA
        ).estimate
        for device in ("cuda", "cpu")
    )
    assert (
        cuda.peak_bytes - cuda.items["kernel workspaces"] <= cpu.peak_bytes + 4 * 256
    )  # the float per token that a fused norm keeps
    assert "kernel workspaces" not in cpu.items
    assert nn.functional.rms_norm.__module__ == "torch.nn.functional"  # and all is as it was


def test_flash_attention_in_the_backward_pass_sums_in_float32():
    """Two calls of one shape, by hand: 8 query heads over 2, and 2 over 2; rows are padded to 128, heads to 32 values."""
    B, H, K, rows, D = 1, 8, 2, 130, 40
    q, k = torch.empty(B, H, rows, D, dtype=torch.bfloat16), torch.empty(B, K, rows, D, dtype=torch.bfloat16)
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    repeated = 2 * H * rows * D * 2
    assert flash_attention_scratch(op, [None, q, k]) == H * 256 * (64 * 4 + 4) + repeated
    assert flash_attention_scratch(op, [None, q[:, :K], k]) == K * 256 * (64 * 4 + 4)
    assert flash_attention_scratch(torch.ops.aten.mul.Tensor, [q, q]) == 0


def test_blocks_that_differ_are_not_extrapolated():
    lora = LoRAConfig(r=8, target_modules=r"model\.layers\.[0-2]\.mlp\.up_proj")
    plan = MemoryPlan(seq_len=128)
    whole = profile_run(llama_config(6), plan=plan, nf4=None, lora=lora).estimate
    assert dry_run(llama_config(6), plan=plan, nf4=None, lora=lora) == whole


def test_memory_of_a_long_sequence_grows_with_its_length_alone():
    """No mask or score of T times T: three lengths lie on a line."""
    config = llama_config(max_position_embeddings=8192)
    lengths = (2048, 4096, 8192)
    one, two, four = (
        profile_run(config, plan=MemoryPlan(seq_len=T), answer_tokens=64, **QLORA).estimate.peak_bytes for T in lengths
    )
    assert four - two == pytest.approx(2 * (two - one), rel=1e-3)
    assert one < two


def test_weights_of_llama_3_8b_are_what_arithmetic_says():
    plan = MemoryPlan(seq_len=1024, embedding_on_host=True, optimizer="adamw8bit", grad_accum_steps=2)
    estimate = dry_run(LlamaConfig.preset("llama-3-8b"), nf4=NF4Config(), lora=LoRAConfig(r=32), plan=plan)
    C, F, kv, L, V, r = 4096, 14_336, 1024, 32, 128_256, 32
    shapes = [(C, C), (C, kv), (C, kv), (C, C), (C, F), (C, F), (F, C)]
    weights = L * sum(a * b for a, b in shapes)
    assert weights == 6_979_321_856
    # Half a byte, a byte per 64, four per 64 * 256, and an offset in a block of its own per layer.
    assert estimate.items["linear layers"] == weights // 2 + weights // 64 + weights // 64 // 256 * 4 + 7 * L * 512
    assert estimate.items["embeddings and head"] == V * C * 2
    lora = L * sum(r * (a + b) for a, b in shapes)
    assert lora == 83_886_080
    assert estimate.items["adapters"] == estimate.items["gradients"] == lora * 4
    assert estimate.items["optimizer state"] == lora * 2 + 2 * lora // 256 * 4
    assert estimate.host_bytes >= V * C * 2
    assert estimate.peak_bytes <= 5.8 * GiB


# What fits


def test_each_switch_of_the_ladder_saves_memory_and_none_costs_any():
    config = llama_config(2, vocab_size=8192, max_position_embeddings=2048)
    plan = MemoryPlan(seq_len=2048, chunked_loss=False, activation_checkpointing="none", grad_accum_steps=2)
    how = dict(nf4=NF4Config(), lora=LoRAConfig(r=32), answer_tokens=512)
    needed = [dry_run(config, plan=plan, **how).peak_bytes]
    for rung in LADDER:
        plan = rung.on(plan)
        needed.append(dry_run(config, plan=plan, **how).peak_bytes)
    assert all(after <= before for before, after in pairwise(needed))
    assert needed[0] > 4 * needed[-1]
    assert sum(after < before for before, after in pairwise(needed)) >= 5


def needs(plan: MemoryPlan) -> MemoryEstimate:
    """A model by hand, in GiB: 4 and, for what is not saved, 2, 1, 3, 1, 0.5 and 1.5, per row of 1024 tokens where it grows with them."""
    rows = plan.micro_batch_size * plan.seq_len / 1024
    total = 4 + rows * (0.5 + 2 * (not plan.chunked_loss) + 1.5 * (plan.mlp_tiles == 1))
    total += rows * {"none": 4, "blocks": 1, "offload": 0}[plan.activation_checkpointing]
    total += 1 * (not plan.embedding_on_host) + 0.5 * (plan.optimizer == "adamw")
    return MemoryEstimate({"activations": int(total * GiB)})


WASTEFUL = MemoryPlan(chunked_loss=False, activation_checkpointing="none")  # 13.5 GiB


@pytest.mark.parametrize(
    ("usable", "changes"),
    [
        (14, []),
        (12, ["chunked_loss"]),  # 11.5
        (10, ["activation_checkpointing"]),  # alone: 10.5 as blocks, 9.5 offloaded; the chunked loss would leave 11.5
        (9, ["chunked_loss", "embedding_on_host", "activation_checkpointing"]),  # 7.5; 10.5 with two
        (7, ["chunked_loss", "embedding_on_host", "activation_checkpointing"]),  # 6.5, offloaded
    ],
)
def test_fit_takes_one_switch_that_is_enough_or_the_shortest_beginning_of_the_ladder(usable, changes):
    plan, rungs = fit(WASTEFUL, int(usable * GiB), needs)
    assert [name for rung in rungs for name in rung.change] == changes
    assert needs(plan).fits(int(usable * GiB))
    replayed = WASTEFUL
    for rung in rungs:
        replayed = rung.on(replayed)
    assert replayed == plan


def test_fit_makes_micro_batches_smaller_when_the_ladder_ends():
    plan, rungs = fit(MemoryPlan(micro_batch_size=8, grad_accum_steps=3), int(5.1 * GiB), needs)
    assert (plan.micro_batch_size, plan.grad_accum_steps) == (2, 12)
    assert rungs[-1].name == "micro-batches of 2, 12 per step"


def test_fit_says_what_the_least_demand_is_and_how_long_rows_may_be():
    plan = MemoryPlan(seq_len=8192, micro_batch_size=2)
    with pytest.raises(
        OutOfMemoryError, match=r"8.00 GiB are the least .* 5.50 GiB are usable; seq_len=2048 would fit"
    ):
        fit(plan, int(5.5 * GiB), needs)
    with pytest.raises(OutOfMemoryError, match="take a smaller model"):
        fit(plan, 3 * GiB, needs)


def test_fit_leaves_out_a_switch_that_the_model_does_not_have():
    def tied(plan: MemoryPlan) -> MemoryEstimate:
        if plan.embedding_on_host:
            raise ConfigError("the head is the same matrix")
        return needs(plan)

    plan, rungs = fit(WASTEFUL, 8 * GiB, tied)
    assert not plan.embedding_on_host
    assert [rung.change for rung in rungs][:2] == [LADDER[0].change, LADDER[3].change]
    with pytest.raises(ConfigError, match="same matrix"):
        fit(MemoryPlan(embedding_on_host=True), 8 * GiB, tied)


def test_usable_memory_of_cards_leaves_room_for_context_and_desktop():
    assert [round(GPU.of_size(size).usable_bytes / GiB, 1) for size in (6, 8, 12)] == [5.4, 7.3, 11.2]
    with pytest.raises(ConfigError, match="--gpu-gb"):
        GPU.of_size(0)


def test_estimate_is_a_table_that_adds_up():
    estimate = MemoryEstimate({"linear layers": 3 * GiB, "activations": GiB // 2}, host_bytes=GiB)
    assert str(estimate) == (
        "linear layers          3.00 GiB\n"
        "activations            0.50 GiB\n"
        "-------------------------------\n"
        "peak on the device     3.50 GiB\n"
        "in host memory         1.00 GiB"
    )
    assert estimate.fits(estimate.peak_bytes)
    assert not estimate.fits(estimate.peak_bytes - 1)


def test_a_plan_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="mlp_tiles \\(0\\)"):
        MemoryPlan(mlp_tiles=0)


def test_benchmark_of_memory_at_toy_size(tmp_path, monkeypatch):
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "machine", raising=False)
    arguments = ["--preset", "llama-15m", "--seq-len", "64", "--fit", "64", "--cards", "6", "--name", "memory"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Tied: the embedding cannot leave, so the preset's head is made its own.
    monkeypatch.setattr(
        LlamaConfig,
        "PRESETS",
        {"llama-15m": {**LlamaConfig.PRESETS["llama-15m"], "tie_word_embeddings": False, "num_hidden_layers": 2}},
    )
    runpy.run_path(str(folder / "memory.py"), run_name="__main__")
    result = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    assert len(result["rows"]) == 6
    assert all(sum(row["items"].values()) == row["peak_bytes"] for row in result["rows"])
    assert result["fit"][0]["switches"] == []
