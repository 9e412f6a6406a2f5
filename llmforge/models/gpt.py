"""GPT: GPT-2 and nanoGPT's models, with nanoGPT's field names and parameter names.

Learned positions, pre-norm blocks, GELU feed-forward of four times the width, output projection tied to the token embedding.

Shapes: B batch, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = n_layer.

Parameters, with biases and tied embeddings:
    embeddings  V*C + block_size*C
    each block  attention 3C*C + 3C + C*C + C,  feed-forward 4C*C + 4C + 4C*C + C,  two norms 4C    = 12*C*C + 13*C
    final norm  2C
    gpt2: V=50257, C=768, L=12, block_size=1024 gives 124,439,808.

Sources: Radford et al. 2019 (GPT-2); https://github.com/karpathy/nanoGPT.
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
    BitLinear,
    Checkpointing,
    Documents,
    KVCache,
    LayerNorm,
    causal_attention,
    check_ternary_width,
    checkpointed,
    in_tiles,
    replace_linear_,
)


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """Shape of a GPT.

    Raises:
        ConfigError: a size below 1, a dropout outside [0, 1), or n_embd that n_head does not divide.
    """

    FAMILY: ClassVar[str] = "gpt"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # nanoGPT's config/train_shakespeare_char.py and the CPU line of its README; vocab_size comes from the tokenizer.
        "char-gpt": dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False),
        "char-gpt-cpu": dict(block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False),
        # The four sizes of GPT-2.
        "gpt2": dict(vocab_size=50_257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
        "gpt2-medium": dict(vocab_size=50_257, block_size=1024, n_layer=24, n_head=16, n_embd=1024),
        "gpt2-large": dict(vocab_size=50_257, block_size=1024, n_layer=36, n_head=20, n_embd=1280),
        "gpt2-xl": dict(vocab_size=50_257, block_size=1024, n_layer=48, n_head=25, n_embd=1600),
        # A GPT of ternary weights, the shape of the "1-bit LLM" tutorials; only its embedding and output projection are floats.
        "bit-gpt": dict(
            vocab_size=30_000,
            block_size=512,
            n_layer=6,
            n_head=8,
            n_embd=512,
            bias=False,
            ternary=True,
            act_quant="group",
        ),
    }

    vocab_size: int  # V; ids are 0 .. V-1
    block_size: int = 1024  # most tokens in a context: rows of the position embedding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C
    dropout: float = 0.0  # 0 for pretraining on plenty of text, 0.1-0.2 for many passes over little
    bias: bool = True  # in Linear and LayerNorm, as GPT-2; False is a little faster and no worse
    tie_word_embeddings: bool = True  # lm_head.weight is the token embedding
    # "gelu_new": the tanh form, as GPT-2 and llama.cpp; "gelu": the erf form, as nanoGPT; "relu", which llama.cpp does not compute.
    activation_function: Literal["gelu_new", "gelu", "relu"] = "gelu_new"
    # Of new models: what adds to the residual stream begins scaled down by the 2L additions (GPT-2), or with zeros, so that each
    # block begins as the identity. A trained model does not know.
    residual_init: Literal["scaled", "zero"] = "scaled"
    ternary: bool = False  # BitLinear in the blocks: weights of -1, 0, 1 times a scale
    act_quant: Literal["token", "group", "none"] = "token"  # of BitLinear: the scales of its 8-bit activations

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.n_embd % self.n_head:
            nearest = -(-self.n_embd // self.n_head) * self.n_head
            raise ConfigError(
                f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head}); try n_embd={nearest}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout ({self.dropout}) must be at least 0 and below 1; 0.1 is common for small texts")
        if self.activation_function not in ("gelu_new", "gelu", "relu"):
            raise ConfigError(
                f"activation_function ({self.activation_function!r}) must be 'gelu_new', 'gelu' or 'relu'"
            )
        if self.residual_init not in ("scaled", "zero"):
            raise ConfigError(f"residual_init ({self.residual_init!r}) must be 'scaled' or 'zero'")
        if self.act_quant not in ("token", "group", "none"):
            raise ConfigError(f"act_quant ({self.act_quant!r}) must be 'token', 'group' or 'none'")
        if self.ternary:
            check_ternary_width("n_embd", self.n_embd)

    def float_twin(self) -> "GPTConfig | None":
        """The same model with float weights and activations; None = it has them already."""
        return self.replace(ternary=False) if self.ternary else None


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the past."""

    matrices_of: ClassVar[Mapping[str, int]] = {"c_attn": 3}  # q, k and v, for optimizers of matrices

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | Documents | None, kv_cache: KVCache | None) -> Tensor:
        q, k, v = rearrange(self.c_attn(x), "B T (qkv H D) -> qkv B H T D", qkv=3, H=self.n_head)
        if kv_cache is not None:
            k, v = kv_cache.update(self.layer, k, v)  # (B, H, S, D)
        y = causal_attention(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0)
        out: Tensor = self.resid_dropout(self.c_proj(rearrange(y, "B H T D -> B T (H D)")))
        return out  # (B, T, C)


