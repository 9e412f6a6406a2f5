"""BitNet b1.58: Llama's block with ternary weights and 8-bit activations, with Hugging Face's field and parameter names.

A Llama whose linear layers, but for the output projection, are BitLinear. In two profiles:
    plain      nothing else changes: Falcon-E's and TriLM's form. transformers reads it as a Llama, llama.cpp as its arch llama.
    sub_norm   one more RMSNorm before o_proj and one before down_proj: Microsoft's form, BitNetForCausalLM and arch bitnet. With
               hidden_act "relu2" it is the architecture of BitNet b1.58 2B4T, which llama.cpp does not compute.

Shapes and parameters are Llama's, plus H*D + F gains in each block with sub_norm. A ternary weight takes log2(3) = 1.58 bits of
information and 2.06 bits in a file (TQ2_0); embeddings and norms are floats.

Sources: Ma et al. 2024, arXiv:2402.17764; Microsoft 2025, arXiv:2504.12285 (2B4T); transformers' modeling_bitnet.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmforge.errors import ConfigError
from llmforge.models.llama import Attention, Block, Llama, LlamaConfig
from llmforge.nn import BitLinear, RMSNorm, SwiGLU, check_ternary_width, replace_linear_


@dataclass(frozen=True, kw_only=True)
class BitNetConfig(LlamaConfig):
    """Shape of a BitNet; the fields of `LlamaConfig` and what is ternary about it.

    Raises:
        ConfigError: as for LlamaConfig; a width that blocks of 256 ternary weights do not divide (the nearest that can be are named);
            biases, norms of heads or sliding windows, which no engine runs with ternary weights.
    """

    FAMILY: ClassVar[str] = "bitnet"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Shapes of the float presets of nearly the same names; activations as llama.cpp rounds them.
        "bitnet-15m": dict(
            vocab_size=8192, hidden_size=512, intermediate_size=1280, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, act_quant="group",
        ),
        "bitnet-42m": dict(
            vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, act_quant="group",
        ),
        "bitnet-110m": dict(
            vocab_size=16_384, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
            num_key_value_heads=12, max_position_embeddings=1024, tie_word_embeddings=True, act_quant="group",
        ),
        "bitnet-350m": dict(
            vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=True, act_quant="group",
        ),
        # The shape of Microsoft's model.
        "bitnet-2b-4t": dict(
            vocab_size=128_256, hidden_size=2560, intermediate_size=6912, num_hidden_layers=30, num_attention_heads=20,
            num_key_value_heads=5, max_position_embeddings=4096, rope_theta=500_000.0, tie_word_embeddings=True,
            sub_norm=True, hidden_act="relu2",
        ),
    }  # fmt: skip

    sub_norm: bool = False  # RMSNorm before o_proj and before down_proj
    hidden_act: Literal["silu", "relu2"] = "silu"  # of the gate, which is there always; "relu2": the square of ReLU
    # Activations: one scale per token as transformers computes, per 256 values as llama.cpp does, or floats.
    act_quant: Literal["token", "group", "none"] = "token"
    scale_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # bfloat16: files hold exactly what was trained
    quantized: bool = True  # False: the float twin, the same model of nn.Linear

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            check_ternary_width(name, getattr(self, name))
        super().__post_init__()
        check_ternary_width("num_attention_heads * head_dim", self.num_attention_heads * self.head_width)
        for name in (
            "attention_bias",
            "qkv_bias",
            "mlp_bias",
            "qk_norm",
            "sliding_window",
            "final_logit_softcapping",
        ):
            if getattr(self, name):
                raise ConfigError(f"{name} ({getattr(self, name)}) is not for BitNet, which no engine runs with it")
        if (rows := self.kv_heads * self.head_width) % 4:
            raise ConfigError(
                f"num_key_value_heads * head_dim ({rows}) must be a multiple of 4: weights are packed by four"
            )
        for name, known in (
            ("hidden_act", ("silu", "relu2") if self.sub_norm else ("silu",)),  # nobody has relu2 without
            ("act_quant", ("token", "group", "none")),
            ("scale_dtype", ("bfloat16", "float32")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, known))}")
        if not (self.quantized or self.sub_norm):
            raise ConfigError("quantized=False without sub_norm is a Llama: build that, as float_twin() says it")

    def float_twin(self) -> LlamaConfig | None:
        """The same model with float weights and activations: a Llama, with sub_norm a BitNet that is not quantized; None = it is one."""
        if not self.quantized:
            return None
        if self.sub_norm:
            return self.replace(quantized=False)
        names = [field.name for field in fields(LlamaConfig)]
        return LlamaConfig.from_dict({name: value for name, value in self.to_dict().items() if name in names})


class SubNormAttention(Attention):
    """Llama's attention with a norm of what the heads found."""

    def __init__(self, config: BitNetConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attn_sub_norm = RMSNorm(config.num_attention_heads * config.head_width, eps=config.rms_norm_eps)

    def project(self, y: Tensor) -> Tensor:
        return super().project(self.attn_sub_norm(y))


class MLP(SwiGLU):
    """Llama's feed-forward, with a norm before the way back and another gate where the config says so."""

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__(config.hidden_size, config.intermediate_size)
        self.squared_relu = config.hidden_act == "relu2"
        if config.sub_norm:
            self.ffn_sub_norm = RMSNorm(config.intermediate_size, eps=config.rms_norm_eps)
        self.sub_norm = config.sub_norm

    def hidden(self, x: Tensor) -> Tensor:
        h = F.relu(self.gate_proj(x)).square() * self.up_proj(x) if self.squared_relu else super().hidden(x)
        return self.ffn_sub_norm(h) if self.sub_norm else h  # (..., F)


class BitNetBlock(Block):
    def __init__(self, config: BitNetConfig, layer: int) -> None:
        super().__init__(config, layer)
        if config.sub_norm:
            self.self_attn = SubNormAttention(config, layer)
        self.mlp = MLP(config)


class BitNet(Llama):
    """A BitNet language model: `model(idx)` maps (B, T) token ids to (B, T, V) logits.

    >>> config = BitNetConfig(vocab_size=65, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4)
    >>> model = BitNet(config)
    >>> model(torch.zeros(1, 16, dtype=torch.long)).shape
    torch.Size([1, 16, 65])
    >>> model.model.layers[0].mlp.up_proj
    BitLinear(in_features=256, out_features=512, bias=False, act_quant=token)
    """

    config: BitNetConfig
    block_class = BitNetBlock  # type: ignore[assignment]

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__(config)
        if config.quantized:
            dtype: torch.dtype = getattr(torch, config.scale_dtype)
            replace_linear_(self, BitLinear, act_quant=config.act_quant, scale_dtype=dtype)

    @classmethod
    def from_float(cls, model: Llama, **options: Any) -> "BitNet":
        """A BitNet that begins with the weights of a trained Llama, to be trained on: rounded at once it would be useless, so let
        the rounding grow (TrainConfig.quantize_warmup_steps).

        Args:
            model: stays as it is; the weights are copied.
            options: of BitNetConfig.
        Raises:
            ConfigError: a Llama with biases, norms of heads, a sliding window, or widths that are no multiples of 256.
        """
        config = BitNetConfig.from_dict({**model.config.to_dict(), **options})
        with torch.device("meta"):
            converted = cls(config)
        converted.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        if config.tie_word_embeddings:
            converted.lm_head.weight = converted.model.embed_tokens.weight
        return converted
