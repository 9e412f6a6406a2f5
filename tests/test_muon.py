"""Muon against torch.optim.Muon and the SVD, which parameters it takes, and that it goes on exactly."""

import copy
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn
from toy import same, toy_model, toy_trainer, weights

from llmforge import BitNet, BitNetConfig, Llama, LlamaConfig, LoRAConfig, TrainConfig, apply_lora_
from llmforge.errors import CheckpointError, ConfigError
from llmforge.training import build_optimizer, learning_rate, muon
from llmforge.training.muon import Muon, hidden_matrices, orthogonalized

LLAMA = dict(vocab_size=41, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
LLAMA |= dict(max_position_embeddings=16, qk_norm=True)


def llama(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig.from_dict({**LLAMA, **changes}))


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**dict(max_steps=10, optimizer="muon", lr=1e-2, weight_decay=0.2, device="cpu"), **changes})


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)


# --- The arithmetic


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 5)])
def test_directions_stay_and_their_lengths_become_nearly_one(shape):
    x = torch.randn(3, *shape) * 1e-3
    found = orthogonalized(x)
    assert found.shape == x.shape
    for matrix, result in zip(x.double(), found.double(), strict=True):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        lengths = u.T @ result @ vh.T
        assert ((lengths.diag() > 0.65) & (lengths.diag() < 1.25)).all(), lengths.diag()
        assert (lengths - lengths.diag().diag()).abs().max() < 1e-4  # order of float32 sums, over five iterations


