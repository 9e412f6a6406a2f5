"""A model as files hold it: its family, its config, and every tensor accounted for by name and shape, read when its turn comes."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.config import read_json_object
from llmforge.convert.base import Family, Tensors
from llmforge.convert.bitnet import FloatBitNet, HFBitNet, TernaryLlama
from llmforge.convert.bitsandbytes import lazy_nf4, nf4_of
from llmforge.convert.gpt2 import GPT2
from llmforge.convert.llama import HFArcee, HFLlama, HFMistral, HFQwen2, HFQwen3
from llmforge.errors import CheckpointError, ConfigError, ConvertError, some
from llmforge.finetune.quantize import NF4Config, embeddings, empty_linear4bit, in_8_bits, quantizable
from llmforge.formats.lazy import LazyTensor
from llmforge.models import LanguageModel
from llmforge.nn import Embedding8bit, Int8Matrix, Linear4bit, Linear8bit, PackedBitLinear
from llmforge.nn.lora import check_mergeable, lora_layers, saved_modules
from llmforge.nn.replace import exchange_modules_
from llmforge.quant.int8 import dequantize_int8_rows
from llmforge.tokenizers import Tokenizer

# The first that reads a file is taken: what asks for more than a name comes before what does not.
FAMILIES: list[Family] = [
    GPT2(),
    TernaryLlama(),
    FloatBitNet(),
    HFBitNet(),
    HFLlama(),
    HFMistral(),
    HFQwen2(),
    HFQwen3(),
    HFArcee(),
]


@dataclass(frozen=True)
class ExportReport:
    """What an exporter wrote."""

    path: Path
    bytes: int
    file_type: str  # "F16", "Q8_0" ... of a GGUF; "float32" ... of a Hugging Face folder
    tensors: Counter[str]  # how many tensors of each type
    notes: list[str]  # what differs from the model as it was trained, and why
    num_params: int  # of the model

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file or folder: tokenizer, embedding and all."""
        return 8 * self.bytes / self.num_params


@dataclass(frozen=True)
class Published:
    """A model in memory or on disk; its tensors are exactly those of its config."""

    family: Family
    config: Any
    tensors: Tensors
    notes: list[str] = field(default_factory=list)
    files: tuple[Path, ...] = ()  # that it is read from; none of a model in memory

    @property
    def num_params(self) -> int:
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def context_length(self) -> int:
        """Most tokens that one forward pass of the model can hold."""
        length: int = getattr(self.config, self.family.gguf_fields["context_length"][0])
        return length


def check_not_its_own(published: Published, path: Path) -> None:
    """Refuse to write over what the model is read from, be it a file or a folder.

    Raises:
        ConvertError: with the file.
    """
    target = path.resolve()
    own = next((file for file in published.files if target in (file.resolve(), file.parent.resolve())), None)
    if own is not None:
        raise ConvertError(
            f"{path} is where the model is read from ({own.name}), and would be lost; name another place"
        )


def inputs_of(published: Published, **options: object) -> dict[str, Any] | None:
    """What a file made of this model depends on, so that an export that was killed can go on; None for a model in memory.

    Args:
        options: of the export, as JSON can say them.
    """
    return inputs_of_files(published.files, notes=published.notes, **options) if published.files else None


def inputs_of_files(files: Sequence[Path], **options: object) -> dict[str, Any]:
    """The same of files: a file is known by its place, size and time of change; and the version of this package counts."""
    stats = [(str(file.absolute()), file.stat()) for file in files]
    known = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return {"version": version("llmforge"), "files": known, "options": options}


def family_of(config: Any) -> Family:
    """The family whose files can say all that this config says; where there is none, one of the same model, which only llmforge's own
    folders hold: exporters ask `check_expressed`.
    """
    families = [family for family in FAMILIES if type(config) is family.config_class]
    return next((family for family in families if family.expresses(config)), families[0])


def check_expressed(config: Any) -> None:
    """Refuse to write a model into files that cannot say what it computes.

    Raises:
        ConvertError: with the reason, and the way out where one setting is to blame.
    """
    families = [family for family in FAMILIES if type(config) is family.config_class]
    if any(family.expresses(config) for family in families):
        return
    known = ", ".join(family.hf_model_type for family in families)
    reason = next((reason for family in families if (reason := family.refusal(config))), None)
    if reason is not None:
        raise ConvertError(f"no model type that other programs know ({known}) has this model's settings: {reason}")
    raise ConvertError(f"no model type that other programs know ({known}) has all of these settings together: {config}")