class MLP(nn.Module):
    """C -> 4C -> GELU (or ReLU) -> C"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        approximate = "tanh" if config.activation_function == "gelu_new" else "none"
        self.act = nn.ReLU() if config.activation_function == "relu" else nn.GELU(approximate=approximate)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(self.act(self.c_fc(x))))
        return out  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.mlp_tiles = 1  # see LanguageModel.set_mlp_tiles

    def forward(self, x: Tensor, mask: Tensor | Documents | None, kv_cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, kv_cache)
        x = x + in_tiles(self.mlp, self.ln_2(x), self.mlp_tiles)
        return x  # (B, T, C)


class Transformer(nn.Module):
    """Embeddings, blocks and final norm: (B, T) ids -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)
        self.checkpointing: Checkpointing = "none"  # see LanguageModel.set_activation_checkpointing

    def forward(self, idx: Tensor, kv_cache: KVCache | None, documents: Documents | None) -> Tensor:
        T, device = idx.shape[1], idx.device
        mask: Tensor | Documents | None = documents
        if documents is not None:
            pos = documents.positions
        elif kv_cache is not None:
            pos, mask = kv_cache.positions(T, device), kv_cache.mask(T, device)
        else:
            pos = torch.arange(T, device=device)
        mode: Checkpointing = self.checkpointing if kv_cache is None else "none"  # a cache is written once
        x = self.drop(self.wte(idx) + self.wpe(pos))  # (B, T, C)
        for block in self.h:
            x = checkpointed(block, x, mask, kv_cache, mode=mode)
        if kv_cache is not None:
            kv_cache.advance(T)
        hidden: Tensor = self.ln_f(x)
        return hidden


class GPT(LanguageModel):
    """A GPT language model: `model(idx)` maps (B, T) token ids to (B, T, V) logits.

    >>> model = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32))
    >>> model(torch.zeros(1, 16, dtype=torch.long)).shape
    torch.Size([1, 16, 65])
    >>> model.num_params()  # 65*32 + 16*32 + 2*(12*32*32 + 13*32) + 2*32
    28064
    """

    config: GPTConfig
    embedding_name = "transformer.wte"
    final_norm_name = "transformer.ln_f"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.context_length = config.block_size
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._init_weights()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        if config.ternary:
            replace_linear_(self, BitLinear, act_quant=config.act_quant)

    def _init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02); what adds to the residual stream is scaled down by the 2L additions it makes, or zero."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith("c_proj")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                if residual and self.config.residual_init == "zero":
                    std = 0.0  # drawn all the same: the other weights do not depend on it
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, idx: Tensor, kv_cache: KVCache | None = None, *, positions: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm: (B, T) int64 -> (B, T, C). See `LanguageModel.features`."""
        documents = self._documents(idx, kv_cache, positions, "block_size")
        hidden: Tensor = self.transformer(idx, kv_cache, documents)
        return hidden

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of training on one token, forward and backward, in a sequence of `seq_len` tokens (None: block_size).

        A weight of a matrix costs 2 FLOPs forward (multiply, add) and 4 backward (gradients of input and of weight): 6 each,
        for L*12*C*C weights in the blocks and V*C in the output projection; embeddings are look-ups and cost none.
        Attention adds q.k and weights.v, each 2*T*C FLOPs per token and layer forward, so 12*L*T*C with the backward pass;
        the causal half that a kernel may skip is counted, as is customary.
        Source: Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022 (PaLM), appendix B.
        """
        c = self.config
        matrix_weights = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * matrix_weights + 12 * c.n_layer * (seq_len or c.block_size) * c.n_embd
