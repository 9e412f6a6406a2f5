"""One way in for every kind of model on disk; and nothing on disk is ever run."""

import json
import os
import pickle
import zipfile

import pytest
import torch

from llmforge.convert import export_hf, load
from llmforge.errors import CheckpointError, ConvertError
from llmforge.models import GPT, GPTConfig
from llmforge.tokenizers import CharTokenizer
from llmforge.training.checkpoint import TrainerState, save_checkpoint

CHARS = CharTokenizer.from_text("En un lugar de la Mancha")
CONFIG = GPTConfig(vocab_size=CHARS.vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=False)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(1, 12))


def save_step(run, model, step, val_loss=None):
    rest = dict(optimizer={}, scaler={}, settings={}, data_fingerprint=None)
    state = TrainerState(step=step, val_loss=val_loss, micro_batch_size=4, skipped_steps=0, world_size=1, **rest)
    return save_checkpoint(run, model, CHARS, state)


@pytest.fixture
def run(tmp_path):
    """A run of three checkpoints, the second one the best."""
    models = {step: GPT(CONFIG).eval() for step in (100, 200, 300)}
    for (step, model), loss in zip(models.items(), (2.0, 1.0, 3.0), strict=True):
        save_step(tmp_path / "run", model, step, loss)
    return tmp_path / "run", models


@pytest.mark.parametrize(("which", "step"), [(None, 300), ("latest", 300), ("best", 200), ("step-000100", 100)])
def test_a_run_gives_the_checkpoint_asked_for(run, which, step):
    folder, models = run
    model, tokenizer = load(folder, checkpoint=which)
    assert torch.equal(logits_of(model), logits_of(models[step]))
    assert not model.training
    assert model.config == CONFIG
    assert model.lm_head.weight is model.transformer.wte.weight
    assert tokenizer.chars == CHARS.chars


def test_a_checkpoint_folder_is_a_model_folder(run):
    folder, models = run
    model, tokenizer = load(folder / "step-000100", dtype=torch.float64)
    assert model.lm_head.weight.dtype == torch.float64
    assert torch.equal(model.lm_head.weight.float(), models[100].lm_head.weight)
    assert tokenizer is not None


def test_a_model_folder_needs_no_manifest_and_no_tokenizer(run):
    folder, models = run
    for name in ("manifest.json", "trainer.pt", "trainer.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "step-000100" / name).unlink()
    model, tokenizer = load(folder / "step-000100")
    assert torch.equal(logits_of(model), logits_of(models[100]))
    assert tokenizer is None


def test_a_damaged_checkpoint_is_found_out(run):
    folder, models = run
    weights = folder / "step-000300" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-000300 is damaged: model\.safetensors has other content"):
        load(folder / "step-000300")
    with pytest.warns(UserWarning, match="using step-000200 instead"):
        model, _ = load(folder)
    assert torch.equal(logits_of(model), logits_of(models[200]))


def test_loading_leaves_the_random_state_alone(run):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load(run[0])
    assert torch.equal(torch.rand(1), expected)


def test_what_is_no_model_is_refused_with_what_was_found(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "model.onnx").write_bytes(b"ONNX")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    export_hf(GPT(CONFIG), CHARS, tmp_path / "hf")
    for name, message in [
        ("absent", "absent does not exist; load takes a run folder"),
        ("empty", "empty is empty; load takes"),
        ("other", r"other holds no model, but notes\.txt; load takes a run folder, one of its step-"),
        ("model.onnx", r"model\.onnx is a \.onnx file; load takes"),
        ("cut.gguf", r"cut\.gguf is cut off or damaged"),
        ("absent.pt", r"absent\.pt does not exist; load takes"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name)
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"hf holds no model, but README\.md, generation_config\.json"):
        load(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"checkpoint='best' chooses one of a run, but .*hf is no run folder"):
        load(tmp_path / "hf", checkpoint="best")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"a": 1}', "names neither 'llmforge_family' nor 'model_type'"),
        ('{"llmforge_family": "mamba"}', "a model of the family 'mamba'; this version knows gpt"),
        ('{"llmforge_family": ["gpt"]}', r"a model of the family \['gpt'\]"),
        (
            '{"llmforge_family": "gpt", "vocab_size": 10, "n_embed": 8}',
            "unknown GPTConfig field 'n_embed'; did you mean",
        ),
        ('{"llmforge_family": "gpt", "vocab_size": 10}', r"has 16 tensors, but|does not fit its config; missing: "),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(run, config, message):
    folder = run[0] / "step-000100"
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# --- nanoGPT


