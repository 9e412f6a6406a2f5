"""AdamW with 8-bit moments: the trajectory of AdamW, bytes that mean what bitsandbytes' do, and a state that goes on exactly."""

import copy
import math

import bitsandbytes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from llmforge.errors import CheckpointError, ConfigError
from llmforge.quant.dynamic8 import dequantize_dynamic, dynamic_map, quantize_dynamic, zero_code
from llmforge.training import adamw8bit
from llmforge.training.adamw8bit import AdamW8bit

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.999), weight_decay=0.3)


def train(make, *shapes, steps=100, spread=0.0, dtype=torch.float32):
    """Noisy gradients towards a target, whose magnitudes span `spread` decades; a step in seven has none."""
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randn(shape, generator=generator) for shape in shapes]
    scales = [10 ** (-spread * torch.rand(shape, generator=generator)) for shape in shapes]
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    optimizer = make(params)
    for step in range(steps):
        for p, target, scale in zip(params, targets, scales, strict=True):
            noise = torch.randn(p.shape, generator=generator) * 0.3
            p.grad = ((p.detach() - target + noise) * scale * (step % 7 != 3)).to(dtype)
        optimizer.step()
    return params, optimizer


def ours(params):
    return AdamW8bit(params, **SETTINGS)


def adamw(params):
    return torch.optim.AdamW(params, foreach=False, fused=False, **SETTINGS)


def theirs(params):
    return bitsandbytes.optim.AdamW8bit(params, **SETTINGS)


def distance(left, right):
    return ((left - right).norm() / right.norm()).item()


def test_small_parameters_step_exactly_as_adamw():
    (left, _), (right, _) = train(ours, (63, 65), (7,)), train(adamw, (63, 65), (7,))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_large_parameters_stay_near_adamw_and_bitsandbytes():
    (p,), optimizer = train(ours, (64, 64))
    (reference,), _ = train(adamw, (64, 64))
    (their,), _ = train(theirs, (64, 64))
    assert optimizer.state[p]["state1"].dtype == torch.uint8
    assert 0 < distance(p, reference) < 0.05
    assert distance(p, reference) < 1.2 * distance(their, reference)
    assert distance(p, their) < 0.02
    (without,), _ = train(lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0), (64, 64))
    assert distance(without, reference) > 1.5 * distance(p, reference)  # a control: the decay is seen


def test_gradients_of_unlike_magnitudes_are_no_danger(monkeypatch):
    (reference,), _ = train(adamw, (128, 64), spread=4, steps=200)
    (p,), _ = train(ours, (128, 64), spread=4, steps=200)
    assert distance(p, reference) < 0.4
    # A control: second moments that become 0, as the nearest code would have it, throw the parameters out.
    monkeypatch.setattr(adamw8bit, "_never_zero", lambda codes, values: codes)
    (thrown,), _ = train(ours, (128, 64), spread=4, steps=200)
    assert distance(thrown, reference) > 10


@given(st.integers(1, 1200), st.booleans(), st.integers(0, 99))
def test_codes_are_the_nearest_and_round_trip(n, signed, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10 ** (-6 * torch.rand(n, generator=generator))
    values = values if signed else values.abs()
    codes, scales = quantize_dynamic(values, signed=signed)
    decoded = dequantize_dynamic(codes, scales, signed=signed)
    table = dynamic_map(signed=signed).double()
    for i in range(0, n, 256):
        block, scale = values[i : i + 256].double(), values[i : i + 256].abs().max().double()
        assert scales[i // 256].double() == scale
        best = (block[:, None] - table * scale).abs().amin(1)
        assert ((block - decoded[i : i + 256].double()).abs() <= best + 1e-7 * scale).all()
    if not signed:  # of signed codes none is -1
        again, same_scales = quantize_dynamic(decoded, signed=signed)
        assert torch.equal(scales, same_scales)
        assert torch.equal(again, codes)


def test_zeros_have_their_own_code():
    for signed in (True, False):
        codes, scales = quantize_dynamic(torch.zeros(300), signed=signed)
        assert codes.unique().tolist() == [zero_code(signed=signed)]
        assert not dequantize_dynamic(codes, scales, signed=signed).any()
    assert [part.numel() for part in quantize_dynamic(torch.empty(0), signed=True)] == [0, 0]


def test_two_bytes_per_parameter():
    (p,), optimizer = train(ours, (256, 256), steps=1)
    state = optimizer.state[p]
    size = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    assert size == 256 * 256 * (2 + 2 * 4 / 256)
    assert state["state1"].shape == state["state2"].shape == p.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path, dtype):
    def gradients(step):
        generator = torch.Generator().manual_seed(step)
        return [torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 80), (5, 5))]

    def run(params, optimizer, steps):
        for step in steps:
            for p, grad in zip(params, gradients(step), strict=True):
                p.grad = grad
            optimizer.step()

    whole = [nn.Parameter(torch.ones_like(grad)) for grad in gradients(0)]
    run(whole, ours(whole), range(20))
    params = [nn.Parameter(torch.ones_like(grad)) for grad in gradients(0)]
    optimizer = ours(params)
    run(params, optimizer, range(9))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = ours(params)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert resumed.state[params[0]]["state1"].dtype == torch.uint8
    assert resumed.state[params[0]]["absmax1"].dtype == resumed.state[params[1]]["state1"].dtype == torch.float32
    assert resumed.state[params[0]]["state1"] is not optimizer.state[params[0]]["state1"]
    run(params, resumed, range(9, 20))
    assert all(torch.equal(a, b) for a, b in zip(params, whole, strict=True))


