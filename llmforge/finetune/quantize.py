"""The frozen base in four bits: which layers of a model are rounded to NF4, and how (QLoRA); and its largest matrices in eight."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from llmforge.config import Config
from llmforge.errors import ConfigError
from llmforge.nn.int8 import Embedding8bit, Int8Matrix, Linear8bit
from llmforge.nn.linear4bit import Linear4bit
from llmforge.nn.replace import exchange_modules_, matches
from llmforge.quant.nf4 import check_block_size


@dataclass(frozen=True, kw_only=True)
class NF4Config(Config):
    """How linear layers are rounded to NF4, and what becomes of the token embedding and the output projection.

    Raises:
        ConfigError: a block size that NF4 does not have, or other bits for embeddings than 8 and 16.
    """

    block_size: int = 64  # weights that share a scale
    double_quant: bool = True  # scales in 8 bits: 0.516 bytes per weight, else 0.5625
    skip: tuple[str, ...] = ("lm_head",)  # names that stay: the last part, the whole, or a pattern ("*.experts.*")
    # Token embedding and output projection (`lm_head`, unless `skip` leaves it to NF4): 8 = integers, a scale per row; 16 = as they are.
    embedding_bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if self.embedding_bits not in (8, 16):
            raise ConfigError(
                f"embedding_bits ({self.embedding_bits}) must be 8, or 16, which leaves embedding and output projection as they are"
            )


def quantize_(model: nn.Module, config: NF4Config | None = None) -> list[str]:
    """Exchange the linear layers of a model for `Linear4bit` layers with the same matrices, rounded to NF4, and the same biases.

    Embeddings stay, and so do an output projection that shares the embedding's matrix, what `config.skip` names, and layers that are
    not exactly nn.Linear. With `embedding_bits=8` the token embedding becomes an `Embedding8bit` and an output projection that stays a
    `Linear8bit`, with one matrix where they are tied. The new layers are on the devices of the old ones; each old matrix is free when
    the next one is rounded. A model on "meta" or under FakeTensorMode gets layers without values.

    Returns:
        the names of the layers exchanged, in order.
    Raises:
        ConfigError: NaN or infinity among the weights, with the layer's name; or the model is an nn.Linear itself. Layers before
            it have been exchanged then. With embedding_bits=8: the model does not say which its token embedding is, or that is no
            plain nn.Embedding; nothing is changed then.
    Source: Dettmers et al. 2023, arXiv:2305.14314.
    >>> model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantize_(model, NF4Config(skip=("2",)))
    ['0']
    """
    config = config or NF4Config()
    if type(model) is nn.Linear:
        raise ConfigError("quantize_ exchanges layers within a module, and this is an nn.Linear itself")
    layers = quantizable(model, config)
    tables = embeddings(model, config)
    wanted = {*layers, *(name for tied in tables for name in tied)}
    names = [name for name, _ in model.named_modules() if name in wanted]
    for name in list(layers):
        exchange_modules_(model, {layers[name]: _rounded(name, layers.pop(name), config)})
    while tables:
        _exchange_tied_(model, tables.pop())
    return names


def quantizable(model: nn.Module, config: NF4Config) -> dict[str, nn.Linear]:
    """The layers that `quantize_` exchanges, by name, in order."""
    users: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[parameter] = users.get(parameter, 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and users[module.weight] == 1 and not matches(name, config.skip)
    }


def embeddings(model: nn.Module, config: NF4Config) -> list[dict[str, nn.Module]]:
    """The nn.Embedding and the nn.Linear that `quantize_` exchanges for layers of 8 bits, by name; tied ones, of one weight, together.

    Raises:
        ConfigError: see `quantize_`.
    """
    if config.embedding_bits == 16:
        return []
    name: Any = getattr(model, "embedding_name", None)
    if name is None:
        raise ConfigError(
            f"{type(model).__name__} does not say which its token embedding is, so it cannot be kept in 8 bits; set embedding_name to its "
            "path, or embedding_bits to 16"
        )
    embedding = model.get_submodule(name)
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise ConfigError(
            f"{name} is a {type(embedding).__name__}, and only a plain nn.Embedding can be kept in 8 bits: quantize_ comes before adapters "
            "and before offload_embedding_"
        )
    head = getattr(model, "lm_head", None)
    if type(head) is not nn.Linear or "lm_head" in quantizable(model, config):
        return [{name: embedding}]
    if head.weight is embedding.weight:
        return [{name: embedding, "lm_head": head}]
    return [{name: embedding}, {"lm_head": head}]


def in_8_bits(module: nn.Module, matrix: Int8Matrix, dtype: torch.dtype) -> Embedding8bit | Linear8bit:
    """The layer of 8 bits in the place of an nn.Embedding, whose rows are of this dtype, or of an nn.Linear, whose bias it takes."""
    new = Linear8bit(matrix, module.bias) if isinstance(module, nn.Linear) else Embedding8bit(matrix, dtype)
    return new.train(module.training)


def empty_linear4bit(linear: nn.Linear, config: NF4Config) -> Linear4bit:
    """A `Linear4bit` for the place of a linear layer, on its device, with its bias and without values."""
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        block_size=config.block_size,
        double_quant=config.double_quant,
        device=linear.weight.device,
    )
    layer.bias = linear.bias
    return layer.train(linear.training)


def _rounded(name: str, linear: nn.Linear, config: NF4Config) -> Linear4bit:
    if _has_no_values(linear.weight):
        return empty_linear4bit(linear, config)
    try:
        return Linear4bit.from_weight(linear.weight, linear.bias, config).train(linear.training)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _exchange_tied_(model: nn.Module, tied: dict[str, nn.Module]) -> None:
    weight: Any = next(iter(tied.values())).weight
    try:
        empty = _has_no_values(weight)
        matrix = Int8Matrix(*weight.shape, device=weight.device) if empty else Int8Matrix.from_weight(weight)
    except ConfigError as error:
        raise ConfigError(f"{next(iter(tied))}: {error}") from error
    exchange_modules_(model, {module: in_8_bits(module, matrix, weight.dtype) for module in tied.values()})


def _has_no_values(weight: Tensor) -> bool:
    return weight.is_meta or isinstance(weight, FakeTensor)
