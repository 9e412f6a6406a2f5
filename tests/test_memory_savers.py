"""What saves memory in training changes neither loss nor gradients: chunked loss, checkpointing, tiles, a table on the host."""

import copy
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import same, toy_model, toy_trainer, weights

from llmforge import generate
from llmforge.convert import export_hf, load
from llmforge.errors import ConfigError
from llmforge.finetune import LoRAConfig, apply_lora_, quantize_
from llmforge.models import GPT, BitNet, BitNetConfig, GPTConfig, Llama, LlamaConfig
from llmforge.nn import HostEmbedding, allocates_on_host, checkpointed, in_tiles, offload_embedding_, recompute
from llmforge.training import next_token_loss
from llmforge.training.loss import chunked_cross_entropy, chunked_next_token_loss

LLAMA = dict(vocab_size=99, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
LLAMA |= dict(num_key_value_heads=2, max_position_embeddings=64)
BITNET = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)


def llama(**changes):
    torch.manual_seed(0)
    return Llama(LlamaConfig(**{**LLAMA, **changes}))


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(vocab_size=99, block_size=64, n_layer=3, n_head=4, n_embd=32), **changes}))


def bitnet():
    torch.manual_seed(0)
    return BitNet(BitNetConfig(**BITNET, sub_norm=True))


MODELS = {"llama": llama, "gpt": gpt, "gpt with dropout": lambda: gpt(dropout=0.2), "bitnet": bitnet}
MODELS |= {"llama with dropout": lambda: llama(attention_dropout=0.2)}


def batch_of(B=2, T=24, answers=0.5):
    idx, targets = torch.randint(99, (2, B, T))
    return idx, targets.where(torch.rand(B, T) < answers, -100)


def gradients(model, loss_fn, batch, dtype=None, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)  # of dropout
    with torch.autocast("cpu", dtype) if dtype is not None else nullcontext():
        loss_sum, num_targets = loss_fn(model, batch)
    loss_sum.backward()
    return loss_sum.detach(), num_targets, [p.grad for p in model.parameters()]


def close(found, expected, tolerance):
    """Whether gradients agree, each measured by the largest value in it; None with None."""
    return all(
        (a is None and b is None) or (a - b).abs().max() <= tolerance * b.abs().max()
        for a, b in zip(found, expected, strict=True)
    )


class Sizes(TorchDispatchMode):
    """The shapes of all that is computed, and how many bytes of it live at once."""

    def __init__(self):
        super().__init__()
        self.shapes, self.live, self.peak, self._known = set(), 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):  # what was there before
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tensor.shape)
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = 0 if allocates_on_host() else storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self._known.discard(key)
        self.live -= size


# --- The loss in chunks


class Softcapped(nn.Linear):
    """A head whose last operation looks at its own output in the backward pass, as Gemma's."""

    def forward(self, input):
        return 3.0 * torch.tanh(super().forward(input) / 3.0)


