"""Adapters as GGUF files, in llama.cpp itself: base and adapter there compute what model and adapter compute here."""

import json
import re
import subprocess
import sys

import pytest
import torch
from gguf import GGUFReader
from toy import TEXT

from llmforge import GPT, CharTokenizer, ConvertError, GPTConfig, Llama, LlamaConfig, export_gguf
from llmforge.convert.adapter_gguf import export_adapter_gguf
from llmforge.finetune import LoRAConfig, apply_lora_, load_adapter_, save_adapter
from llmforge.finetune.lora import LayerSettings, attach_
from llmforge.nn.lora import lora_layers

# llama.cpp in a process of its own, as llmforge.deploy runs it: a failed assertion there ends that process only.
RUN = """
import sys, json, numpy as np, llama_cpp
base, adapter, ids, out = sys.argv[1:]
ids = json.loads(ids)
module = llama_cpp.llama_cpp
defaults = module.llama_model_default_params
def plain():
    params = defaults()
    if hasattr(params, "use_extra_bufts"):
        params.use_extra_bufts = False
    return params
module.llama_model_default_params = plain
f32 = llama_cpp.GGML_TYPE_F32
llama = llama_cpp.Llama(base, n_ctx=64, logits_all=True, flash_attn=False, type_k=f32, type_v=f32, verbose=False,
                        lora_path=None if adapter == "-" else adapter)
llama.eval(ids)
np.save(out, np.array(llama.scores[:len(ids)]))
"""

IDS = [3, 9, 1, 14, 7, 7, 20, 2, 11, 5]


def llama_cpp_logits(tmp_path, base, adapter):
    out = tmp_path / "logits.npy"
    command = [sys.executable, "-c", RUN, str(base), str(adapter), json.dumps(IDS), str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    import numpy as np

    return torch.from_numpy(np.load(out, allow_pickle=False))


def kl(p_logits, q_logits):
    """Mean over the tokens of KL(p | q), in nats."""
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def tokenizer():
    return CharTokenizer.from_text(TEXT)


def llama(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=tokenizer().vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return Llama(LlamaConfig(**{**shape, **changes})).eval()


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=tokenizer().vocab_size, block_size=64, n_layer=2, n_head=4, n_embd=64)).eval()


def filled_(model, *, seed=1):
    """Adapters that change much: B is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for adapter in layer.adapters.values():
                adapter.B.copy_(0.2 * torch.randn(adapter.B.shape, generator=generator))
    return model


def exported(tmp_path, build, config, *, file_type="F32"):
    base = build()
    export_gguf(base, tokenizer(), tmp_path / "base.gguf", file_type="F32")
    model = build()
    apply_lora_(model, config)
    save_adapter(filled_(model), tmp_path / "adapter")
    report = export_adapter_gguf(tmp_path / "adapter", base, tmp_path / "adapter.gguf", file_type=file_type)
    with torch.no_grad():
        idx = torch.tensor([IDS])
        return base(idx)[0], model(idx)[0], report


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (llama, LoRAConfig(r=4, lora_alpha=8)),
        (llama, LoRAConfig(r=4, lora_alpha=8, use_rslora=True)),
        (llama, LoRAConfig(r=3, lora_alpha=8, target_modules=("q_proj", "k_proj", "lm_head"))),
        (gpt, LoRAConfig(r=4, lora_alpha=8)),
    ],
    ids=["llama", "rslora", "q, k and head", "gpt2"],
)
def test_llama_cpp_computes_base_and_adapter_as_the_model_does(tmp_path, build, config):
    base, tuned, _ = exported(tmp_path, build, config)
    theirs = llama_cpp_logits(tmp_path, tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    without = llama_cpp_logits(tmp_path, tmp_path / "base.gguf", "-")
    assert kl(tuned, theirs) <= 1e-6
    assert kl(base, without) <= 1e-6
    assert kl(tuned, without) > 1e-3  # negative control: the adapter does something


@pytest.mark.parametrize(("file_type", "tolerance"), [("F16", 1e-5), ("BF16", 1e-4)])
def test_a_half_precision_adapter_is_nearly_the_same(tmp_path, file_type, tolerance):
    _, tuned, report = exported(tmp_path, llama, LoRAConfig(r=4, lora_alpha=8), file_type=file_type)
    theirs = llama_cpp_logits(tmp_path, tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert kl(tuned, theirs) <= tolerance
    assert report.tensors == {file_type: 2 * 2 * 7}


def test_layers_with_ranks_and_alphas_of_their_own_keep_their_scales(tmp_path):
    base, model = llama(), llama()
    export_gguf(base, tokenizer(), tmp_path / "base.gguf", file_type="F32")
    layers = {
        "model.layers.0.self_attn.q_proj": LayerSettings(2, 8.0),
        "model.layers.1.mlp.up_proj": LayerSettings(4, 4.0),
    }
    attach_(model, LoRAConfig(r=2, lora_alpha=8, use_rslora=True), layers, [], name="default")
    save_adapter(filled_(model), tmp_path / "adapter")
    export_adapter_gguf(tmp_path / "adapter", base, tmp_path / "adapter.gguf", file_type="F32")
    theirs = llama_cpp_logits(tmp_path, tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    with torch.no_grad():
        assert kl(model(torch.tensor([IDS]))[0], theirs) <= 1e-6
    again = llama()
    load_adapter_(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([IDS])), model(torch.tensor([IDS])))


def test_the_file_says_what_it_is(tmp_path):
    exported(tmp_path, llama, LoRAConfig(r=4, lora_alpha=8, use_rslora=True))
    reader = GGUFReader(tmp_path / "adapter.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said["general.architecture"] == "llama"
    assert (said["general.type"], said["adapter.type"], said["adapter.lora.alpha"]) == ("adapter", "lora", 16.0)
    shapes = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}
    assert shapes["blk.1.attn_k.weight.lora_a"] == [4, 64]
    assert shapes["blk.1.attn_k.weight.lora_b"] == [32, 4]


def saved(tmp_path, config, model=None):
    model = model or llama()
    apply_lora_(model, config)
    return save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "file_type", "base", "message"),
    [
        (LoRAConfig(r=2, use_dora=True), "F16", llama, "is a DoRA.* merge it into the base instead"),
        (LoRAConfig(r=2, modules_to_save=("lm_head",)), "F16", llama, r"whole tensors \(lm_head.weight\).* merge it"),
        (LoRAConfig(r=2), "Q4_K_M", llama, "file_type .'Q4_K_M'. of an adapter must be one of F32, F16, BF16"),
        (LoRAConfig(r=2), "F16", gpt, "'model.layers.0.*and the base no such layer"),
        (LoRAConfig(r=2), "F16", lambda: llama(hidden_size=128), r"is \(64, 64\) \(out, in\), the base's \(128, 128\)"),
        (
            LoRAConfig(r=2, target_modules=("lm_head",)),
            "F16",
            lambda: llama(tie_word_embeddings=True),
            "changes lm_head, which in this model is the embedding",
        ),
    ],
)
def test_what_llama_cpp_cannot_apply_is_refused(tmp_path, config, file_type, base, message):
    folder = saved(tmp_path, config)
    with pytest.raises(ConvertError) as refusal:
        export_adapter_gguf(folder, base(), tmp_path / "adapter.gguf", file_type=file_type)
    assert re.search(message, str(refusal.value)), str(refusal.value)
    assert not (tmp_path / "adapter.gguf").exists()
