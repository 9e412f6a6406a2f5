"""What quantization costs: bits and error of each type in a GGUF file, and what the file's model is worth on a text."""

import copy
import importlib.util
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llmforge.convert.load import load
from llmforge.convert.published import prepare, publish
from llmforge.deploy.verify import file_type_of, require_llama_cpp, run_llama_cpp, text_of
from llmforge.errors import ConvertError, DataError
from llmforge.formats.atomic import atomic_file
from llmforge.formats.gguf import GGUFHeader, read_gguf_header, read_gguf_tensors
from llmforge.quant.ggml import block_shape
from llmforge.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TypeQuality:
    """All tensors of one type."""

    type_name: str
    n_tensors: int
    n_weights: int
    bits_per_weight: float
    relative_error: float  # root of: squares of the errors over squares of the weights


@dataclass(frozen=True, kw_only=True)
class TextQuality:
    """A model on a text; nats per token."""

    perplexity: float
    kl_mean: float  # KL(float model || this), 0 for the float model itself
    kl_p99: float
    argmax_agreement: float  # fraction of positions where the most probable token is the float model's


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """`str(report)` is a table."""

    path: Path
    file_type: str
    bytes: int
    bits_per_weight: float  # of the tensors together
    types: list[TypeQuality]
    n_tokens: int  # that were compared
    float_model: TextQuality
    torch: TextQuality  # the file's weights, computed in float32
    llama_cpp: TextQuality | None  # the file in llama.cpp, which rounds what enters each matrix too

    def __str__(self) -> str:
        lines = [
            f"{self.path}  {self.file_type}, {self.bytes / 1e6:.1f} MB, {self.bits_per_weight:.2f} bits per weight",
            f"  {'type':8} {'tensors':>8} {'weights':>14} {'bits':>7} {'error':>9}",
        ]
        for found in self.types:
            lines.append(
                f"  {found.type_name:8} {found.n_tensors:8} {found.n_weights:14,} {found.bits_per_weight:7.3f} "
                f"{found.relative_error:9.2%}"
            )
        lines.append(
            f"  {'on ' + format(self.n_tokens, ',') + ' tokens':24} {'perplexity':>12} {'KL mean':>9} {'p99':>9} {'argmax':>8}"
        )
        rows = {"float model": self.float_model, "file in torch": self.torch, "file in llama.cpp": self.llama_cpp}
        for name, row in rows.items():
            if row is not None:
                lines.append(
                    f"  {name:24} {row.perplexity:12.4f} {row.kl_mean:9.2g} {row.kl_p99:9.2g} {row.argmax_agreement:8.2%}"
                )
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises:
            WriteError: the file cannot be written.
        """
        values = {**asdict(self), "path": self.path.name}
        with atomic_file(path) as tmp:
            tmp.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def quantization_report(
    path: str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    text: str | None = None,
    max_tokens: int = 4096,
    llama_cpp: bool | None = None,
    timeout_seconds: float = 600,
) -> QualityReport:
    """Compare a GGUF file with the float model that it was made from.

    Args:
        path: a file that `export_gguf` or `quantize_gguf` wrote.
        model: the float model, of a known family; it is not changed.
        text: to measure on, best one that the model was not trained on; None = a text that the model writes.
        max_tokens: of the text's beginning, in windows of the model's context.
        llama_cpp: also run the file in llama.cpp; None = where it is installed.
        timeout_seconds: for llama.cpp.
    Raises:
        CheckpointError: the file is damaged.
        ConvertError: the file is of another model; llama.cpp is asked for and missing, or cannot run the file.
        DataError: a text of fewer than two tokens, or with characters that the tokenizer does not know.
    """
    path = Path(path)
    header = read_gguf_header(path)
    if llama_cpp is None:
        llama_cpp = importlib.util.find_spec("llama_cpp") is not None
    if llama_cpp:
        require_llama_cpp()
    types = _types(path, header, model, tokenizer)
    files_model = load(path)[0]
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        model = copy.deepcopy(model).float().cpu()
    context = min(int(getattr(model, "context_length", max_tokens)), files_model.context_length, max_tokens)
    ids = torch.from_numpy(tokenizer.encode_array(text or text_of(model, tokenizer, context)).astype(np.int64))
    ids = ids[:max_tokens]
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; give one of at least two to measure on")
    windows = [window for window in torch.split(ids, context) if len(window) > 1]
    was_training = model.training
    model.eval()
    try:
        ours = [model(window[None])[0] for window in windows]
    finally:
        model.train(was_training)
    rounded = [files_model(window[None])[0] for window in windows]
    return QualityReport(
        path=path,
        file_type=file_type_of(header),
        bytes=path.stat().st_size,
        bits_per_weight=_bits(types),
        types=types,
        n_tokens=sum(len(window) for window in windows),
        float_model=_on_text(ours, ours, windows),
        torch=_on_text(ours, rounded, windows),
        llama_cpp=_on_text(ours, _in_llama_cpp(path, windows, context, timeout_seconds), windows)
        if llama_cpp
        else None,
    )


def _types(path: Path, header: GGUFHeader, model: nn.Module, tokenizer: Tokenizer) -> list[TypeQuality]:
    published = prepare(publish(model), tokenizer)
    _, tensors, _ = published.family.to_gguf(published.config, published.tensors)
    floats = {published.family.gguf_name(name): tensor for name, tensor in tensors.items()}
    values = read_gguf_tensors(path, header)
    found: dict[str, list[float]] = {}
    for info in header.tensors:
        if info.name not in floats or floats[info.name].shape != info.shape:
            raise ConvertError(
                f"{path} has a tensor {info.name} of shape {info.shape}, which the model has not; is it another's?"
            )
        exact = floats[info.name].read().float().cpu()
        difference = values[info.name].read().float() - exact
        total = found.setdefault(info.type_name, [0, 0, 0.0, 0.0])
        for i, more in enumerate([1, exact.numel(), _square_sum(exact), _square_sum(difference)]):
            total[i] += more
    qualities = []
    for name, (n_tensors, n_weights, squares, errors) in found.items():
        block, block_bytes = block_shape(name)
        qualities.append(
            TypeQuality(
                type_name=name,
                n_tensors=int(n_tensors),
                n_weights=int(n_weights),
                bits_per_weight=8 * block_bytes / block,
                relative_error=math.sqrt(errors / squares) if squares else 0.0,
            )
        )
    return sorted(qualities, key=lambda quality: -quality.n_weights)


def _square_sum(values: Tensor) -> float:
    return values.double().square().sum().item()


def _bits(types: list[TypeQuality]) -> float:
    return sum(t.bits_per_weight * t.n_weights for t in types) / sum(t.n_weights for t in types)


def _on_text(reference: list[Tensor], logits: list[Tensor], windows: list[Tensor]) -> TextQuality:
    kls, nlls, agree = [], [], []
    for exact, found, ids in zip(reference, logits, windows, strict=True):
        n = min(exact.shape[1], found.shape[1])  # a row for <|endoftext|> that the model has not
        exact, found = (some[:, :n].double().log_softmax(-1) for some in (exact, found))
        kls.append((exact.exp() * (exact - found)).sum(-1))
        nlls.append(-found[:-1].gather(1, ids[1:, None])[:, 0])
        agree.append(exact.argmax(-1) == found.argmax(-1))
    kl = torch.cat(kls)
    return TextQuality(
        perplexity=math.exp(min(torch.cat(nlls).mean().item(), 700.0)),
        kl_mean=max(0.0, kl.mean().item()),
        kl_p99=max(0.0, kl.quantile(0.99).item()),
        argmax_agreement=torch.cat(agree).double().mean().item(),
    )


def _in_llama_cpp(path: Path, windows: list[Tensor], context: int, timeout_seconds: float) -> list[Tensor]:
    ids = torch.cat(windows)
    with tempfile.TemporaryDirectory(prefix="llmforge-report-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        lengths = [len(window) for window in windows]
        request = {
            "gguf": str(path.resolve()),
            "n_ctx": context,
            "windows": lengths,
            "prompt_tokens": 1,
            "greedy_tokens": 0,
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (folder / "text.txt").write_bytes(b"")
        ids.numpy().astype(np.int32).tofile(folder / "ids.i32")
        run_llama_cpp(folder, path, timeout_seconds)
        n_vocab = json.loads((folder / "response.json").read_text(encoding="utf-8"))["n_vocab"]
        logits = np.fromfile(folder / "logits.f32", dtype=np.float32).reshape(len(ids), n_vocab)
        return list(torch.split(torch.from_numpy(logits), lengths))