class Adapted(nn.Module):
    """A frozen head with a low-rank path beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.out_features = base.requires_grad_(False), base.out_features
        self.a, self.b = (nn.Parameter(torch.randn(shape) * 0.1) for shape in ((4, base.in_features), (99, 4)))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def with_head(kind):
    model = llama(tie_word_embeddings=kind == "tied")
    if kind == "frozen":
        model.lm_head.requires_grad_(False)
    elif kind in ("bias", "softcapped"):
        old, cls = model.lm_head, Softcapped if kind == "softcapped" else nn.Linear
        model.lm_head = cls(32, 99, bias=kind == "bias")
        model.lm_head.weight = old.weight
    elif kind == "adapted":
        model.lm_head = Adapted(model.lm_head)
    elif kind in ("lora", "copied"):
        added = dict(modules_to_save=("lm_head",)) if kind == "copied" else {}
        names = ("q_proj",) if kind == "copied" else ("q_proj", "lm_head")
        apply_lora_(model, LoRAConfig(r=4, target_modules=names, **added))
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                nn.init.normal_(parameter, std=0.1)
    elif kind == "frozen base":
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    return model


HEADS = ["plain", "tied", "frozen", "bias", "softcapped", "adapted", "lora", "copied", "frozen base"]


@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
@pytest.mark.parametrize("head", HEADS)
def test_a_loss_in_chunks_is_the_loss_with_its_gradients(head, chunk_tokens):
    model, batch = with_head(head), batch_of()

    def in_chunks(model, batch):
        return chunked_next_token_loss(model, batch, chunk_tokens=chunk_tokens)

    expected, count, expected_grads = gradients(model, next_token_loss, batch)
    found, num_targets, grads = gradients(model, in_chunks, batch)
    assert num_targets == count > 10
    assert num_targets.dtype == torch.int64
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert close(grads, expected_grads, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(model, batch)[0], expected)
    moved = (batch[0], batch[1].roll(1))  # negative control
    assert not close(gradients(model, in_chunks, moved)[2], expected_grads, 1e-2)


@pytest.mark.parametrize("head", HEADS)
def test_a_loss_in_chunks_rounds_no_worse_under_autocast(head):
    model, batch = with_head(head), batch_of(B=4)
    exact_grads = gradients(model, next_token_loss, batch)[2]

    def error(grads):
        pairs = [(a, b) for a, b in zip(grads, exact_grads, strict=True) if b is not None]
        return sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt()

    plain, _, plain_grads = gradients(model, next_token_loss, batch, torch.bfloat16)
    found, _, grads = gradients(model, lambda *x: chunked_next_token_loss(*x, chunk_tokens=7), batch, torch.bfloat16)
    assert found.dtype == torch.float32
    assert {g.dtype for g in grads if g is not None} == {torch.float32}
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=0)  # the same bfloat16 logits
    assert 0 < error(grads) < 1.3 * error(plain_grads) < 0.05


def test_weights_of_16_bits_get_gradients_of_16_bits_that_were_summed_in_32():
    model, (idx, targets) = llama().bfloat16(), batch_of(B=8, answers=1.0)
    hidden = model.features(idx).flatten(0, 1).detach()
    exact = hidden.float(), model.lm_head.weight.detach().float().requires_grad_()
    F.cross_entropy(F.linear(*exact), targets.flatten(), reduction="sum").backward()
    chunked_cross_entropy(hidden, model.lm_head, targets.flatten(), chunk_tokens=2).backward()
    found, expected = model.lm_head.weight.grad, exact[1].grad
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.004 * expected.norm()  # 96 chunks summed in bfloat16 would be off by 1 %


@pytest.mark.parametrize("head", ["plain", "adapted"])
def test_a_batch_without_targets_has_gradients_of_zero(head):
    model = with_head(head)
    idx = batch_of()[0]
    found, num_targets, grads = gradients(model, chunked_next_token_loss, (idx, torch.full_like(idx, -100)))
    assert (found, num_targets) == (0, 0)
    trained = [grad for grad, p in zip(grads, model.parameters(), strict=True) if p.requires_grad]
    assert all(grad is not None and not grad.any() for grad in trained)


def test_ignored_targets_may_reach_the_sum_of_chunks():
    model, (idx, targets) = llama(), batch_of()
    hidden = model.features(idx).flatten(0, 1)
    found = chunked_cross_entropy(hidden, model.lm_head, targets.flatten(), chunk_tokens=5)
    torch.testing.assert_close(found, next_token_loss(model, (idx, targets))[0])
    found.backward()
    grads = [p.grad for p in model.parameters()]
    assert close(grads, gradients(copy.deepcopy(model), next_token_loss, (idx, targets))[2], 1e-5)


@pytest.mark.parametrize("head", ["plain", "adapted"])
def test_the_logits_never_exist_at_once(head):
    model, batch = with_head(head), batch_of(answers=1.0)
    for loss_fn, rows in (
        (lambda *x: chunked_next_token_loss(*x, chunk_tokens=5), {5, 3}),  # 48 = 9 * 5 + 3
        (next_token_loss, {48}),
    ):
        with Sizes() as sizes:
            loss_fn(model, batch)[0].backward()
        with_vocab = {shape[:-1] for shape in sizes.shapes if shape[-1:] == (99,)}
        assert {shape[0] for shape in with_vocab if len(shape) == 1 and shape[0] not in (4, 32)} == rows


def test_only_positions_with_a_target_reach_the_head():
    model, (idx, targets) = with_head("adapted"), batch_of()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    _, num_targets = chunked_next_token_loss(model, (idx, targets))
    assert seen == [num_targets]


def test_a_scaled_loss_has_scaled_gradients():
    model, batch = llama(), batch_of()
    _, _, expected = gradients(model, chunked_next_token_loss, batch)
    expected = [grad.clone() for grad in expected]
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(model.parameters(), lr=0.1)
    model.zero_grad()
    scaler.scale(chunked_next_token_loss(model, batch)[0] / 48).backward()
    assert close([p.grad for p in model.parameters()], [g * 1024 / 48 for g in expected], 1e-6)
    scaler.unscale_(optimizer)
    assert close([p.grad for p in model.parameters()], [g / 48 for g in expected], 1e-6)


def test_the_trainer_goes_the_same_way_with_it():
    plain, chunked = (toy_trainer(model=toy_model(), max_steps=3) for _ in range(2))
    chunked.loss_fn = chunked_next_token_loss
    losses = [[metrics.loss for metrics in trainer] for trainer in (plain, chunked)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(weights(plain.model), weights(chunked.model), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0)  # Adam divides small gradients by themselves
    assert plain.evaluate().loss == pytest.approx(chunked.evaluate().loss, rel=1e-4)


def test_a_loss_in_chunks_says_what_it_needs():
    batch = batch_of()
    with pytest.raises(ConfigError, match=r"Embedding lacks features\(idx\) or lm_head.*use next_token_loss"):
        chunked_next_token_loss(nn.Embedding(99, 99), batch)
    with pytest.raises(ConfigError, match=r"chunk_tokens \(0\) must be at least 1"):
        chunked_next_token_loss(llama(), batch, chunk_tokens=0)
    with pytest.raises(ConfigError, match="Sequential has no out_features, so chunk_tokens must be given"):
        chunked_cross_entropy(torch.randn(3, 4), nn.Sequential(nn.Linear(4, 9)), torch.zeros(3, dtype=torch.long))


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient():
    model, batch = llama(), batch_of()
    loss_sum = chunked_next_token_loss(model, batch)[0]
    (2 * loss_sum).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_sum.backward()


# --- Activation checkpointing


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_no_bit_of_the_gradients(name, dtype):
    model, batch = MODELS[name]().train(), batch_of()
    found = {}
    for mode in ("none", "blocks", "offload"):
        model.set_activation_checkpointing(mode)
        loss, _, grads = gradients(model, chunked_next_token_loss, batch, dtype)
        found[mode] = [loss, *(grad.clone() for grad in grads)]
    assert same(found["none"], found["blocks"])
    assert same(found["none"], found["offload"])
    if "dropout" in name:  # negative control: other randomness is seen
        loss, _, grads = gradients(model, chunked_next_token_loss, batch, dtype, seed=1)
        assert not same(found["none"], [loss, *grads])


@pytest.mark.parametrize("mode", ["blocks", "offload"])
def test_checkpointing_reaches_adapters_on_a_frozen_base(mode):
    model, batch = gpt(dropout=0.1).requires_grad_(False).train(), batch_of()
    for block in model.transformer.h:
        block.mlp.c_fc.weight.requires_grad_(True)
    _, _, expected = gradients(model, chunked_next_token_loss, batch)
    expected = [grad.clone() for grad in expected if grad is not None]
    model.set_activation_checkpointing(mode)
    found = [grad for grad in gradients(model, chunked_next_token_loss, batch)[2] if grad is not None]
    assert len(found) == 3
    assert same(found, expected)


@pytest.mark.parametrize("mode", ["none", "blocks", "offload"])
def test_checkpointing_computes_each_block_once_more(mode):
    model, batch, calls = llama().train(), batch_of(), []
    model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model.set_activation_checkpointing(mode)
    gradients(model, chunked_next_token_loss, batch)
    assert len(calls) == (1 if mode == "none" else 2)
    del calls[:]
    with torch.no_grad():
        next_token_loss(model, batch)
    next_token_loss(model.eval(), batch)  # and none where there is nothing to train
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_what_a_forward_pass_leaves_behind(name):
    model, batch = MODELS[name]().train(), batch_of(T=60)
    left = {}
    for mode in ("none", "blocks", "offload"):
        model.set_activation_checkpointing(mode)
        with Sizes() as sizes:
            hidden = model.features(batch[0])
        left[mode] = sizes.live
        del hidden
    inputs = 3 * 2 * 60 * 32 * 4  # bytes of what enters the blocks
    assert left["none"] > 5 * inputs
    assert left["blocks"] < left["none"] / 3
    # The last block's output, the final norm's and what it saves stay on the device.
    assert left["blocks"] - left["offload"] == inputs


def test_offloaded_inputs_go_to_the_host_and_come_back(monkeypatch):
    model, batch, moved = llama().train(), batch_of(), []
    for name in ("to_host", "to_device"):
        function = getattr(recompute, name)
        monkeypatch.setattr(
            recompute, name, lambda x, *rest, _f=function, _n=name: moved.append((_n, tuple(x.shape))) or _f(x, *rest)
        )
    model.set_activation_checkpointing("offload")
    gradients(model, chunked_next_token_loss, batch)
    assert moved == [("to_host", (2, 24, 32))] * 3 + [("to_device", (2, 24, 32))] * 3


def test_generation_does_not_notice_checkpointing():
    model = gpt().train()  # in training mode, as in the midst of a run
    expected = generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=8, temperature=0)
    model.set_activation_checkpointing("blocks")
    model.set_mlp_tiles(2)
    assert torch.equal(generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=8, temperature=0), expected)
    assert model.transformer.checkpointing == "blocks"


def test_a_block_of_anyone_can_be_checkpointed():
    block, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5)), torch.randn(3, 4)
    found = []
    for mode in ("none", "blocks", "offload"):
        torch.manual_seed(3)
        block.zero_grad()
        checkpointed(block, x, mode=mode).square().sum().backward()
        found.append([p.grad.clone() for p in block.parameters()])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


# --- Tiles


@pytest.mark.parametrize("tiles", [2, 5, 24, 100])
@pytest.mark.parametrize("mode", ["none", "blocks", "offload"])
@pytest.mark.parametrize("name", ["llama", "gpt", "bitnet"])
def test_tiles_change_nothing(name, mode, tiles):
    model, batch = MODELS[name]().train(), batch_of()
    expected, _, expected_grads = gradients(model, chunked_next_token_loss, batch)
    expected_grads = [grad.clone() for grad in expected_grads]
    model.set_mlp_tiles(tiles)
    model.set_activation_checkpointing(mode)
    found, _, grads = gradients(model, chunked_next_token_loss, batch)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    assert close(grads, expected_grads, 2e-6 if name != "bitnet" else 1e-3)  # rounding may fall to the other side
    with torch.no_grad():
        torch.testing.assert_close(chunked_next_token_loss(model, batch)[0], expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize(("tiles", "tokens"), [(1, 120), (4, 30), (7, 18)])
def test_wide_activations_exist_for_one_tile(tiles, tokens):
    model, batch = llama(intermediate_size=480).train(), batch_of(T=60)
    for parameter in model.parameters():  # so that gradients of weights do not hide the activations
        parameter.requires_grad_(parameter.ndim == 1)
    model.set_mlp_tiles(tiles)
    model.set_activation_checkpointing("blocks")
    with Sizes() as sizes:
        chunked_next_token_loss(model, batch)[0].backward()
    wide = {shape[:-1].numel() for shape in sizes.shapes if shape[-1:] == (480,)} - {
        32,
        1,
    }  # the matrix, and its first row
    assert max(wide) == tokens
    if tiles == 1:
        return
    model.set_mlp_tiles(1)
    with Sizes() as whole:
        chunked_next_token_loss(model, batch)[0].backward()
    assert sizes.peak < 0.7 * whole.peak


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="checkpointing 'full' must be 'none', 'blocks' or 'offload'"):
        llama().set_activation_checkpointing("full")
    with pytest.raises(ConfigError, match=r"mlp_tiles \(0\) must be at least 1"):
        llama().set_mlp_tiles(0)


# --- The table on the host


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_an_embedding_on_the_host_gives_the_same_rows(name):
    model = llama() if name == "llama" else gpt(tie_word_embeddings=False)
    batch, path = batch_of(), {"llama": "model.embed_tokens", "gpt": "transformer.wte"}[name]
    expected, _, _ = gradients(model, chunked_next_token_loss, batch)
    parameters, params = dict(model.named_parameters()), model.num_params()
    expected_grads = {n: p.grad.clone() for n, p in parameters.items() if n != f"{path}.weight"}
    state = {n: value.clone() for n, value in model.state_dict().items()}
    assert offload_embedding_(model) == [path]
    assert offload_embedding_(model) == []
    found, _, grads = gradients(model, chunked_next_token_loss, batch)
    assert torch.equal(found, expected)
    names = [n for n, _ in model.named_parameters()]
    assert names == list(expected_grads)
    assert same(grads, list(expected_grads.values()))
    assert model.num_params() == params
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict({n: value + 1 for n, value in state.items()})
    assert torch.equal(model.get_submodule(path).weight, state[f"{path}.weight"] + 1)


def test_the_table_stays_when_the_model_moves():
    model = llama()
    offload_embedding_(model)
    table = model.model.embed_tokens.weight
    model.to("meta")  # another device, which every machine has
    assert model.model.embed_tokens.weight is table
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert table.device.type == "cpu"
    model.bfloat16()
    assert torch.equal(model.model.embed_tokens.weight, table.bfloat16())
    assert model.model.embed_tokens.weight.device.type == "cpu"


def test_a_model_without_weights_gets_its_table_on_the_host():
    with torch.device("meta"):
        model = Llama(LlamaConfig(**LLAMA))
    offload_embedding_(model)
    model.bfloat16()
    assert model.model.embed_tokens.weight.is_meta
    model.to_empty(device="cpu")
    assert not model.model.embed_tokens.weight.is_meta
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    model.load_state_dict(llama().state_dict())
    assert torch.equal(model.model.embed_tokens.weight, llama().model.embed_tokens.weight.bfloat16())


def test_a_model_with_its_table_on_the_host_is_exported_whole(tmp_path):
    model, idx = llama(), torch.randint(99, (1, 9))
    expected = model(idx)
    offload_embedding_(model)
    export_hf(model, None, tmp_path / "hf")
    assert torch.equal(load(tmp_path / "hf")[0](idx), expected)


def test_an_embedding_that_cannot_leave_says_why():
    with pytest.raises(ConfigError, match=r"wte cannot move to host memory: lm_head\.weight is the same matrix"):
        offload_embedding_(gpt())
    model = llama()
    model.model.embed_tokens = nn.Embedding(99, 32, max_norm=1.0)
    with pytest.raises(ConfigError, match=r"embed_tokens is a Embedding, and only a plain nn\.Embedding"):
        offload_embedding_(model)
    with pytest.raises(ConfigError, match="Linear does not say which its token embedding is"):
        offload_embedding_(nn.Linear(2, 2))


# --- All of it, with other parts, and without weights


def test_all_savers_together_on_a_base_of_four_bits():
    plain = llama(hidden_size=64, intermediate_size=128).train()
    quantize_(plain)
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.ndim == 1)  # the norms are trained
    saving, batch = copy.deepcopy(plain), batch_of()
    offload_embedding_(saving)
    saving.set_activation_checkpointing("offload")
    saving.set_mlp_tiles(3)
    expected, _, expected_grads = gradients(plain, next_token_loss, batch)
    found, _, grads = gradients(saving, chunked_next_token_loss, batch)
    torch.testing.assert_close(found, expected)
    assert close([g for g in grads if g is not None], [g for g in expected_grads if g is not None], 1e-5)


@pytest.mark.parametrize("mode", ["none", "blocks", "offload"])
@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_a_step_runs_without_weights(name, mode):
    """Under FakeTensorMode, the peak of a step is known without computing it; it is that of the real step."""

    def step():
        model = llama() if name == "llama" else gpt(tie_word_embeddings=False)
        model.train().requires_grad_(False).lm_head.requires_grad_(True)
        for block in model.model.layers if name == "llama" else model.transformer.h:
            next(p for p in block.parameters() if p.ndim == 2).requires_grad_(True)
        offload_embedding_(model)
        model.set_activation_checkpointing(mode)
        model.set_mlp_tiles(3)
        idx = torch.zeros(2, 24, dtype=torch.long)
        with Sizes() as sizes:
            hidden = model.features(idx).flatten(0, 1)
            chunked_cross_entropy(hidden, model.lm_head, idx.flatten(), chunk_tokens=7).backward()
        return sizes.peak

    with FakeTensorMode():
        fake = step()
    assert fake == step() > 0


def test_host_embeddings_are_modules_of_their_own():
    layer = HostEmbedding(torch.arange(6.0).view(3, 2))
    assert layer(torch.tensor([[2, 0]])).tolist() == [[[4.0, 5.0], [0.0, 1.0]]]
    assert str(layer) == "HostEmbedding(3, 2)"
    assert layer.num_weights == 6
    assert not layer(torch.tensor([1])).requires_grad
    x = torch.randn(2, 6, 2)
    assert torch.equal(in_tiles(nn.Identity(), x, 4), x)


def test_the_benchmark_runs_at_toy_size(tmp_path):
    sizes = [
        "--tokens",
        "64",
        "--documents",
        "16",
        "--vocab",
        "400",
        "--width",
        "32",
        "--layers",
        "2",
        "--repeats",
        "1",
    ]
    environment = {**os.environ, "LLMFORGE_BENCHMARK_RESULTS": str(tmp_path)}
    benchmark = Path(__file__).parent.parent / "benchmarks" / "packing.py"
    subprocess.run([sys.executable, str(benchmark), *sizes], check=True, capture_output=True, env=environment)
    result = json.loads((tmp_path / "packing.json").read_text(encoding="utf-8"))
    [attention], [loss] = result["attention"], result["loss"]
    assert set(attention["seconds"]) == {"loop", "mask", "chosen", "padded"}
    assert 0 <= attention["padding_fraction"] < 1
    for head in ("head_trains", "head_frozen"):
        assert loss[head]["peak_bytes"].keys() == loss[head]["seconds"].keys() == {"whole", "chunked", "chunks_of_64"}
    bytes_of = {(row["checkpointing"], row["mlp_tiles"]): row["peak_bytes"] for row in result["recompute"]}
    assert bytes_of["none", 1] > bytes_of["blocks", 1] > bytes_of["offload", 1] > bytes_of["offload", 4]