def account(family: Family, config: Any, tensors: Tensors, misfit: Exception) -> Published:
    """A model of exactly these tensors.

    Args:
        misfit: of the kind to raise, with the beginning of the message.
    Raises:
        CheckpointError or ConvertError: as `misfit`; a tensor is missing, left over, or of another shape, all named; or not of
            floats.
    """
    n_layers, largest = getattr(config, family.layers_field), max((t.numel for t in tensors.values()), default=0)
    if n_layers > len(tensors):
        raise type(misfit)(f"{misfit}: it has {len(tensors)} tensors, too few for {n_layers} layers")
    if (width := getattr(config, "head_width", 0)) > largest:  # before memory for that many frequencies is taken
        raise type(misfit)(f"{misfit}: head_dim ({width}) is more than its largest tensor has")
    # All layers are alike, and one is built: a small file can announce many.
    blueprint = _blueprint(family, config.replace(**{family.layers_field: 1}), misfit)
    tensors = dict(tensors)
    for first, *others in shared_names(blueprint):
        for name in others:
            if name in tensors and first not in tensors:  # saved under the other name
                tensors[first] = tensors.pop(name)
            elif name in tensors and not _same(tensors.pop(name), tensors[first]):
                raise type(misfit)(
                    f"{misfit}: {name} differs from {first}, but the config ties them (tie_word_embeddings)"
                )
    expected = _of_all_layers(blueprint, n_layers)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} is {found[name]}, must be {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(differences.values()):
        parts = [f"{what}: {some(names)}" for what, names in differences.items() if names]
        raise type(misfit)(f"{misfit}; {'; '.join(parts)}")
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise type(misfit)(f"{misfit}: {name} is {tensor.dtype}, not floats; quantized models cannot be read")
    return Published(family, config, {name: tensors[name] for name in expected})


def publish(model: nn.Module) -> Published:
    """Account for every tensor of a model, which stays as it is.

    Matrices in NF4, or in 8 bits, become the floats that they stand for, and active adapters are merged into the weights beside them.

    Raises:
        ConvertError: an unknown kind of model, a packed one, or a tensor too many or too few.
        ConfigError: an adapter that cannot be merged, beside a BitLinear.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) is a wrapper
    if any(isinstance(module, PackedBitLinear) for module in model.modules()):
        raise ConvertError(
            "the model is packed for inference (pack_) and has no weights to export; load it again to export it"
        )
    if all(type(model) is not family.model_class for family in FAMILIES):
        known = ", ".join(sorted({family.model_class.__name__ for family in FAMILIES}))
        raise ConvertError(
            f"{type(model).__name__} is no model that other programs know ({known}); if it computes the same as one of them, "
            "load its state_dict() into that one and export it"
        )
    family = family_of(model.config)
    tensors, notes = _decoded(model, {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()})
    config, tensors, merged = _merged(family, model, tensors)
    misfit = ConvertError(f"the model is not a plain {family.model_class.__name__} of its config")
    return replace(account(family, config, tensors, misfit), notes=notes + merged)


def _merged(family: Family, model: Any, tensors: Tensors) -> tuple[Any, Tensors, list[str]]:
    """Config and tensors with the active adapters in the weights, under the names that they have without, and what to say about it.

    Args:
        tensors: of the state_dict.
    """
    config: Any = model.config
    layers, modules = lora_layers(model), saved_modules(model)
    if not layers and not modules:
        return config, tensors, []
    floats = next(t.dtype for t in tensors.values() if len(t.shape) > 1 and t.dtype.is_floating_point)
    plain = dict(tensors)
    for name in (*layers, *modules):
        for key in [key for key in plain if key.startswith(f"{name}.")]:
            del plain[key]
    for name, layer in layers.items():
        check_mergeable(layer.base)
        weight = getattr(layer.base, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) else floats  # of 4 bits: the one of its input
        shape = (layer.out_features, layer.in_features)
        plain[f"{name}.weight"] = LazyTensor(shape, dtype, partial(layer.merged_weight, dtype))
        if layer.bias is not None:
            plain[f"{name}.bias"] = LazyTensor.of(layer.bias)
    for name, module in modules.items():
        copy = module.base if module.active is None else module.copies[module.active]
        for parameter, values in module.base.named_parameters():
            in_base = partial(Tensor.to, dtype=values.dtype)
            plain[f"{name}.{parameter}"] = LazyTensor.of(copy.get_parameter(parameter)).then(in_base, by_row=True)
    changed = {f"{name}.weight" for name in (*layers, *modules)}
    if getattr(config, "tie_word_embeddings", False):
        tied = [
            names
            for names in shared_names(family.blueprint(config.replace(**{family.layers_field: 1})))
            if len(names) > 1
        ]
        if any(changed.intersection(names) for names in tied):  # which are two matrices now
            config = config.replace(tie_word_embeddings=False)
    active = {name for layer in layers.values() for name in layer.active}
    active |= {module.active for module in modules.values() if module.active is not None}
    what = f"the adapter {' and '.join(sorted(active))} is" if active else "no adapter is"
    return config, plain, [f"{what} merged into the weights of {len(layers) + len(modules)} modules"]


def prepare(published: Published, tokenizer: Tokenizer | None) -> Published:
    """The model with all that its family's files must have, its vocabulary fitted to the tokenizer's, its values checked when read.

    Raises:
        ConvertError: settings that no such file can say; a tokenizer of another vocabulary; when a tensor is read: NaN or infinity.
    """
    family, notes = published.family, list(published.notes)
    check_expressed(published.config)
    tensors = {name: tensor.then(_finite(name), by_row=True) for name, tensor in published.tensors.items()}
    config, tensors = family.complete(published.config, tensors)
    if tokenizer is not None:
        config, tensors = _fit_vocabulary(family, config, tensors, tokenizer, notes)
    return replace(published, config=config, tensors=tensors, notes=notes)


def assemble(
    published: Published,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: NF4Config | None = None,
) -> LanguageModel:
    """Build the model, some rows at a time: host memory beside a model on another device is that of some rows, or of the largest
    tensor that is not stored by rows.

    Args:
        quantize: make the layers of 4 and of 8 bits that `quantize_` would, from the values in the file, whatever `dtype` is.
    Raises:
        CheckpointError: no such model can be, or a matrix to be quantized holds NaN or infinity.
    """
    misfit, device = CheckpointError("the model cannot be built"), torch.device(device)
    model = _blueprint(published.family, published.config, misfit)
    if quantize is not None:
        layers, tables = quantizable(model, quantize), embeddings(model, quantize)
        new: dict[nn.Module, nn.Module] = {
            layer: _linear4bit(f"{name}.weight", published, layer, quantize, device) for name, layer in layers.items()
        }
        for tied in tables:
            matrix = _int8_matrix(published.tensors, [f"{name}.weight" for name in tied], device)
            new |= {module: in_8_bits(module, matrix, dtype) for module in tied.values()}
        exchange_modules_(model, new)
    for names in shared_names(model):
        parameter = nn.Parameter(_values(published.tensors[names[0]], dtype, device))
        for name in names:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
    return model.eval()


def _values(tensor: LazyTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on a device, in memory of its own."""
    # To the device in the type of the file, and only there to the type asked for.
    if tensor.read_rows is None or device.type == "meta":
        values = tensor.read().to(device)  # on the CPU maybe a mapped file
        return values.to(dtype, copy=values.device.type == "cpu", memory_format=torch.contiguous_format)
    values, start = torch.empty(tensor.shape, dtype=dtype, device=device), 0
    rows = values.view(-1, tensor.row_length)
    for block in tensor.blocks():
        rows[start : start + len(block)].copy_(block.to(device))
        start += len(block)
    return values


def _linear4bit(
    name: str, published: Published, linear: nn.Linear, config: NF4Config, device: torch.device
) -> Linear4bit:
    """The layer in NF4 for one on "meta", whose bias it takes; the matrix is rounded on the device, some rows at a time."""
    if device.type == "meta":
        return empty_linear4bit(linear, config)
    try:
        return Linear4bit.from_nf4(nf4_of(published.tensors[name], config, device=device), linear.bias)
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _int8_matrix(tensors: Tensors, names: list[str], device: torch.device) -> Int8Matrix:
    """The matrix of one of these names in 8 bits; rounded on the device, some rows at a time."""
    name = next(name for name in names if name in tensors)
    rows, columns = tensors[name].shape
    matrix, start = Int8Matrix(rows, columns, device=device), 0
    if device.type == "meta":
        return matrix
    try:
        for block in tensors[name].blocks():
            matrix.set_rows(start, block)
            start += len(block)
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return matrix


def _decoded(model: nn.Module, tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The tensors of a state_dict with a matrix in the place of each layer's codes and scales, and what to say about it."""
    kinds = (Linear4bit, Embedding8bit, Linear8bit)
    layers: dict[str, Any] = {
        name: layer for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, kinds)
    }
    if not layers:
        return tensors, []
    # The type of the embedding: the layers compute in the one of their input.
    dtype = next((layer.dtype for layer in layers.values() if isinstance(layer, Embedding8bit)), None)
    if dtype is None:
        dtype = next(t.dtype for t in tensors.values() if len(t.shape) > 1 and t.dtype.is_floating_point)
    owners = {f"{name}.{buffer}": name for name, layer in layers.items() for buffer, _ in layer.named_buffers()}
    plain: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():  # in their order: the first matrix says which type others have
        if key not in owners:
            plain[key] = tensor
        elif (name := f"{owners[key]}.weight") not in plain:
            layer = layers[owners[key]]
            plain[name] = lazy_nf4(layer.nf4(), dtype) if isinstance(layer, Linear4bit) else _lazy_int8(layer, dtype)
    notes = []
    if in_4 := sum(isinstance(layer, Linear4bit) for layer in layers.values()):
        notes.append(
            f"the matrices of {in_4} linear layers were rounded to NF4 (4 bits) in memory, and are written as computed with"
        )
    if in_8 := [name for name, layer in layers.items() if not isinstance(layer, Linear4bit)]:
        names = " and ".join(name.removesuffix(".base") for name in in_8)
        notes.append(f"in memory, {names} had 8 bits, and what is written is what was computed with")
    return plain, notes


def _lazy_int8(layer: Embedding8bit | Linear8bit, dtype: torch.dtype) -> LazyTensor:
    """A matrix of 8 bits as one that is decoded when it is read."""
    codes, scales = layer.matrix.codes, layer.matrix.scales

    def read_rows(start: int, stop: int) -> Tensor:
        return dequantize_int8_rows(codes[start:stop], scales[start:stop], dtype=dtype)

    return LazyTensor(tuple(codes.shape), dtype, partial(layer.dequantize, dtype), read_rows)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        return read_json_object(folder / "config.json")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _blueprint(family: Family, config: Any, misfit: Exception) -> LanguageModel:
    """The family's blueprint, or the reason why there is none as `misfit`."""
    try:
        return family.blueprint(config)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise type(misfit)(f"{misfit}: it has sizes that no model can have ({str(error)[:100]}): {config}") from error


def _of_all_layers(blueprint: LanguageModel, n_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model that has `n_layers` times the layer of the blueprint, in the order of its parameters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in blueprint.named_parameters()}
    layer = {name: shape for name, shape in shapes.items() if ".0." in name}
    expected = {}
    for name, shape in shapes.items():
        if name not in layer:
            expected[name] = shape
        elif name == next(iter(layer)):
            for i in range(n_layers):
                expected |= {name.replace(".0.", f".{i}."): shape for name, shape in layer.items()}
    return expected


def _finite(name: str) -> Callable[[Tensor], Tensor]:
    def check(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta" and tensor.numel():
            low, high = tensor.aminmax()  # NaN if one value is; many times faster than isfinite
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                raise ConvertError(f"{name} holds NaN or infinity: the training diverged; export an earlier checkpoint")
        return tensor

    return check


def _same(left: LazyTensor, right: LazyTensor) -> bool:
    """Equal to the bit: NaN is no difference here, and has an error of its own."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    pairs = zip(left.blocks(), right.blocks(), strict=True)
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)


def shared_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; more than one where it is shared."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return list(names.values())


def _fit_vocabulary(
    family: Family, config: Any, tensors: Tensors, tokenizer: Tokenizer, notes: list[str]
) -> tuple[Any, Tensors]:
    rows, tokens = config.vocab_size, tokenizer.vocab_size
    if tokens == rows + 1 and tokenizer.eos_token_id == rows:
        notes.append(
            f"a row for <|endoftext|> (id {rows}) added, which the model never chooses: it was trained without"
        )
        return family.append_eos_row(config, tensors)
    # Embeddings are often padded to a multiple of 64 or 128 (nanoGPT: 50,304 rows for 50,257 tokens); more is another tokenizer.
    if not 0 <= rows - tokens < max(128, tokens // 50):
        raise ConvertError(
            f"the model has {rows:,} tokens and the tokenizer {tokens:,}; take the tokenizer that the model was trained with"
        )
    if rows > tokens:
        notes.append(f"{rows - tokens} of the model's {rows:,} rows stand for no token of the tokenizer")
    return config, tensors
