"""BitNet as transformers' and llama.cpp's files hold it, in either of its profiles.

    plain      Hugging Face's llama and llama.cpp's arch llama: every engine computes it.
    sub_norm   BitNetForCausalLM and arch bitnet, which has SiLU and a tied output projection only.

Hugging Face keeps the weights in one of three forms (`config.json`, quantization_config):
    bitlinear      packed codes and a scale that divides, 1 / absmean; Falcon-E's files, and what no linear_class means
    autobitlinear  packed codes and a scale that multiplies, absmean; Microsoft's files; transformers 5.3 fails on them
    latent         the float weights of training, which transformers rounds anew in each forward pass ("online")
The two conventions of the scale are opposites, and a file with the wrong one loads and computes noise.

GGUF files hold codes times scale: exactly, where a type can (TQ1_0, TQ2_0, F16), since the scale is a bfloat16.

Source: transformers' integrations/bitnet.py and modeling_bitnet.py; llama.cpp's archs llama and bitnet.
"""

import re
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmforge.convert.base import Tensors
from llmforge.convert.llama import GGUF_NAMES, HFLlama
from llmforge.errors import ConvertError, shown
from llmforge.formats.lazy import LazyTensor
from llmforge.models import BitNet, BitNetConfig
from llmforge.quant.ternary import (
    absmean,
    fake_ternary,
    latent_weight,
    pack_2bit,
    rounded_scale,
    ternary_codes,
    unpack_2bit,
)

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
_LARGEST_ABSMEAN = 8.0  # of trained weights; theirs are below 1, and 1 / theirs above it


class TernaryLlama(HFLlama):
    """The rows of BitNet without sub-norms: a llama with ternary weights."""

    model_class = BitNet
    config_class = BitNetConfig
    hf_quantized = True
    hf_fields: ClassVar = {
        # transformers' LlamaConfig and BitNetConfig have no biases that BitNet could have.
        **{key: row for key, row in HFLlama.hf_fields.items() if key not in ("attention_bias", "mlp_bias")},
        # Ours: transformers ignores them.
        "act_quant": ("act_quant", "token"),
        "scale_dtype": ("scale_dtype", "float32"),
    }
    implied: ClassVar = {"sub_norm": False}

    def expresses(self, config: Any) -> bool:
        return not config.sub_norm and bool(config.quantized) and config.hidden_act == "silu"

    def reads_hf(self, values: Mapping[str, Any]) -> bool:
        return values.get("model_type") == self.hf_model_type and _is_bitnet(values.get("quantization_config"))

    def reads_gguf(self, arch: object, types: Mapping[str, str], tensors: Tensors) -> bool:
        # A float model that was rounded to ternary blocks has a scale for each block, and is no BitNet.
        return arch == self.gguf_arch and _all_ternary(types) and _has_one_scale(tensors["blk.0.attn_q.weight"].read())

    # Hugging Face

    def to_hf(
        self, config: BitNetConfig, tensors: Tensors, ternary: str
    ) -> tuple[BitNetConfig, Tensors, dict[str, Any], list[str]]:
        notes = []
        if config.act_quant != "token":
            how = "per 256 values" if config.act_quant == "group" else "not at all"
            notes.append(f"transformers rounds activations per token; in training they were rounded {how}")
        scale_dtype = getattr(torch, config.scale_dtype)
        written: Tensors = {}
        for name, tensor in tensors.items():
            if not _LINEAR.fullmatch(name):
                written[name] = tensor
            elif ternary == "latent":
                written[name] = tensor.then(partial(_latent, name=name, scale_dtype=scale_dtype))
            else:
                written[name] = tensor.then(lambda w: pack_2bit(ternary_codes(w)[0]))
                scale = partial(_published_scale, scale_dtype=scale_dtype, divides=ternary == "bitlinear")
                written[f"{name}_scale"] = tensor.then(scale)
        quantization = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if ternary == "bitlinear" else "autobitlinear",
            "quantization_mode": "online" if ternary == "latent" else "offline",
            "use_rms_norm": False,
            "modules_to_not_convert": None,
        }
        return config, written, {"quantization_config": quantization}, notes

    def config_from_hf(self, values: dict[str, Any]) -> dict[str, Any]:
        values = super().config_from_hf(values)
        for key in ("attention_bias", "mlp_bias"):
            if values.pop(key, False):
                raise ConvertError(f"{key} must be false: BitNet has no biases")
        return values

    def from_hf(self, values: Mapping[str, Any], tensors: Tensors) -> Tensors:
        quantization = values.get("quantization_config")
        if not isinstance(quantization, dict):
            return tensors
        linear_class = quantization.get("linear_class") or "bitlinear"
        mode = quantization.get("quantization_mode") or "offline"
        if linear_class not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
            raise ConvertError(
                f"quantization_config has linear_class {shown(linear_class)} and quantization_mode {shown(mode)}; known are bitlinear "
                "and autobitlinear, offline and online"
            )
        if quantization.get("use_rms_norm"):
            raise ConvertError(
                "quantization_config has use_rms_norm: norms inside the linear layers, which BitNet has not"
            )
        if set(quantization.get("modules_to_not_convert") or []) - {"lm_head"}:
            raise ConvertError(
                f"quantization_config leaves {shown(quantization['modules_to_not_convert'])} as floats; BitNet does so with lm_head alone"
            )
        if linear_class == "autobitlinear" and mode == "online":
            return {
                name: tensor.then(partial(_not_rounded_yet, name=name)) if _LINEAR.fullmatch(name) else tensor
                for name, tensor in tensors.items()
            }
        return _from_packed(tensors, divides=linear_class == "bitlinear", linear_class=linear_class)

    # GGUF

    def to_gguf(self, config: Any, tensors: Tensors) -> tuple[Any, Tensors, list[str]]:
        scale_dtype = getattr(torch, config.scale_dtype)
        tensors = {
            name: tensor.then(partial(fake_ternary, scale_dtype=scale_dtype)) if _LINEAR.fullmatch(name) else tensor
            for name, tensor in tensors.items()
        }
        return super().to_gguf(config, tensors)

    def gguf_notes(self, config: BitNetConfig, file_type: str) -> list[str]:
        return ternary_notes(file_type, config.act_quant, config.scale_dtype)

    def gguf_types(self, config: BitNetConfig, file_type: str) -> dict[str, str]:
        return ternary_types(file_type)

    def from_gguf(
        self, values: dict[str, Any], metadata: dict[str, Any], tensors: Tensors
    ) -> tuple[dict[str, Any], Tensors]:
        if any(name.endswith((".scale", ".input_scale")) for name in tensors):
            raise ConvertError(
                "it has scales beside its weights, which some of llama.cpp's archs ignore; fold them into the weights"
            )
        values, tensors = super().from_gguf(values, metadata, tensors)
        tensors = {
            name: tensor.then(partial(_latent_of_product, name=name)) if _LINEAR.fullmatch(name) else tensor
            for name, tensor in tensors.items()
        }
        return {**values, "act_quant": "group"}, tensors