def test_each_matrix_counts_for_itself_and_zero_stays_zero():
    x = torch.randn(2, 6, 4)
    x[1] = 0
    found = orthogonalized(x)
    assert torch.equal(found[1], torch.zeros(6, 4))
    torch.testing.assert_close(found[:1], orthogonalized(x[:1] * 7))


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (16, 40)])
def test_in_bfloat16_it_is_torchs_iteration(shape):
    theirs = pytest.importorskip("torch.optim._muon")
    x = torch.randn(shape)
    expected = theirs._zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    found = orthogonalized(x[None], dtype=torch.bfloat16)[0]
    assert found.dtype == torch.bfloat16
    # Kernels for one and for many matrices round in other places; a step of bfloat16 is 2^-8.
    torch.testing.assert_close(found, expected, atol=2**-5, rtol=0)
    assert orthogonalized(x[None]).dtype == torch.float32  # of a CPU


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("kind", ["gpt", "gpt untied", "llama"])
@pytest.mark.parametrize("batch_values", [1, 700, 1 << 25])
def test_steps_are_those_of_torchs_muon_and_adamw_side_by_side(monkeypatch, kind, batch_values):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Muon in float32, to see more digits
    monkeypatch.setattr(muon, "_BATCH_VALUES", batch_values)
    model = llama() if kind == "llama" else toy_model(tie_word_embeddings=kind == "gpt")
    reference = copy.deepcopy(model)
    before = weights(model)
    names = [n for n, p in reference.named_parameters() if p.ndim == 2 and not n.endswith(("wte.weight", "wpe.weight"))]
    names = [n for n in names if "embed" not in n and n != "lm_head.weight"]
    matrices = {n: p for n, p in reference.named_parameters() if n in names}
    others = [p for n, p in reference.named_parameters() if n not in names]
    # q, k and v of a GPT are three matrices: views of the weight.
    views = {n: p.detach().chunk(3 if n.endswith("c_attn.weight") else 1) for n, p in matrices.items()}
    hand = torch.optim.Muon([view for parts in views.values() for view in parts], lr=0.05, weight_decay=0.2)
    decays = [p for p in others if p.ndim > 1], [p for p in others if p.ndim < 2]
    groups = [dict(params=group, weight_decay=decay) for group, decay in zip(decays, (0.2, 0.0), strict=True)]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    optimizer = build_optimizer(model, config(muon_lr=0.05))
    for step in range(3):
        gradients(model, step)
        gradients(reference, step)
        for name, parts in views.items():
            for view, grad in zip(parts, matrices[name].grad.chunk(len(parts)), strict=True):
                view.grad = grad
        optimizer.step()
        hand.step()
        adamw.step()
    for (name, p), expected, first in zip(model.named_parameters(), reference.parameters(), before, strict=True):
        torch.testing.assert_close(p, expected, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert (p - first).abs().max() > 1e-2, name


def test_a_weight_without_a_gradient_stays():
    model = llama()
    optimizer = build_optimizer(model, config())
    gradients(model, 0)
    still = model.model.layers[1].mlp.up_proj.weight
    still.grad, before = None, still.detach().clone()
    optimizer.step()
    assert torch.equal(still, before)
    assert still not in optimizer.state


def test_a_closure_is_called_once_with_gradients_on():
    model, calls = llama(), []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        gradients(model, 0)
        return 3.0

    assert build_optimizer(model, config()).step(closure) == 3.0
    assert calls == [True]


# --- Which parameters


class Classifier(nn.Module):
    """A user's module of torch's own layers."""

    matrices_of: ClassVar = {"head": 0, "mixing": 2}

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.mixing = nn.Parameter(torch.randn(8, 8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12)
        self.head = nn.Linear(8, 3)


def taken(model: nn.Module) -> dict[str, int]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: parts for p, parts in hidden_matrices(model).items()}


def test_matrices_of_hidden_layers_are_muons():
    gpt = {
        f"transformer.h.{i}.{part}.weight": 3 if part == "attn.c_attn" else 1
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert taken(toy_model()) == taken(toy_model(tie_word_embeddings=False)) == gpt
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = {f"model.layers.{i}.{part}.weight": 1 for i in range(2) for part in parts}
    assert taken(llama()) == taken(llama(tie_word_embeddings=True)) == expected
    assert taken(llama(final_logit_softcapping=5.0)) == expected
    shape = dict(vocab_size=41, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
    assert taken(BitNet(BitNetConfig(**shape, sub_norm=True))) == expected
    ternary = toy_model(n_embd=256, ternary=True)  # whose layers were exchanged
    assert taken(ternary) == gpt


def test_a_users_module_says_what_is_no_matrix_or_several():
    assert taken(Classifier()) == {
        "mixing": 2,
        "block.self_attn.in_proj_weight": 3,
        "block.self_attn.out_proj.weight": 1,
        "block.linear1.weight": 1,
        "block.linear2.weight": 1,
    }


def test_what_is_an_embedding_too_is_no_hidden_matrix():
    model = nn.ModuleDict(dict(table=nn.Embedding(8, 8), hidden=nn.Linear(8, 8), out=nn.Linear(8, 8)))
    model["out"].weight = model["table"].weight  # tied, under a name of its own
    assert taken(model) == {"hidden.weight": 1}


def test_groups_have_the_weight_decay_and_rates_of_their_kind():
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    optimizer = build_optimizer(model, config(muon_lr=0.03, betas=(0.8, 0.9)))
    matrices, tables, rest = optimizer.param_groups
    assert len(matrices["params"]) == 2 * 7 - 1
    assert [p.shape for p in tables["params"]] == [(41, 16), (41, 16)]
    assert all(p.ndim == 1 for p in rest["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) - 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 1e-2, 1e-2]
    assert matrices["lr_factor"] == pytest.approx(3.0)
    assert [group["betas"] for group in (tables, rest)] == [(0.8, 0.9)] * 2
    assert all(group["fused"] for group in (tables, rest))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Sequential(nn.Embedding(4, 4)), {}, "'muon' is for the matrices of hidden layers, and no nn.Linear"),
        (nn.Sequential(nn.Linear(4, 4)), dict(muon_lr=0.0), r"muon_lr \(0.0\) must be above 0 and below 10"),
        (nn.Sequential(nn.Linear(4, 4)), dict(optimizer="lion"), "'adamw', 'muon', 'adamw8bit' or 'paged_adamw8bit'"),
    ],
)
def test_what_cannot_be_is_refused(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(model, config(**settings))


def test_a_weight_that_does_not_hold_as_many_matrices_is_refused():
    with pytest.raises(ConfigError, match=r"shape \(4, 2\) does not hold 3 matrices"):
        Muon({nn.Parameter(torch.zeros(4, 2)): 3}, [], lr=1e-3)


def test_adapters_are_for_adamw():
    model = llama()
    apply_lora_(model, LoRAConfig(r=2))
    with pytest.raises(ConfigError, match="use 'adamw'"):
        build_optimizer(model, config())


# --- In the trainer


def test_the_schedule_moves_all_groups_and_decay_ends_for_all():
    trainer = toy_trainer(optimizer="muon", muon_lr=0.04, lr=1e-2, decay_weights_fraction=0.5)
    for metrics in trainer:
        matrices, tables, rest = trainer.optimizer.param_groups
        assert tables["lr"] == rest["lr"] == metrics.lr == learning_rate(metrics.step - 1, trainer.config)
        assert matrices["lr"] == pytest.approx(4 * metrics.lr)
        decay = 0.1 if metrics.step <= 5 else 0.0
        assert [matrices["weight_decay"], tables["weight_decay"], rest["weight_decay"]] == [decay, decay, 0.0]
    plain = toy_trainer(optimizer="adamw")
    next(plain)
    assert {group["lr"] for group in plain.optimizer.param_groups} == {learning_rate(0, plain.config)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_resumed_run_is_the_same_run(tmp_path, dtype):
    settings = dict(optimizer="muon", max_steps=6, save_every_steps=3, keep_last=9, dtype=dtype)
    whole = toy_trainer(tmp_path, **settings)
    whole.train(progress=False)
    resumed = toy_trainer(tmp_path, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.resume(tmp_path / "step-000003")
    assert resumed.step == 3
    for _ in resumed:
        pass
    assert same(weights(whole.model), weights(resumed.model))
    left, right = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for key, state in left["state"].items():
        assert all(torch.equal(torch.as_tensor(value), right["state"][key][name]) for name, value in state.items())
    other = toy_trainer(tmp_path, optimizer="muon", dtype=dtype, max_steps=6, seed=4)  # control: the state matters
    next(other)
    assert not same(weights(other.model), weights(resumed.model))


def test_a_state_can_be_loaded_saved_and_copied(tmp_path):
    model = llama()
    optimizer = build_optimizer(model, config())
    for step in range(2):
        gradients(model, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    twin = copy.deepcopy(model)
    other = build_optimizer(twin, config())
    other.load_state_dict(state)
    # A copy of both, as they are: parameters and state belong together.
    copied_model, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, other), (copied_model, copied)):
        gradients(m, 9)
        o.step()
    assert same(weights(model), weights(twin))
    assert same(weights(model), weights(copied_model))
    assert not same(weights(model), weights(llama()))


def test_a_group_that_is_added_later_is_adamws():
    extra = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(llama(), config())
    optimizer.add_param_group(dict(params=[extra], weight_decay=0.0, lr=0.5))
    extra.grad = torch.tensor([1.0, -2.0, 0.1])
    optimizer.step()
    torch.testing.assert_close(extra, 1 - 0.5 * extra.grad.sign())  # AdamW's first step is the sign


@pytest.mark.parametrize(("first", "then"), [("adamw", "muon"), ("muon", "adamw"), ("adamw8bit", "muon")])
def test_the_state_of_another_optimizer_is_refused(tmp_path, first, then):
    trainer = toy_trainer(tmp_path, optimizer=first, max_steps=2)
    trainer.train(progress=False)
    with pytest.raises(CheckpointError, match="optimizer"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        toy_trainer(tmp_path, optimizer=then, max_steps=4).resume()


def test_a_state_of_as_many_groups_that_is_not_muons_is_refused():
    model = llama()
    optimizer = build_optimizer(model, config())
    groups = [dict(params=list(group["params"])) for group in optimizer.param_groups]
    adamw = torch.optim.AdamW(groups)
    gradients(model, 0)
    adamw.step()
    with pytest.raises(CheckpointError, match="the state is not one of Muon; resume with the optimizer"):
        optimizer.load_state_dict(adamw.state_dict())


def test_a_scaler_skips_a_step_whose_gradients_overflowed():
    model = llama()
    optimizer = build_optimizer(model, config())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for broken in (False, True):
        gradients(model, 0)
        for p in model.parameters():
            p.grad *= 4.0
        if broken:
            model.model.norm.weight.grad[3] = torch.inf
        before = weights(model)
        scaler.scale(torch.zeros(1))  # so that the scaler knows its device
        scaler.unscale_(optimizer)
        assert broken or model.lm_head.weight.grad.std() == pytest.approx(1.0, rel=0.1)
        scaler.step(optimizer)
        scaler.update()
        assert same(before, weights(model)) == broken
    assert scaler.get_scale() == 2.0


# --- Weights that several processes share


def test_sharded_weights_move_as_whole_ones():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        whole, sharded = llama(), llama()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        optimizers = [build_optimizer(model, config()) for model in (whole, sharded)]
        for seed in range(2):
            gradients(whole, seed)
            for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
                q.grad = torch.distributed.tensor.distribute_tensor(p.grad.clone(), q.device_mesh, q.placements)
            for optimizer in optimizers:
                optimizer.step()
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(q.full_tensor(), p)
    finally:
        torch.distributed.destroy_process_group()
