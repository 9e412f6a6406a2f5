"""The checkpoint of nanoGPT's train.py."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from llmforge.convert.published import Published, account, family_of
from llmforge.errors import CheckpointError, ConfigError, ConvertError
from llmforge.formats.lazy import LazyTensor
from llmforge.models import GPTConfig

_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")  # of nanoGPT's train.py
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.bias")  # the causal mask, where it does not use flash attention


def read_nanogpt(path: Path, args: dict[Any, Any], state: dict[str, Tensor]) -> Published:
    """The model of `model_args` and the tensors of `model`; its GELU is the erf form.

    Raises:
        CheckpointError: tensors that do not fit the model_args.
        ConvertError: model_args that nanoGPT's train.py does not write.
    """
    unknown = [str(key) for key in args if key not in _MODEL_ARGS]
    if unknown:
        raise ConvertError(f"{path} has model_args that nanoGPT's GPT does not: {', '.join(unknown)}")
    try:
        config = GPTConfig.from_dict({**args, "activation_function": "gelu"})
    except ConfigError as error:
        raise ConvertError(f"{path} describes a model that cannot be built: {error}") from error
    tensors = {name: LazyTensor.of(tensor) for name, tensor in state.items() if not _MASK_BUFFER.fullmatch(name)}
    return account(family_of(config), config, tensors, CheckpointError(f"{path} does not fit its model_args"))