class _SubNorms(HFLlama):
    """What BitNets with sub-norms share, ternary or not: names, defaults, and the limits of llama.cpp's arch bitnet."""

    model_class = BitNet
    config_class = BitNetConfig
    hf_model_type = "bitnet"
    hf_architecture = "BitNetForCausalLM"
    hf_fields: ClassVar = {
        **TernaryLlama.hf_fields,
        "vocab_size": ("vocab_size", 128_256),
        "hidden_size": ("hidden_size", 2560),
        "intermediate_size": ("intermediate_size", 6912),
        "num_hidden_layers": ("num_hidden_layers", 30),
        "num_attention_heads": ("num_attention_heads", 20),
        "num_key_value_heads": ("num_key_value_heads", 5),
        "rms_norm_eps": ("rms_norm_eps", 1e-5),
        "rope_theta": ("rope_theta", 500_000.0),
        "hidden_act": ("hidden_act", "relu2"),
    }
    hf_fixed: ClassVar = {"attention_bias": False}
    gguf_arch = "bitnet"
    turns_neighbours = False
    gguf_names: ClassVar = {
        **GGUF_NAMES,
        "self_attn.attn_sub_norm": "attn_sub_norm",
        "mlp.ffn_sub_norm": "ffn_sub_norm",
    }

    def to_gguf(self, config: Any, tensors: Tensors) -> tuple[Any, Tensors, list[str]]:
        _check_arch_bitnet(config)
        return super().to_gguf(config, tensors)

    def from_gguf(
        self, values: dict[str, Any], metadata: dict[str, Any], tensors: Tensors
    ) -> tuple[dict[str, Any], Tensors]:
        _check_bitnet_file(metadata, tensors)
        return super().from_gguf(values, metadata, tensors)