def test_bitsandbytes_state_is_taken_over():
    (p,), their = train(theirs, (64, 64), steps=20)
    mine = AdamW8bit([nn.Parameter(p.detach().clone())], **SETTINGS)
    mine.load_state_dict(their.state_dict())
    (q,) = mine.param_groups[0]["params"]
    state = mine.state[q]
    assert set(state) == {"step", "state1", "state2", "absmax1", "absmax2"}
    assert state["step"] == 20
    assert torch.equal(state["state1"], their.state[p]["state1"])
    p.grad = torch.randn(64, 64)
    q.grad = p.grad.clone()
    before = p.detach().clone()
    their.step()
    mine.step()
    assert distance(q - before, p - before) < 1e-3
    assert distance(before, p) > 1e-3  # a control: it has moved


def test_states_of_others_are_refused():
    _, other = train(adamw, (64, 64), steps=2)
    mine = ours([nn.Parameter(torch.zeros(64, 64))])
    with pytest.raises(
        CheckpointError, match=r"state of parameter 0 .*exp_avg float32 \(64, 64\).* is not one of AdamW8bit"
    ):
        mine.load_state_dict(other.state_dict())
    _, transposed = train(ours, (32, 128), steps=2)
    with pytest.raises(CheckpointError, match=r"not one of AdamW8bit for shape \(64, 64\)"):
        mine.load_state_dict(transposed.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        mine.load_state_dict(train(ours, (64, 64), (3,), steps=1)[1].state_dict())


def test_settings_out_of_range_are_refused():
    p = [nn.Parameter(torch.zeros(3))]
    for name, value in dict(lr=-1.0, eps=0.0, weight_decay=-0.1, betas=(0.9, 1.0)).items():
        with pytest.raises(ConfigError, match=f"{name} "):
            AdamW8bit(p, **{name: value})
    p[0].grad = torch.zeros(3).to_sparse()
    with pytest.raises(ConfigError, match="dense gradients"):
        AdamW8bit(p).step()


def test_parts_of_a_large_parameter_and_gaps_in_memory_change_nothing(monkeypatch):
    (whole,), _ = train(ours, (64, 96), steps=5)
    monkeypatch.setattr(adamw8bit, "_CHUNK", 1024)
    (parts,), _ = train(ours, (64, 96), steps=5)
    assert torch.equal(whole, parts)
    straight, gaps = nn.Parameter(torch.ones(64, 96)), nn.Parameter(torch.ones(96, 64).t())
    for p in (straight, gaps):
        optimizer = ours([p])
        p.grad = torch.arange(64.0 * 96).view(64, 96).sin()
        optimizer.step()
    assert not gaps.is_contiguous()
    assert torch.equal(straight, gaps)


def test_bfloat16_parameters_step_in_float32():
    (p,), optimizer = train(ours, (64, 64), steps=30, dtype=torch.bfloat16)
    (reference,), _ = train(adamw, (64, 64), steps=30)
    assert p.dtype == torch.bfloat16
    assert optimizer.state[p]["absmax1"].dtype == torch.float32
    assert distance(p.float(), reference) < 0.1


def test_a_closure_and_a_schedule_are_served():
    p = nn.Parameter(torch.ones(64, 64))
    optimizer = ours([p])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4096.0
    schedule.step()
    after = p.detach().clone()
    optimizer.step(closure)
    assert torch.equal(p, after)  # lr 0
    assert after.max() < 1


def test_a_step_runs_without_values():
    with FakeTensorMode():
        p = nn.Parameter(torch.zeros(128, 64))
        p.grad = torch.ones(128, 64)
        optimizer = ours([p])
        optimizer.step()
        assert optimizer.state[p]["state1"].dtype == torch.uint8


def test_diverged_gradients_are_seen_in_the_parameter():
    p = nn.Parameter(torch.zeros(64, 64))
    p.grad = torch.ones(64, 64)
    p.grad[3, 3] = math.nan
    optimizer = ours([p])
    optimizer.step()
    assert p[3, 3].isnan()
    assert copy.deepcopy(optimizer.state_dict())["state"][0]["absmax1"].isnan().any()