def nanogpt_checkpoint(model: GPT, /, **changes) -> dict:
    """What nanoGPT's train.py saves, of a compiled model without flash attention."""
    mask = torch.ones(1, 1, 16, 16).tril()
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"_orig_mod.transformer.h.{layer}.attn.bias": mask for layer in range(2)}
    c = model.config
    args = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size)
    args |= dict(bias=c.bias, vocab_size=c.vocab_size, dropout=0.1)
    checkpoint = {"model": state, "optimizer": {"state": {}, "param_groups": []}, "model_args": args}
    return {**checkpoint, "iter_num": 5, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"}, **changes}


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_is_read(tmp_path, bias):
    model = GPT(CONFIG.replace(bias=bias, activation_function="gelu")).eval()
    torch.save(nanogpt_checkpoint(model), tmp_path / "ckpt.pt")
    CHARS.save(tmp_path)
    ours, tokenizer = load(tmp_path / "ckpt.pt")
    assert torch.equal(logits_of(ours), logits_of(model))
    assert ours.config == model.config.replace(dropout=0.1)  # GELU in its erf form, as nanoGPT
    assert tokenizer.chars == CHARS.chars
    assert ours.lm_head.weight is ours.transformer.wte.weight
    with (tmp_path / "ckpt.pt").open("r+b") as file:  # in place: nothing of it may still be mapped
        file.write(bytes((tmp_path / "ckpt.pt").stat().st_size))
    assert torch.equal(logits_of(ours), logits_of(model))


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    torch.save(nanogpt_checkpoint(GPT(CONFIG), config=Canary(canary)), tmp_path / "ckpt.pt")
    with pytest.raises(
        CheckpointError, match="holds more than tensors and plain values, which is not read because it could run"
    ) as info:
        load(tmp_path / "ckpt.pt")
    assert "weights_only=False" not in str(info.value)  # torch's own message recommends it
    assert not canary.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError, match=r"not a file of torch\.save"):
        load(tmp_path / "plain.pt")
    assert not canary.exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)  # control: it would have
    assert canary.exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": None}, CheckpointError, "has no 'model' and 'model_args', but 'model', 'optimizer', 'model_args'"),
        (
            {"model_args": {"vocab_size": 10, "rope": True}},
            ConvertError,
            "model_args that nanoGPT's GPT does not: rope",
        ),
        ({"model_args": {"vocab_size": "x"}}, ConvertError, "vocab_size must be a whole number, got 'x'"),
        ({"model_args": {"vocab_size": 10, "n_embd": 768}}, CheckpointError, "of another shape"),
        ({"model": {"a": 3}}, CheckpointError, "something else than a tensor in 'model': 'a'"),
        (
            {"model": {"a": torch.ones(1).expand(10**12)}},
            CheckpointError,
            "something else than a tensor in 'model': 'a'",
        ),
        (
            {"model": {"a": torch.empty(9, device="meta")}},
            CheckpointError,
            "something else than a tensor in 'model': 'a'",
        ),
        ({"model": {"a": torch.eye(3).to_sparse()}}, CheckpointError, "something else than a tensor in 'model': 'a'"),
        ({"model": {}}, CheckpointError, "has 0 tensors, too few for 2 layers"),
    ],
)
def test_a_checkpoint_that_is_not_nanogpts_is_refused(tmp_path, changes, error, message):
    torch.save(nanogpt_checkpoint(GPT(CONFIG), **changes), tmp_path / "ckpt.pt")
    with pytest.raises(error, match=message):
        load(tmp_path / "ckpt.pt")


def test_a_checkpoint_cut_anywhere_or_packed_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(nanogpt_checkpoint(GPT(CONFIG)), path)
    whole = path.read_bytes()
    for length in [0, 1, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"ckpt\.pt is cut off or not a file of torch\.save"):
            load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt/data.pkl", bytes(10**7))
    with pytest.raises(CheckpointError, match="its parts are compressed or larger than the file"):
        load(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=0) as archive:  # packed, yet not smaller
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="its parts are compressed or larger than the file"):
        load(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="is no checkpoint of nanoGPT or llama2.c: it holds a list"):
        load(path)
    path.write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"not a file of torch\.save"):
        load(path)
