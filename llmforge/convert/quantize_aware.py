"""Quantization-aware training: the model learns with the very weights that its GGUF file will have."""

from collections.abc import Mapping

from torch import nn

from llmforge.convert.to_gguf import model_types
from llmforge.nn.rounded import round_weights_


def quantize_aware_(
    model: nn.Module, file_type: str, *, tensor_types: Mapping[str, str] | None = None
) -> dict[str, str]:
    """From now on compute with each matrix as `export_gguf` will write it, and train the float weights behind it.

    Call it before the `Trainer` is built, and before `resume`: the weights, their names and the checkpoints are those of the float
    model, so that a checkpoint does not say how it was trained. In the end `export_gguf` with the same arguments and without
    importance writes a file whose matrices are exactly those that the forward pass used. Another call replaces the types;
    `float_weights_`, or the file type "F32", takes them away.

    Args:
        model: of a known family, in float32, else the rounded matrices are rounded once more to the type of the weights.
        file_type, tensor_types: as of `export_gguf`; "F16" and "BF16" round too.
    Returns:
        the weights that are rounded, by the model's names, and their types. A shared one (tied embeddings) has its first name.
    Raises:
        ConvertError: an unknown family, file type or tensor type, or a model that `export_gguf` cannot express; nothing is changed.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 3, with llama.cpp's rounding in place of theirs.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) is a wrapper
    return round_weights_(model, model_types(model, file_type, tensor_types=tensor_types).types)
