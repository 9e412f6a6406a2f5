"""GPT as GPT-2: what Hugging Face's and llama.cpp's GPT-2 files call it, and where they differ from it.

The parameter names are GPT-2's already. Four things differ:
    biases    GPT-2 has all of them; a model without gets zeros, which computes the same.
    Conv1D    Hugging Face keeps the blocks' matrices as (in, out), transposed to nn.Linear's (out, in).
    context   llama.cpp rounds the context up to a multiple of 256 and aborts beyond the last position row.
    ternary   neither knows BitLinear here: the matrices are written as what they are rounded to, codes times scale.

Source: transformers' modeling_gpt2.py; llama.cpp's arch gpt2.
"""

import re
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmforge.convert.base import Family, Tensors
from llmforge.convert.bitnet import ternary_notes, ternary_types
from llmforge.errors import ConvertError, shown
from llmforge.formats.lazy import LazyTensor
from llmforge.models import GPT, GPTConfig
from llmforge.quant.ternary import fake_ternary

_CONV1D = re.compile(r".*\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# The causal mask, which older versions keep with the weights.
_MASK_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")

_GGUF_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}


class GPT2(Family):
    """The rows of GPT."""

    model_class = GPT
    config_class = GPTConfig
    layers_field = "n_layer"
    hf_model_type = "gpt2"
    hf_architecture = "GPT2LMHeadModel"
    # Hugging Face's key -> our field and transformers' default, which an absent key means.
    hf_fields: ClassVar = {
        "vocab_size": ("vocab_size", 50_257),
        "n_positions": ("block_size", 1024),
        "n_embd": ("n_embd", 768),
        "n_layer": ("n_layer", 12),
        "n_head": ("n_head", 12),
        "activation_function": ("activation_function", "gelu_new"),
        "resid_pdrop": ("dropout", 0.1),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    }
    # Settings that GPT has in one form only.
    hf_fixed: ClassVar = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
    # Of heads that are not read, or checked in `config_from_hf`.
    hf_ignored = """
        n_ctx embd_pdrop attn_pdrop predict_special_tokens
        summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    """
    gguf_arch = "gpt2"
    gguf_names = _GGUF_NAMES
    layers_prefix = "transformer.h."
    gguf_fields: ClassVar = {
        "context_length": ("block_size", None),
        "embedding_length": ("n_embd", None),
        "block_count": ("n_layer", None),
        "attention.head_count": ("n_head", None),
        "vocab_size": ("vocab_size", None),
    }

    def to_hf(
        self, config: GPTConfig, tensors: Tensors, ternary: str
    ) -> tuple[GPTConfig, Tensors, dict[str, Any], list[str]]:
        if not config.ternary:
            return config, tensors, {}, []
        notes = [
            "transformers has no ternary GPT-2: the weights are written as floats, each one of three values of its matrix"
        ]
        if config.act_quant != "none":
            notes.append(
                "transformers does not round this model's activations; in training they were rounded to 8 bits"
            )
        return config.replace(ternary=False), _rounded(tensors), {}, notes

    def complete(self, config: GPTConfig, tensors: Tensors) -> tuple[GPTConfig, Tensors]:
        with_bias = self.blueprint(config.replace(bias=True))
        zeros = {
            name: LazyTensor.of(torch.zeros(p.shape))
            for name, p in with_bias.named_parameters()
            if name.endswith(".bias")
        }
        return config.replace(bias=True), {**zeros, **tensors}

    def append_eos_row(self, config: GPTConfig, tensors: Tensors) -> tuple[GPTConfig, Tensors]:
        # u is a unit vector orthogonal to every row of the output projection W. Adding 20u to the bias of the final norm changes
        # no logit, since W u = 0; a new row -3u gets a logit near -60, P < 1e-25. A row of zeros would get the logit 0 and end a
        # text every few hundred characters.
        V, C = config.vocab_size, config.n_embd
        if V >= C:
            raise ConvertError(
                f"the model has no row for <|endoftext|> and none can be added without changing its output: that needs "
                f"vocab_size ({V}) < n_embd ({C}); train it again with a tokenizer that reserves <|endoftext|>"
            )
        head = "transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"
        u = torch.linalg.svd(tensors[head].read().double().cpu(), full_matrices=True).Vh[-1]  # (C,)
        tensors = dict(tensors)
        for name in {"transformer.wte.weight", head}:
            tensors[name] = tensors[name].then(lambda W: torch.cat([W, (-3 * u).to(W)[None]]))
        tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].then(lambda b: b + (20 * u).to(b))
        return config.replace(vocab_size=V + 1), tensors

    def hf_layout(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if tensor.ndim == 2 and _CONV1D.fullmatch(name) else tensor

    def hf_keeps_rows(self, name: str) -> bool:
        return not _CONV1D.fullmatch(name)

    def own_name(self, hf_name: str) -> str | None:
        if _MASK_BUFFER.fullmatch(hf_name):
            return None
        return hf_name if hf_name.startswith(("transformer.", "lm_head.")) else f"transformer.{hf_name}"

    def config_to_hf(self, config: GPTConfig) -> dict[str, Any]:
        return {"n_ctx": config.block_size, "n_inner": None, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout}

    def config_from_hf(self, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        n_inner, n_embd = values.pop("n_inner", None), values.get("n_embd", 768)
        if n_inner is not None and isinstance(n_embd, int) and n_inner != 4 * n_embd:
            raise ConvertError(
                f"n_inner ({shown(n_inner)}) must be 4 * n_embd ({shown(4 * n_embd)}); GPT has no other width"
            )
        if values.get("activation_function") == "gelu_pytorch_tanh":  # another name of the same function
            values["activation_function"] = "gelu_new"
        rates = {key: values.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        if any(rate != rates["resid_pdrop"] for rate in rates.values()):
            warnings.warn(
                f"GPT has one dropout; of {shown(rates)} it takes resid_pdrop for all (training only)", stacklevel=4
            )
        return values

    def to_gguf(self, config: GPTConfig, tensors: Tensors) -> tuple[GPTConfig, Tensors, list[str]]:
        notes = []
        if config.activation_function == "relu":
            raise ConvertError(
                "llama.cpp computes GPT-2 with GELU always, so a model with activation_function 'relu' would load and write nonsense; "
                "train with 'gelu_new', or use it in torch or transformers"
            )
        if config.ternary:
            tensors = _rounded(tensors)
        if config.activation_function == "gelu":
            notes.append("llama.cpp computes GELU in its tanh form; the difference to erf does not show in its output")
        rows = -(-config.block_size // 256) * 256
        if rows > config.block_size:
            more = rows - config.block_size
            wpe = tensors["transformer.wpe.weight"].then(lambda w: torch.cat([w, w[-1:].expand(more, -1)]))
            tensors = {**tensors, "transformer.wpe.weight": wpe}
            notes.append(
                f"context padded from {config.block_size} to {rows} by repeating the last position, since llama.cpp rounds "
                f"up to a multiple of 256; the model has learned {config.block_size}"
            )
        return config.replace(block_size=rows), tensors, notes

    def gguf_types(self, config: GPTConfig, file_type: str) -> dict[str, str]:
        return ternary_types(file_type) if config.ternary else {}

    def gguf_notes(self, config: GPTConfig, file_type: str) -> list[str]:
        return ternary_notes(file_type, config.act_quant, "bfloat16") if config.ternary else []

    def gguf_metadata(self, config: GPTConfig) -> dict[str, Any]:
        return {"feed_forward_length": 4 * config.n_embd, "attention.layer_norm_epsilon": 1e-5}

    def from_gguf(
        self, values: dict[str, Any], metadata: dict[str, Any], tensors: Tensors
    ) -> tuple[dict[str, Any], Tensors]:
        width, n_embd = metadata.pop("feed_forward_length", None), values["n_embd"]
        epsilon = metadata.pop("attention.layer_norm_epsilon", None)
        if not isinstance(n_embd, int) or width != 4 * n_embd:
            raise ConvertError(
                f"feed_forward_length ({shown(width)}) must be 4 * embedding_length; GPT has no other width"
            )
        if not (isinstance(epsilon, float) and abs(epsilon - 1e-5) <= 1e-11):
            raise ConvertError(f"attention.layer_norm_epsilon ({shown(epsilon)}) must be 1e-5; GPT has no other")
        return {**values, "tie_word_embeddings": "lm_head.weight" not in tensors}, tensors


def _rounded(tensors: Tensors) -> Tensors:
    """The matrices of the blocks as their BitLinear computes with them."""
    return {name: tensor.then(fake_ternary) if _CONV1D.fullmatch(name) else tensor for name, tensor in tensors.items()}