class HFBitNet(_SubNorms, TernaryLlama):
    """The rows of BitNet with sub-norms."""

    implied: ClassVar = {"sub_norm": True}

    def reads_hf(self, values: Mapping[str, Any]) -> bool:
        return values.get("model_type") == self.hf_model_type

    def reads_gguf(self, arch: object, types: Mapping[str, str], tensors: Tensors) -> bool:
        return arch == self.gguf_arch and _all_ternary(types)

    def expresses(self, config: Any) -> bool:
        return bool(config.sub_norm and config.quantized)

    def config_from_hf(self, values: dict[str, Any]) -> dict[str, Any]:
        if "quantization_config" not in values:
            raise ConvertError(
                "a bitnet without quantization_config, which transformers loads and computes with float weights: if these are the latent "
                'weights of a ternary model, add "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", '
                '"quantization_mode": "online"} to its config.json; if it is a float model, "quantization_config": null'
            )
        if not _is_bitnet(values["quantization_config"]):
            raise ConvertError(f"quantization_config ({shown(values['quantization_config'])}) must be that of bitnet")
        return super().config_from_hf(values)


class FloatBitNet(_SubNorms):
    """The rows of a BitNet with sub-norms that is not quantized: the float twin of the other."""

    implied: ClassVar = {"sub_norm": True, "quantized": False}

    def expresses(self, config: Any) -> bool:
        return not config.quantized

    def reads_hf(self, values: Mapping[str, Any]) -> bool:
        return values.get("model_type") == self.hf_model_type and values.get("quantization_config", "missing") is None

    def reads_gguf(self, arch: object, types: Mapping[str, str], tensors: Tensors) -> bool:
        return arch == self.gguf_arch and not _all_ternary(types)

    def to_hf(
        self, config: BitNetConfig, tensors: Tensors, ternary: str
    ) -> tuple[BitNetConfig, Tensors, dict[str, Any], list[str]]:
        return config, tensors, {"quantization_config": None}, []


def ternary_types(file_type: str) -> dict[str, str]:
    """Types of a ternary model's file beside those of the mixture: what embeds and what predicts is not ternary, and llama.cpp's
    choice for an untied embedding, 4 bits, costs more than all else."""
    return {"token_embd.weight": "Q6_K"} if file_type in ("TQ1_0", "TQ2_0") else {}


def ternary_notes(file_type: str, act_quant: str, scale_dtype: str) -> list[str]:
    """In what the file of a ternary model differs from its training."""
    trained = {"token": "per token", "group": "per 256 values", "none": "not at all"}[act_quant]
    ternary, floats = file_type in ("TQ1_0", "TQ2_0"), file_type in ("F32", "F16", "BF16")
    notes = []
    if ternary and act_quant != "group":
        notes.append(f"llama.cpp rounds activations per 256 values here; in training they were rounded {trained}")
    if floats and act_quant != "none":
        notes.append(f"llama.cpp does not round activations with {file_type}; in training they were rounded {trained}")
    if not ternary and not floats:
        notes.append(
            f"{file_type} rounds ternary weights once more; TQ2_0 holds them exactly, and is smaller and faster"
        )
    if ternary and scale_dtype != "bfloat16":
        notes.append("the scales are rounded to float16; with scale_dtype='bfloat16' they would be as in training")
    return notes


def _check_arch_bitnet(config: BitNetConfig) -> None:
    """Refuse what llama.cpp's arch bitnet would load and compute differently."""
    if config.hidden_act != "silu":
        raise ConvertError(
            f"llama.cpp computes the gate of arch bitnet with SiLU always, so a model with hidden_act {config.hidden_act!r} would load "
            "and write nonsense; train with hidden_act='silu', or use it in torch or transformers"
        )
    if not config.tie_word_embeddings:
        raise ConvertError(
            "llama.cpp takes the token embedding for the output projection of arch bitnet, and this model has another one; train with "
            "tie_word_embeddings=True, or without sub_norm"
        )
    if (width := config.num_attention_heads * config.head_width) != config.hidden_size:
        raise ConvertError(
            f"llama.cpp's arch bitnet needs num_attention_heads * head_dim ({width}) equal to hidden_size ({config.hidden_size})"
        )


