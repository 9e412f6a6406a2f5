"""Memory of a tuning run: a dry run beside a real one, a case by hand, torch's own profiler, and what fits."""

import pytest
import torch
from torch import nn

from llmforge.finetune.memory import (
    MemoryTracker,
    estimate_memory,
    extrapolated,
    profile_memory,
)
from llmforge.models import Llama, LlamaConfig

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


@pytest.mark.parametrize("mode", ["none", "blocks", "offload"])
def test_many_layers_are_extrapolated_to_the_byte(mode):
    expected = profile_memory(loop(mode, layers=9)).estimate
    assert extrapolated(lambda layers: profile_memory(loop(mode, layers=layers)), 9).estimate == expected
    assert expected != profile_memory(loop(mode, layers=8)).estimate


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
