"""Llama: the family of Llama 2 and 3, TinyLlama, SmolLM, Mistral, Qwen2, Qwen3 and Arcee, with Hugging Face's field and parameter names.

Rotary positions, pre-norm blocks with RMSNorm, grouped-query attention, SwiGLU feed-forward. What the relatives add is a field each:
biases of q, k and v (Qwen2), norms of the heads of q and k (Qwen3), a sliding window (Mistral), a feed-forward of squared ReLU
without a gate (Arcee).

Shapes: B batch, T tokens, C = hidden_size, H = num_attention_heads, K = num_key_value_heads, D = head_dim, F = intermediate_size,
V = vocab_size, L = num_hidden_layers.

Parameters, without biases:
    embedding   V*C, and V*C for the output projection where it is not tied
    each block  attention 2*C*H*D + 2*C*K*D,  feed-forward 3*C*F (2*C*F of relu2),  two norms 2*C,  with qk_norm 2*D
    final norm  C
    llama-3-8b: V=128256, C=4096, H=32, K=8, D=128, F=14336, L=32, untied, gives 8,030,261,248.

Sources: Touvron et al. 2023, arXiv:2302.13971; Llama team 2024, arXiv:2407.21783; Jiang et al. 2023, arXiv:2310.06825 (Mistral);
Qwen team, arXiv:2407.10671 (Qwen2) and arXiv:2505.09388 (Qwen3); transformers' modeling_arcee.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from llmforge.errors import ConfigError
from llmforge.models.base import LanguageModel, ModelConfig
from llmforge.nn import (
    Checkpointing,
    Documents,
    KVCache,
    RMSNorm,
    RopeScaling,
    SoftCappedLinear,
    SquaredReLU,
    SwiGLU,
    apply_rope,
    attention_mask,
    causal_attention,
    checkpointed,
    in_tiles,
    rope_angles,
    rope_frequencies,
)

_LLAMA_3_SCALING = dict(
    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Shape of a Llama.

    Raises:
        ConfigError: a size below 1, heads that do not divide, an odd head_dim, or settings that exclude each other.
    """

    FAMILY: ClassVar[str] = "llama"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # As large as char-gpt-cpu, with what learns faster per token and any engine runs (as qwen3); vocab_size from the tokenizer.
        "modern": dict(
            hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64,
            tie_word_embeddings=True, qk_norm=True, residual_init="zero",
        ),
        # For training from scratch. All widths are multiples of 256, so that every tensor can be a K-quant; names count the
        # parameters with this vocabulary, which the tokenizer of a run replaces.
        "llama-15m": dict(
            vocab_size=8192, hidden_size=512, intermediate_size=1280, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        ),
        "llama-42m": dict(
            vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        ),
        "llama-110m": dict(
            vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
            num_key_value_heads=12, max_position_embeddings=1024, tie_word_embeddings=True,
        ),
        "llama-350m": dict(
            vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=True,
        ),
        # The shapes of Meta's models.
        "llama-3.2-1b": dict(
            vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, max_position_embeddings=131_072, rope_theta=500_000.0,
            rope_scaling=_LLAMA_3_SCALING, tie_word_embeddings=True,
        ),
        "llama-3-8b": dict(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500_000.0,
        ),
    }  # fmt: skip

    vocab_size: int  # V; ids are 0 .. V-1
    hidden_size: int = 4096  # C
    intermediate_size: int = 11_008  # F
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int | None = None  # K; None = H, 1 = multi-query attention
    head_dim: int | None = None  # D; None = C / H
    max_position_embeddings: int = 2048  # most tokens in a context
    rms_norm_eps: float = 1e-5  # as Meta's models and Mistral
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # for a context longer than the one trained on first
    tie_word_embeddings: bool = False  # lm_head.weight is the token embedding
    attention_bias: bool = False  # of q, k, v and o
    qkv_bias: bool = False  # of q, k and v alone (Qwen2)
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and of k (Qwen3)
    sliding_window: int | None = None  # how many tokens a token sees, itself included (Mistral); None = all of the past
    max_window_layers: int = 0  # so many layers at the beginning do without the window
    attention_dropout: float = 0.0  # of attention weights, in training
    # Feed-forward: "silu" is SwiGLU; "relu2" the square of ReLU without a gate (Arcee), for which intermediate_size is usually 4 C.
    hidden_act: Literal["silu", "relu2"] = "silu"
    # Logits are cap * tanh(logits / cap), 30 in Gemma 2; no file of this family can say so, so that such a model stays in torch.
    final_logit_softcapping: float | None = None
    # Of new models: what adds to the residual stream begins scaled down by the 2L additions (GPT-2), or with zeros, so that each
    # block begins as the identity. A trained model does not know.
    residual_init: Literal["scaled", "zero"] = "scaled"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} ({value}) must be at least 1")
        H, K = self.num_attention_heads, self.kv_heads
        if H % K:
            raise ConfigError(f"num_attention_heads ({H}) must be a multiple of num_key_value_heads ({K})")
        if self.head_dim is None and self.hidden_size % H:
            nearest = -(-self.hidden_size // H) * H
            raise ConfigError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads ({H}); try hidden_size={nearest}, or set head_dim"
            )
        if self.head_width % 2:
            raise ConfigError(f"head_dim ({self.head_width}) must be even: rotary positions turn pairs")
        if self.max_window_layers < 0:
            raise ConfigError(f"max_window_layers ({self.max_window_layers}) must be 0 or more")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} ({value}) must be above 0")
        if self.attention_bias and self.qkv_bias:
            raise ConfigError("attention_bias (q, k, v and o) and qkv_bias (q, k and v) exclude each other; set one")
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ConfigError(f"attention_dropout ({self.attention_dropout}) must be at least 0 and below 1")
        for name, known in (("hidden_act", ("silu", "relu2")), ("residual_init", ("scaled", "zero"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, known))}")
        cap = self.final_logit_softcapping
        if cap is not None and not (math.isfinite(cap) and cap > 0):
            raise ConfigError(f"final_logit_softcapping ({cap}) must be above 0; null leaves the logits as they are")

    @property
    def kv_heads(self) -> int:
        """K, also where num_key_value_heads is None."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """D, also where head_dim is None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer."""
        return self.sliding_window if layer >= self.max_window_layers else None


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.attention_dropout
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_width
        self.head_dim = D
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(C, H * D, bias=bias)
        self.k_proj = nn.Linear(C, K * D, bias=bias)
        self.v_proj = nn.Linear(C, K * D, bias=bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(D, eps=config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | Documents | None, kv_cache: KVCache | None
    ) -> Tensor:
        q = rearrange(self.q_proj(x), "B T (H D) -> B H T D", D=self.head_dim)
        k = rearrange(self.k_proj(x), "B T (K D) -> B K T D", D=self.head_dim)
        v = rearrange(self.v_proj(x), "B T (K D) -> B K T D", D=self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rotation), apply_rope(k, *rotation)
        if kv_cache is not None:
            k, v = kv_cache.update(self.layer, k, v)  # (B, K, S, D)
        y = causal_attention(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.project(rearrange(y, "B H T D -> B T (H D)"))

    def project(self, y: Tensor) -> Tensor:
        """What all heads found, back to the width of the model: (B, T, H*D) -> (B, T, C)"""
        out: Tensor = self.o_proj(y)
        return out


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        feed_forward = SwiGLU if config.hidden_act == "silu" else SquaredReLU
        self.mlp: nn.Module = feed_forward(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_tiles = 1  # see LanguageModel.set_mlp_tiles

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | Documents | None, kv_cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, kv_cache)
        x = x + in_tiles(self.mlp, self.post_attention_layernorm(x), self.mlp_tiles)
        return x  # (B, T, C)


class Transformer(nn.Module):
    """Embedding, blocks and final norm: (B, T) ids -> (B, T, C)."""

    def __init__(self, config: LlamaConfig, block_class: type[Block]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block_class(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.checkpointing: Checkpointing = "none"  # see LanguageModel.set_activation_checkpointing
        self._windows = [config.window_of(layer) for layer in range(config.num_hidden_layers)]
        # No buffer: `model.bfloat16()` would round it, and then far positions turn by wrong angles.
        self._frequencies = rope_frequencies(config.head_width, config.rope_theta, config.rope_scaling)  # (D/2,)
        self._rotation_scale = config.rope_scaling.attention_scale if config.rope_scaling else 1.0

    def forward(self, idx: Tensor, kv_cache: KVCache | None, documents: Documents | None) -> Tensor:
        T, device = idx.shape[1], idx.device
        if self._frequencies.device != device:
            self._frequencies = self._frequencies.to(device)
        if documents is not None:
            positions = documents.positions
        else:
            positions = torch.arange(T, device=device) if kv_cache is None else kv_cache.positions(T, device)
        rotation = rope_angles(positions, self._frequencies, self._rotation_scale)
        masks: dict[int | None, Tensor | Documents | None] = {}  # one for all layers with the same window
        mode: Checkpointing = self.checkpointing if kv_cache is None else "none"  # a cache is written once
        x = self.embed_tokens(idx)  # (B, T, C)
        for block, window in zip(self.layers, self._windows, strict=True):
            if window not in masks:
                masks[window] = _mask(T, device, window, kv_cache, documents)
            x = checkpointed(block, x, rotation, masks[window], kv_cache, mode=mode)
        if kv_cache is not None:
            kv_cache.advance(T)
        hidden: Tensor = self.norm(x)
        return hidden


def _mask(
    T: int, device: torch.device, window: int | None, kv_cache: KVCache | None, documents: Documents | None
) -> Tensor | Documents | None:
    if documents is not None:
        return documents.windowed(window)
    if kv_cache is not None:
        return kv_cache.mask(T, device, window=window)
    return None if window is None or window >= T else attention_mask(T, T, window=window, device=device)


class Llama(LanguageModel):
    """A Llama language model: `model(idx)` maps (B, T) token ids to (B, T, V) logits.

    >>> config = LlamaConfig(vocab_size=65, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...                      num_key_value_heads=2, max_position_embeddings=16)
    >>> model = Llama(config)
    >>> model(torch.zeros(1, 16, dtype=torch.long)).shape
    torch.Size([1, 16, 65])
    >>> model.num_params()  # 2*65*32 + 2*(2*32*32 + 2*32*16 + 3*32*64 + 2*32) + 32
    22752
    """

    config: LlamaConfig
    embedding_name = "model.embed_tokens"
    final_norm_name = "model.norm"
    block_class: ClassVar[type[Block]] = Block  # a relative with other blocks has its own

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.context_length = config.max_position_embeddings
        self.model = Transformer(config, self.block_class)
        sizes, cap = (config.hidden_size, config.vocab_size), config.final_logit_softcapping
        self.lm_head = nn.Linear(*sizes, bias=False) if cap is None else SoftCappedLinear(*sizes, bias=False, cap=cap)
        self._init_weights()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _init_weights(self) -> None:
        """N(0, 0.02); what adds to the residual stream is scaled down by the 2L additions it makes, as in GPT-2, or zero."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith(("o_proj", "down_proj"))
                std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02
                if residual and self.config.residual_init == "zero":
                    std = 0.0  # drawn all the same: the other weights do not depend on it
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, idx: Tensor, kv_cache: KVCache | None = None, *, positions: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm: (B, T) int64 -> (B, T, C). See `LanguageModel.features`."""
        documents = self._documents(idx, kv_cache, positions, "max_position_embeddings")
        hidden: Tensor = self.model(idx, kv_cache, documents)
        return hidden

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of training on one token, forward and backward, in a sequence of `seq_len` tokens (None: the whole context).

        6 per weight of a matrix, 2 forward and 4 backward: L * (2*C*H*D + 2*C*K*D + 3*C*F) in the blocks (2*C*F of relu2) and V*C in
        the output projection. Attention: 12 * L * T * H * D, the causal half that a kernel may skip and, with a sliding window, T capped by it
        not subtracted. Source: Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022 (PaLM), appendix B.
        """
        c = self.config
        attention = 2 * c.hidden_size * c.head_width * (c.num_attention_heads + c.kv_heads)
        matrices = 3 if isinstance(self.model.layers[0].mlp, SwiGLU) else 2
        feed_forward = matrices * c.hidden_size * c.intermediate_size
        matrix_weights = c.num_hidden_layers * (attention + feed_forward) + c.vocab_size * c.hidden_size
        T = seq_len or c.max_position_embeddings
        return 6 * matrix_weights + 12 * c.num_hidden_layers * T * c.num_attention_heads * c.head_width
