"""The frozen base in four bits: which layers of a model are rounded to NF4, and how (QLoRA)."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch._subclasses import FakeTensor

from llmforge.config import Config
from llmforge.errors import ConfigError
from llmforge.nn.linear4bit import Linear4bit
from llmforge.nn.replace import exchange_modules_, matches
from llmforge.quant.nf4 import check_block_size


@dataclass(frozen=True, kw_only=True)
class NF4Config(Config):
    """How linear layers are rounded to NF4.

    Raises:
        ConfigError: a block size that NF4 does not have.
    """

    block_size: int = 64  # weights that share a scale
    double_quant: bool = True  # scales in 8 bits: 0.516 bytes per weight, else 0.5625
    skip: tuple[str, ...] = ("lm_head",)  # names that stay: the last part, the whole, or a pattern ("*.experts.*")

    def __post_init__(self) -> None:
        check_block_size(self.block_size)


def quantize_(model: nn.Module, config: NF4Config | None = None) -> list[str]:
    """Exchange the linear layers of a model for `Linear4bit` layers with the same matrices, rounded to NF4, and the same biases.

    Embeddings stay, and so do an output projection that shares the embedding's matrix, what `config.skip` names, and layers that are
    not exactly nn.Linear. The new layers are on the devices of the old ones; each old matrix is free when the next one is rounded.
    A model on "meta" or under FakeTensorMode gets layers without values.

    Returns:
        the names of the layers exchanged, in order.
    Raises:
        ConfigError: NaN or infinity among the weights, with the layer's name; or the model is an nn.Linear itself. Layers before
            it have been exchanged then.
    Source: Dettmers et al. 2023, arXiv:2305.14314.
    >>> model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantize_(model, NF4Config(skip=("2",)))
    ['0']
    """
    config = config or NF4Config()
    if type(model) is nn.Linear:
        raise ConfigError("quantize_ exchanges layers within a module, and this is an nn.Linear itself")
    layers = quantizable(model, config)
    names = list(layers)
    for name in names:
        exchange_modules_(model, {layers[name]: _rounded(name, layers.pop(name), config)})
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
    if linear.weight.is_meta or isinstance(linear.weight, FakeTensor):
        return empty_linear4bit(linear, config)
    try:
        return Linear4bit.from_weight(linear.weight, linear.bias, config).train(linear.training)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
