"""Llama as Hugging Face's and llama.cpp's llama, mistral, qwen2, qwen3 and arcee: what their files call it, and where they differ from it.

The parameter names and most config fields are Hugging Face's already. What differs:
    model types  one model here, four there: chosen by the fields that only one of them has.
    rope         transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters; both are read, the first written,
                 which transformers 5 reads too.
    neighbours   llama.cpp's archs llama and arcee turn neighbouring pairs: the rows of q and k are put in that order. qwen2 and
                 qwen3 turn halves as we do.
    llama3       llama.cpp takes the stretch of each pair from the tensor rope_freqs.

Source: transformers' modeling_llama.py, modeling_mistral.py, modeling_qwen2.py, modeling_qwen3.py, modeling_arcee.py; llama.cpp's archs
of these names.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from llmforge.convert.base import Family, Tensors
from llmforge.errors import ConvertError, shown
from llmforge.formats.lazy import LazyTensor
from llmforge.models import LanguageModel, Llama, LlamaConfig, ModelConfig
from llmforge.nn import RopeScaling

# Old checkpoints keep the frequencies with the weights.
_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
_Q_OR_K = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
    "rope_freqs": "rope_freqs",  # of GGUF alone
}


class HFLlama(Family):
    """The rows of Llama 2, 3 and their look-alikes."""

    model_class: ClassVar[type[LanguageModel]] = Llama
    config_class: ClassVar[type[ModelConfig]] = LlamaConfig
    layers_field = "num_hidden_layers"
    hf_model_type = "llama"
    hf_architecture = "LlamaForCausalLM"
    # Hugging Face's key -> our field and transformers' default, which an absent key means.
    hf_fields: ClassVar = {
        "vocab_size": ("vocab_size", 32_000),
        "hidden_size": ("hidden_size", 4096),
        "intermediate_size": ("intermediate_size", 11_008),
        "num_hidden_layers": ("num_hidden_layers", 32),
        "num_attention_heads": ("num_attention_heads", 32),
        "num_key_value_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "max_position_embeddings": ("max_position_embeddings", 2048),
        "rms_norm_eps": ("rms_norm_eps", 1e-6),
        "rope_theta": ("rope_theta", 10_000.0),
        "rope_scaling": ("rope_scaling", None),
        "tie_word_embeddings": ("tie_word_embeddings", False),
        "attention_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "attention_dropout": ("attention_dropout", 0.0),
    }
    hf_fixed: ClassVar = {"hidden_act": "silu"}
    hf_required: ClassVar = {"partial_rotary_factor": 1.0}  # if it is there at all
    hf_ignored = "pretraining_tp"  # how a sum was split among machines

    gguf_arch = "llama"
    turns_neighbours = True  # llama.cpp, in this arch
    gguf_names = GGUF_NAMES
    layers_prefix = "model.layers."
    gguf_fields: ClassVar = {
        "context_length": ("max_position_embeddings", None),
        "embedding_length": ("hidden_size", None),
        "block_count": ("num_hidden_layers", None),
        "feed_forward_length": ("intermediate_size", None),
        "attention.head_count": ("num_attention_heads", None),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps", None),
        "rope.freq_base": ("rope_theta", 10_000.0),
        "vocab_size": ("vocab_size", None),
    }

    def expresses(self, config: LlamaConfig) -> bool:
        return _is_gated(config) and not (config.qkv_bias or config.qk_norm or config.sliding_window)

    def refusal(self, config: LlamaConfig) -> str | None:
        if config.final_logit_softcapping is not None:
            return (
                f"final_logit_softcapping ({config.final_logit_softcapping:g}) is computed for Gemma 2 alone, whose blocks are others; "
                "train with final_logit_softcapping=null, or use the model in torch"
            )
        if config.hidden_act == "relu2" and (config.qk_norm or config.qkv_bias or config.sliding_window is not None):
            return (
                "a feed-forward of squared ReLU (hidden_act='relu2') is the model type arcee, which has no qk_norm, qkv_bias or "
                "sliding_window; train without these, or with hidden_act='silu'"
            )
        return None

    def own_name(self, hf_name: str) -> str | None:
        return None if _FREQUENCIES.fullmatch(hf_name) else hf_name

    def config_to_hf(self, config: LlamaConfig) -> dict[str, Any]:
        return {
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "rope_scaling": None if config.rope_scaling is None else _rope_to_hf(config.rope_scaling),
        }

    def config_from_hf(self, values: dict[str, Any]) -> dict[str, Any]:
        values = _rope_from_hf(values)
        for key, required in self.hf_required.items():
            if (value := values.pop(key, required)) not in (required, None):
                raise ConvertError(f"{key} ({shown(value)}) must be {required!r}; Llama has no other")
        return values

    def to_gguf(self, config: LlamaConfig, tensors: Tensors) -> tuple[LlamaConfig, Tensors, list[str]]:
        notes = []
        if config.sliding_window is not None:
            notes.append(
                f"llama.cpp has no sliding window for this model: it computes the same up to {config.sliding_window} tokens, and "
                "attends to all of them beyond"
            )
        tensors = reordered(config, tensors, to_neighbours) if self.turns_neighbours else dict(tensors)
        if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
            if not self.turns_neighbours:
                raise ConvertError(
                    f"llama.cpp has no rope_scaling of the rope_type 'llama3' for {self.hf_model_type}; linear and yarn it has"
                )
            tensors[_ROPE_FREQS] = LazyTensor.of(config.rope_scaling.stretch(config.head_width, config.rope_theta))
        return config, tensors, notes

    def from_gguf(
        self, values: dict[str, Any], metadata: dict[str, Any], tensors: Tensors
    ) -> tuple[dict[str, Any], Tensors]:
        if metadata.get("expert_count"):
            raise ConvertError("this is a mixture of experts, which Llama is not")
        width, value_width = metadata.pop("attention.key_length", None), metadata.pop("attention.value_length", None)
        turned = metadata.pop("rope.dimension_count", None)
        if len({width, value_width, turned} - {None}) > 1:
            raise ConvertError(
                f"keys ({shown(width)}), values ({shown(value_width)}) and what turns of them ({shown(turned)}) must be equally wide"
            )
        first = "model.layers.0.self_attn"
        values |= {
            "num_key_value_heads": metadata.pop("attention.head_count_kv", None),
            "head_dim": width or value_width or turned,
            "attention_bias": f"{first}.o_proj.bias" in tensors,
            "qkv_bias": f"{first}.q_proj.bias" in tensors and f"{first}.o_proj.bias" not in tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in tensors,
            "qk_norm": f"{first}.q_norm.weight" in tensors,
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "rope_scaling": _rope_from_gguf(metadata, values["max_position_embeddings"]),
        }
        config = LlamaConfig.from_dict(values)
        stretch = tensors.pop(_ROPE_FREQS, None)
        if stretch is not None:
            values["rope_scaling"] = _llama3_from_stretch(config, stretch)
        return values, reordered(config, tensors, to_halves) if self.turns_neighbours else tensors

    def gguf_metadata(self, config: LlamaConfig) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.head_width,
            "attention.value_length": config.head_width,
            "rope.dimension_count": config.head_width,
        }
        scaling = config.rope_scaling
        if scaling is not None and scaling.rope_type != "llama3":
            metadata |= {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": scaling.factor}
        if scaling is not None and scaling.rope_type == "yarn":
            if scaling.attention_scale != scaling.replace(attention_factor=None).attention_scale:
                raise ConvertError(
                    f"llama.cpp computes yarn's attention_factor itself as 0.1 ln(factor) + 1, not {scaling.attention_factor}"
                )
            usual = scaling.replace(beta_fast=32.0, beta_slow=1.0)  # llama.cpp does not read others for these archs
            D, theta = config.head_width, config.rope_theta
            if not torch.equal(scaling.stretch(D, theta), usual.stretch(D, theta)):
                raise ConvertError(
                    f"llama.cpp computes yarn with beta_fast 32 and beta_slow 1, not {scaling.beta_fast:g} and {scaling.beta_slow:g}"
                )
            metadata |= {
                "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
                "rope.scaling.yarn_beta_fast": scaling.beta_fast,
                "rope.scaling.yarn_beta_slow": scaling.beta_slow,
            }
        return metadata


# transformers' Mistral and Qwen2 have no such settings.
_WITHOUT_BIASES = {key: row for key, row in HFLlama.hf_fields.items() if key not in ("attention_bias", "mlp_bias")}


class HFMistral(HFLlama):
    """Llama with a sliding window."""

    hf_model_type = "mistral"
    hf_architecture = "MistralForCausalLM"
    hf_fields: ClassVar = {
        **_WITHOUT_BIASES,
        "intermediate_size": ("intermediate_size", 14_336),
        "num_key_value_heads": ("num_key_value_heads", 8),
        "max_position_embeddings": ("max_position_embeddings", 131_072),
        "sliding_window": ("sliding_window", 4096),
    }

    def expresses(self, config: LlamaConfig) -> bool:
        others = (config.qkv_bias, config.qk_norm, config.attention_bias, config.mlp_bias, config.max_window_layers)
        return _is_gated(config) and config.sliding_window is not None and not any(others)


class HFQwen2(HFLlama):
    """Llama with biases of q, k and v."""

    hf_model_type = "qwen2"
    hf_architecture = "Qwen2ForCausalLM"
    hf_fields: ClassVar = {
        **_WITHOUT_BIASES,
        "vocab_size": ("vocab_size", 151_936),
        "intermediate_size": ("intermediate_size", 22_016),
        "num_key_value_heads": ("num_key_value_heads", 32),
        "max_position_embeddings": ("max_position_embeddings", 32_768),
        "sliding_window": ("sliding_window", 4096),
        "max_window_layers": ("max_window_layers", 28),
    }
    implied: ClassVar = {"qkv_bias": True}
    hf_required: ClassVar = {**HFLlama.hf_required, "use_mrope": False}
    gguf_arch = "qwen2"
    turns_neighbours = False

    def expresses(self, config: LlamaConfig) -> bool:
        return _is_gated(config) and config.qkv_bias and not (config.qk_norm or config.mlp_bias)

    def config_to_hf(self, config: LlamaConfig) -> dict[str, Any]:
        windowed = config.sliding_window is not None
        layers = config.max_window_layers if windowed else config.num_hidden_layers
        return {**super().config_to_hf(config), "use_sliding_window": windowed, "max_window_layers": layers}

    def config_from_hf(self, values: dict[str, Any]) -> dict[str, Any]:
        values = super().config_from_hf(values)
        windowed, types = values.pop("use_sliding_window", False), values.pop("layer_types", None)
        full = values.get("max_window_layers", 28)
        if windowed not in (True, False, None):
            raise ConvertError(f"use_sliding_window ({shown(windowed)}) must be true or false")
        if types is not None and isinstance(full, int):
            layers = range(len(types) if isinstance(types, list) else 0)
            if types != ["sliding_attention" if windowed and i >= full else "full_attention" for i in layers]:
                raise ConvertError(
                    f"layer_types must be full attention, and a window from layer {shown(full)} on if use_sliding_window is set; "
                    f"got {shown(types)}"
                )
        return values if windowed else {**values, "sliding_window": None, "max_window_layers": 0}


class HFQwen3(HFQwen2):
    """Llama with norms of the heads of q and k."""

    hf_model_type = "qwen3"
    hf_architecture = "Qwen3ForCausalLM"
    hf_fields: ClassVar = {
        **HFQwen2.hf_fields,
        "head_dim": ("head_dim", 128),
        "attention_bias": ("attention_bias", False),
    }
    implied: ClassVar = {"qk_norm": True}
    gguf_arch = "qwen3"

    def expresses(self, config: LlamaConfig) -> bool:
        return _is_gated(config) and config.qk_norm and not (config.qkv_bias or config.mlp_bias)


class HFArcee(HFLlama):
    """Llama with a feed-forward of squared ReLU, without a gate."""

    hf_model_type = "arcee"
    hf_architecture = "ArceeForCausalLM"
    hf_fields: ClassVar = {
        **HFLlama.hf_fields,
        "hidden_size": ("hidden_size", 2560),
        "intermediate_size": ("intermediate_size", 18_432),
        "max_position_embeddings": ("max_position_embeddings", 4096),
        "rms_norm_eps": ("rms_norm_eps", 1e-5),
    }
    hf_fixed: ClassVar = {"hidden_act": "relu2"}
    implied: ClassVar = {"hidden_act": "relu2"}
    gguf_arch = "arcee"

    def expresses(self, config: LlamaConfig) -> bool:
        others = (config.qkv_bias, config.qk_norm, config.sliding_window, config.final_logit_softcapping)
        return config.hidden_act == "relu2" and not any(others)

    def to_gguf(self, config: LlamaConfig, tensors: Tensors) -> tuple[LlamaConfig, Tensors, list[str]]:
        if config.attention_bias or config.mlp_bias:
            raise ConvertError(
                "llama.cpp's arch arcee has no biases, and this model has attention_bias or mlp_bias; train without, or export it for "
                "transformers"
            )
        return super().to_gguf(config, tensors)


def _is_gated(config: LlamaConfig) -> bool:
    """What all but Arcee have in common: SwiGLU, and logits as they are."""
    return config.hidden_act == "silu" and config.final_logit_softcapping is None


def _rope_from_hf(values: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling in the form of our fields, whichever of the two spellings the file has."""
    values = dict(values)
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):  # of both, transformers takes the older one
        section = values.pop(key, None) or {}
        if not isinstance(section, dict):
            raise ConvertError(f"{key} must be an object, got {shown(section)}")
        if nested := sorted(name for name, value in section.items() if isinstance(value, dict)):
            raise ConvertError(f"{key} must be the same for all layers, got one for each of {', '.join(nested)}")
        rope = dict(section) or rope
    theta = rope.pop("rope_theta", None)
    if theta is not None:
        values["rope_theta"] = theta
    rope_type = rope.pop("rope_type", rope.pop("type", None)) or "default"
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ConvertError("partial_rotary_factor must be 1; Llama turns whole heads")
    if rope.pop("truncate", True) is not True:
        raise ConvertError("truncate of yarn must be true; Llama has no other")
    if rope_type == "default":
        return values
    known = ("linear", "llama3", "yarn")
    if rope_type not in known:
        raise ConvertError(f"rope_type ({shown(rope_type)}) must be one of default, {', '.join(known)}")
    if rope_type != "linear" and rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = values.get("max_position_embeddings", 2048)
    values["rope_scaling"] = {**rope, "rope_type": rope_type}
    return values


