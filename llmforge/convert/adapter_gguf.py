"""An adapter alone as a GGUF file, which llama.cpp and Ollama apply to the GGUF of its base when they load it.

Beside each matrix of the base that it changes, <tensor>.lora_a (r, in) and <tensor>.lora_b (out, r); what llama.cpp adds is
adapter.lora.alpha / r * B A. One alpha serves all layers, so where scales differ they go into B.

Source: llama.cpp's src/llama-adapter.cpp and convert_lora_to_gguf.py (what is expected; the code is our own).
"""

import os
from collections import Counter
from pathlib import Path

from torch import Tensor, nn

from llmforge.convert.base import Family, Tensors
from llmforge.convert.llama import reordered, to_neighbours
from llmforge.convert.load import source
from llmforge.convert.published import ExportReport, Published, check_not_its_own
from llmforge.errors import ConvertError, some
from llmforge.finetune.adapter_files import LoRATensors, read_adapter
from llmforge.formats.gguf import GGUFTensor, write_gguf
from llmforge.formats.lazy import LazyTensor

ADAPTER_FILE_TYPES = ("F32", "F16", "BF16")


def export_adapter_gguf(
    adapter_folder: str | os.PathLike[str],
    base: nn.Module | Published | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    file_type: str = "F16",
) -> ExportReport:
    """Write a GGUF LoRA: `llama-cli -m base.gguf --lora adapter.gguf`, or ADAPTER in a Modelfile of Ollama.

    Args:
        adapter_folder: of PEFT or `save_adapter`.
        base: the model that it was trained on, in memory or what `load` accepts; only its names and shapes are read.
        file_type: "F32", "F16" or "BF16". The base's GGUF can be of any type.
    Returns:
        what was written; `num_params` are those of the adapter.
    Raises:
        CheckpointError: the adapter is damaged, or incomplete.
        ConvertError: it does not fit the base, or llama.cpp could not apply it: DoRA, whole modules (modules_to_save), an output
            projection that is tied to the embedding. `llmforge merge` writes all of these into the base.
        WriteError: the file cannot be written.
    """
    path = Path(path)
    if file_type not in ADAPTER_FILE_TYPES:
        raise ConvertError(f"file_type ({file_type!r}) of an adapter must be one of {', '.join(ADAPTER_FILE_TYPES)}")
    adapter = read_adapter(adapter_folder)
    if adapter.config.use_dora:
        raise ConvertError(
            f"{adapter_folder} is a DoRA, which scales the base's own rows, and llama.cpp only adds B A; merge it into the base instead"
        )
    if adapter.saved:
        raise ConvertError(
            f"{adapter_folder} holds whole tensors ({some(list(adapter.saved))}), and llama.cpp only adds B A; merge it into the base "
            "instead"
        )
    published, _ = source(base, None)
    check_not_its_own(published, path)
    family, config = published.family, published.config
    alpha = Counter(layer.scale * layer.A.shape[0] for layer in adapter.layers.values()).most_common(1)[0][0]
    below: Tensors = {}  # A, under the base's names
    beside: Tensors = {}  # B
    for name, layer in adapter.layers.items():
        own_name = _own_name(published, name, layer)
        below[own_name] = layer.A
        beside[own_name] = _folded(layer, alpha)
    if family.gguf_arch == "llama":  # where rows of q and k stand in another order, and B has the rows
        beside = reordered(config, beside, to_neighbours)
    tensors = []
    for own_name in below:
        gguf_name = family.gguf_name(own_name)
        tensors.append(GGUFTensor(f"{gguf_name}.lora_a", file_type, below[own_name]))
        tensors.append(GGUFTensor(f"{gguf_name}.lora_b", file_type, beside[own_name]))
    metadata = {
        "general.type": "adapter",
        "general.name": path.stem,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    write_gguf(path, family.gguf_arch, metadata, tensors)
    types = Counter({file_type: len(tensors)})
    n_params = sum(tensor.tensor.numel for tensor in tensors)
    return ExportReport(path, path.stat().st_size, file_type, types, _notes(family), n_params)


def _own_name(published: Published, name: str, layer: LoRATensors) -> str:
    """The base's name of the matrix that a layer's adapter changes."""
    own_name = published.family.own_name(f"{name}.weight")
    tensor = published.tensors.get(own_name or "")
    if own_name is None or tensor is None:
        if own_name == "lm_head.weight" and getattr(published.config, "tie_word_embeddings", False):
            raise ConvertError(
                "the adapter changes lm_head, which in this model is the embedding as well: llama.cpp has no tensor for it; merge the "
                "adapter into the base instead"
            )
        raise ConvertError(
            f"the adapter has tensors for {name!r}, and the base no such layer; give the base that it was trained on"
        )
    shape = (layer.B.shape[0], layer.A.shape[1])
    if shape != tensor.shape:
        raise ConvertError(
            f"the adapter's {name} is {shape} (out, in), the base's {tensor.shape}; give the base that it was trained on"
        )
    return own_name


def _folded(layer: LoRATensors, alpha: float) -> LazyTensor:
    """B, so that alpha / r * B A is the layer's scale times what it was."""
    factor = layer.scale * layer.A.shape[0] / alpha

    def fold(B: Tensor) -> Tensor:
        return B * factor

    return layer.B if factor == 1 else layer.B.then(fold, by_row=True)


def _notes(family: Family) -> list[str]:
    return [f"to be applied to a GGUF of the same base ({family.gguf_arch}), of any type"]