def _check_bitnet_file(metadata: dict[str, Any], tensors: Tensors) -> None:
    if "lm_head.weight" in tensors:
        raise ConvertError(
            "it has an output.weight, but llama.cpp takes the token embedding for the output of arch bitnet"
        )
    if (gate := metadata.pop("hidden_activation", "silu")) != "silu":
        raise ConvertError(f"its hidden_activation is {shown(gate)}, but llama.cpp computes arch bitnet with SiLU")


def _is_bitnet(quantization: object) -> bool:
    return isinstance(quantization, dict) and quantization.get("quant_method") == "bitnet"


def _all_ternary(types: Mapping[str, str]) -> bool:
    """Whether all matrices of all layers are of ternary types."""
    layers = {types[name] for name in types if re.fullmatch(r"blk\.\d+\.\w+(?<!norm)\.weight", name)}
    return bool(layers) and layers <= {"TQ1_0", "TQ2_0"}


def _has_one_scale(weight: Tensor) -> bool:
    """Whether all values but the zeros have one magnitude."""
    magnitudes = weight.abs()
    largest = magnitudes.max()
    return bool(((magnitudes == largest) | (magnitudes == 0)).all())


def _latent(weight: Tensor, *, name: str, scale_dtype: torch.dtype) -> Tensor:
    """Latent weights whose absmean, which transformers does not round, is the scale of training."""
    if weight.device.type != "meta" and _has_one_scale(weight):
        raise ConvertError(
            f"{name} has no latent weights: the model was read from a file of ternary ones; export it packed (ternary='bitlinear')"
        )
    mean = absmean(weight)
    return weight.float() * (rounded_scale(mean, scale_dtype) / mean)


def _not_rounded_yet(weight: Tensor, *, name: str) -> Tensor:
    if weight.device.type != "meta" and _has_one_scale(weight):
        raise ConvertError(
            f"{name} is ternary already, but quantization_config asks to round it anew (online), which gives other scales; write it as "
            "packed codes with quantization_mode offline"
        )
    return weight


def _published_scale(weight: Tensor, *, scale_dtype: torch.dtype, divides: bool) -> Tensor:
    scale = rounded_scale(absmean(weight), scale_dtype)
    return (1 / scale if divides else scale).reshape(1)


def _from_packed(tensors: Tensors, *, divides: bool, linear_class: str) -> Tensors:
    """Packed codes and scales -> latent weights that give them again."""
    read = {name: tensor for name, tensor in tensors.items() if not name.endswith(".weight_scale")}
    scales = {}
    for name in tensors:
        if not _LINEAR.fullmatch(name):
            continue
        stored = tensors.get(f"{name}_scale")
        if stored is None or stored.numel != 1:
            raise ConvertError(f"{name} has no weight_scale of one value, without which its codes mean nothing")
        value = stored.read().float().item()
        if not 0 < value < float("inf"):
            raise ConvertError(f"{name}_scale is {value}, but must be above 0")
        scales[name] = 1 / value if divides else value
    if scales and statistics.median(scales.values()) > _LARGEST_ABSMEAN:
        how, other = ("divides by", "multiplies with") if divides else ("multiplies with", "divides by")
        raise ConvertError(
            f"linear_class {linear_class} {how} weight_scale, which makes weights of {statistics.median(scales.values()):.3g} here: the "
            f"file means the other convention, which {other} it; correct linear_class in its config.json"
        )
    for name, scale in scales.items():
        read[name] = _unpacked(tensors[name], torch.tensor(scale), name)
    return read


def _unpacked(packed: LazyTensor, scale: Tensor, name: str) -> LazyTensor:
    if packed.dtype == torch.uint8:
        shape = (4 * packed.shape[0], *packed.shape[1:])
        return LazyTensor(shape, torch.float32, lambda: latent_weight(unpack_2bit(packed.read()), scale))

    def of_floats() -> Tensor:
        codes = packed.read().float()
        if not ((codes == 0) | (codes.abs() == 1)).all():
            raise ConvertError(
                f"{name} holds other values than the codes -1, 0 and 1, but quantization_mode is offline"
            )
        return latent_weight(codes, scale)

    return LazyTensor(packed.shape, torch.float32, of_floats)


def _latent_of_product(product: Tensor, *, name: str) -> Tensor:
    """Codes times scale -> latent weights that give them again."""
    if product.device.type == "meta":
        return product
    if not _has_one_scale(product):
        raise ConvertError(f"{name} has blocks of different scales: a float model that was rounded, not a BitNet")
    return latent_weight(product.sign(), product.abs().max().float())