def _rope_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    keys = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
    }[scaling.rope_type]
    values = {key: getattr(scaling, key) for key in ("rope_type", "factor", *keys)}
    return {key: value for key, value in values.items() if value is not None}


def _rope_from_gguf(metadata: dict[str, Any], context: int) -> dict[str, Any] | None:
    kind, factor = metadata.pop("rope.scaling.type", None), metadata.pop("rope.scaling.factor", None)
    factor = metadata.pop("rope.scale_linear", None) if factor is None else factor  # as it was called in 2023
    original = metadata.pop("rope.scaling.original_context_length", None)
    betas = {name: metadata.pop(f"rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
    if kind == "none" or factor in (None, 0.0, 1.0):
        return None
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ConvertError(f"rope.scaling.type ({shown(kind)}) must be none, linear or yarn")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or context}
    return scaling | {name: beta for name, beta in betas.items() if beta is not None}


def _llama3_from_stretch(config: LlamaConfig, tensor: LazyTensor) -> dict[str, Any]:
    """The settings whose `stretch` is this tensor; only the ratios to the original context show in it, so that is a power of two."""
    fits = tensor.shape == (config.head_width // 2,)
    stretch = tensor.read().float().flatten() if fits else torch.tensor(math.nan)
    if torch.isfinite(stretch).all():
        for original in (2**power for power in range(3, 21)):
            scaling = dict(
                rope_type="llama3", factor=max(stretch.max().item(), 1.0), original_max_position_embeddings=original
            )
            mine = RopeScaling.from_dict(scaling).stretch(config.head_width, config.rope_theta)
            if torch.allclose(mine, stretch, rtol=1e-4, atol=0):
                return scaling
    raise ConvertError(
        "rope_freqs.weight is not the stretch of Llama 3.1 (low_freq_factor 1, high_freq_factor 4); no other is known"
    )


def reordered(config: LlamaConfig, tensors: Tensors, change: Callable[..., Tensor]) -> Tensors:
    """The rows of every q and k in another order: `change` is `to_neighbours` or `to_halves`."""
    heads = {"q": config.num_attention_heads, "k": config.kv_heads}
    reordered = dict(tensors)
    for name, tensor in tensors.items():
        found = _Q_OR_K.fullmatch(name)
        if found and tensor.shape[:1] == (
            heads[found.group(1)] * config.head_width,
        ):  # else `account` says what is wrong
            reordered[name] = tensor.then(partial(change, heads=heads[found.group(1)]))
    return reordered


def to_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows i and i + D/2 of a head next to each other; (H*D, ...) -> (H*D, ...)."""
    return rearrange(rows, "(heads half pair) ... -> (heads pair half) ...", heads=heads, half=2)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """The reverse."""
    return rearrange(rows, "(heads pair half) ... -> (heads half pair) ...", heads=heads, half=2)
