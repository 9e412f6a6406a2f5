"""How far a merged model is from the one that was trained, merged in either way."""

import os

import torch
from torch import Tensor

from llmforge.convert.load import find_adapter, open_model
from llmforge.convert.merge import MERGE_BASES, MergeBase
from llmforge.convert.published import assemble
from llmforge.errors import DataError
from llmforge.finetune import load_adapter_, read_adapter
from llmforge.models import LanguageModel

_LOGITS_BYTES = 1 << 30  # of the trained model, which are kept while the merged ones compute theirs


def merge_divergence(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    ids: Tensor,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[MergeBase, float]:
    """KL(trained || merged) in nats per token, of merges onto the original weights and onto those rounded to NF4.

    The trained model is the base as the training saw it, in NF4 where the adapter says so, and the adapter beside it in floats.

    Args:
        base, adapter, revision: as of `open_model`.
        ids: (T) int64, of text that was not trained on; cut into windows of the model's context. Of a large vocabulary only the
            first tokens are taken, whose logits fill a gigabyte.
    Raises:
        DataError: fewer than two ids.
    Memory: one model in float32 at a time.
    """
    if ids.numel() < 2:
        raise DataError(f"the text has {ids.numel()} tokens; 2 are needed to compare models, some hundred are better")
    published, _ = open_model(base, revision=revision)
    folder = find_adapter(adapter)
    rounding = read_adapter(folder).rounding
    model = assemble(published, device=device, quantize=None if rounding is None else rounding.nf4)
    load_adapter_(model, folder)
    ids = ids[: max(2, _LOGITS_BYTES // (4 * published.config.vocab_size))]
    trained = _log_probs(model.eval(), ids)
    del model
    divergences: dict[MergeBase, float] = {}
    for way in MERGE_BASES:
        published, _ = open_model(base, revision=revision, adapter=adapter, merge_base=way)
        merged = _log_probs(assemble(published, device=device), ids)
        divergences[way] = (trained.exp() * (trained - merged)).sum(-1).mean(dtype=torch.float64).item()
    return divergences


@torch.no_grad()
def _log_probs(model: LanguageModel, ids: Tensor) -> Tensor:
    """(T, V) float32 on the CPU."""
    device = next(model.parameters()).device
    windows = torch.split(ids, model.context_length)
    return torch.cat([model(window[None].to(device))[0].float().log_softmax(-1).cpu() for window in windows])
