"""Does llama.cpp compute from a GGUF file what the model computes? The same ids, the same probabilities, the same text."""

import copy
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmforge.convert.load import load
from llmforge.convert.mixture import FILE_TYPES
from llmforge.errors import ConvertError, DataError
from llmforge.formats.gguf import GGUFHeader, read_gguf_header
from llmforge.generation import generate
from llmforge.tokenizers import Tokenizer

# Largest mean KL divergence (nats per token) that rounding explains, about ten times what trained models have. A mistake in a file
# (a transposed matrix, a permuted row, another tokenizer) gives 0.01 and more. Types with fewer bits change the model itself; a
# file of them is compared with its own weights, and Q8_0's limit is for llama.cpp's rounding of what enters its matrices.
KL_LIMITS = {"F32": 2e-6, "F16": 1e-5, "BF16": 5e-4, "Q8_0": 2e-3}


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was compared; `str(report)` says it in words."""

    path: Path
    file_type: str
    n_text_tokens: int
    ids_equal: bool  # llama.cpp's ids of the text are the tokenizer's
    pieces_equal: bool  # its bytes of those ids, one by one, are the tokenizer's: what programs show
    detokenize_equal: bool  # and all at once; some pre-tokenizers tidy the spaces before punctuation there
    n_logit_tokens: int  # positions compared below
    kl_mean: float  # nats, KL(model || file)
    kl_max: float
    logit_diff_max: float  # largest difference of a log-probability among the model's ten most probable tokens
    argmax_agreement: float  # fraction of positions
    perplexity_model: float  # on the text's compared positions
    perplexity_file: float
    greedy_tokens: int  # length of the most probable continuation
    greedy_equal: int  # how many of its tokens are equal before the first difference
    greedy_gap: float  # by how much the model prefers its own token there, as a log-probability; 0 = no difference
    kl_of_rounding: float | None = (
        None  # nats, KL(model || the file's weights in torch), where these are what is compared above
    )

    @property
    def kl_limit(self) -> float:
        """Largest `kl_mean` for this file type."""
        return KL_LIMITS.get(self.file_type, max(KL_LIMITS.values()))

    @property
    def greedy_is_near_tie(self) -> bool:
        """The texts part where the model itself hardly prefers one token: rounding decides there."""
        return self.greedy_equal < self.greedy_tokens and self.greedy_gap <= 2 * self.logit_diff_max

    @property
    def passed(self) -> bool:
        """The file computes what the model computes, up to the rounding of its type."""
        same_text = self.greedy_equal == self.greedy_tokens or self.greedy_is_near_tie
        return self.ids_equal and self.pieces_equal and self.kl_mean <= self.kl_limit and same_text

    def __str__(self) -> str:
        def word(good: bool) -> str:
            return "equal" if good else "DIFFERENT"

        kl = f"{self.kl_mean:.1e} mean, {self.kl_max:.1e} max (limit {self.kl_limit:.0e} mean)"
        greedy = f"{self.greedy_equal} of {self.greedy_tokens} tokens equal"
        if self.greedy_is_near_tie:
            greedy += f", then a near-tie (log-probabilities {self.greedy_gap:.1e} apart)"
        what, rounding = "the model", []
        if self.kl_of_rounding is not None:
            what = "its own weights"
            rounding = [
                f"  rounding     KL {self.kl_of_rounding:.1e} mean, between the model and the file's weights in torch"
            ]
        spaces = "" if self.detokenize_equal else "; llama_detokenize tidies spaces with this pre-tokenizer"
        return "\n".join(
            [
                f"{self.path} ({self.file_type}) in llama.cpp: {'same as ' if self.passed else 'NOT the same as '}{what}",
                f"  token ids    {word(self.ids_equal)}, {self.n_text_tokens:,} tokens",
                f"  text         {word(self.pieces_equal)}{spaces}",
                f"  KL           {kl}, {self.n_logit_tokens:,} positions",
                f"  argmax       {self.argmax_agreement:.2%} equal",
                f"  perplexity   {self.perplexity_model:.4f} model, {self.perplexity_file:.4f} file",
                f"  greedy text  {greedy}",
                *rounding,
            ]
        )


def verify_gguf(
    path: str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    text: str | None = None,
    max_tokens: int = 1024,
    greedy_tokens: int = 64,
    timeout_seconds: float = 600,
) -> VerifyReport:
    """Run a GGUF file in llama.cpp, in a process of its own, and compare it with the model that it was made from.

    Args:
        model: maps (B, T) ids to (B, T, V) logits and has a `context_length`; compared in float32.
        text: what to compare on; None = a text that the model writes. The ids of all of it are compared.
        max_tokens: logits are compared on the first so many tokens, in windows of the model's context.
        greedy_tokens: length of the most probable continuation to compare, as far as the context allows.
        timeout_seconds: for llama.cpp.
    Raises:
        ConvertError: llama-cpp-python is missing, or llama.cpp refuses the file, crashes or does not finish; with its message.
        CheckpointError: the file is damaged.
        DataError: a text of fewer than two tokens, or with characters that the tokenizer does not know.
    """
    require_llama_cpp()
    path = Path(path)
    header = read_gguf_header(path)
    context: int = getattr(model, "context_length", _context_of(header.metadata))
    if context > _context_of(header.metadata):  # llama.cpp aborts at a position beyond its context
        raise ConvertError(
            f"the file has a context of {_context_of(header.metadata)} tokens, the model of {context}; was it made from this model?"
        )
    # No more of a long context than is compared: llama.cpp would reserve gigabytes for it.
    context = min(context, max(max_tokens, 2 * greedy_tokens))
    if next(model.parameters()).dtype != torch.float32:
        model = copy.deepcopy(model).float()
    if text is None:
        text = text_of(model, tokenizer, min(context, max_tokens))
    ids = tokenizer.encode_array(text).astype(np.int32)
    if len(ids) < 2:
        raise DataError(f"the text {text[:20]!r} has {len(ids)} tokens; give one of at least two to compare on")
    compared = torch.from_numpy(ids[:max_tokens].astype(np.int64))
    windows = [min(context, len(compared) - start) for start in range(0, len(compared), context)]
    prompt_tokens = max(1, min(windows[0], context // 4, context - greedy_tokens))
    greedy_tokens = min(greedy_tokens, context - prompt_tokens)

    with tempfile.TemporaryDirectory(prefix="llmforge-verify-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        request = {
            "gguf": str(path.resolve()),
            "n_ctx": context,
            "windows": windows,
            "prompt_tokens": prompt_tokens,
            "greedy_tokens": greedy_tokens,
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (folder / "text.txt").write_bytes(text.encode())
        ids[:max_tokens].tofile(folder / "ids.i32")
        run_llama_cpp(folder, path, timeout_seconds)
        n_vocab = json.loads((folder / "response.json").read_text(encoding="utf-8"))["n_vocab"]
        logits = np.memmap(folder / "logits.f32", dtype=np.float32, mode="r", shape=(len(compared), n_vocab))
        theirs = np.fromfile(folder / "greedy.i32", dtype=np.int32).tolist()
        file_type = file_type_of(header)
        was_training, own_weights, kl_of_rounding = model.training, model, None
        model.eval()  # no dropout
        try:
            if file_type not in KL_LIMITS:
                own_weights = load(path)[0].to(next(model.parameters()).device)
                kl_of_rounding = kl_divergence(model, own_weights, compared, windows)
            statistics = _compare_logits(own_weights, compared, windows, logits)
            equal, gap = _compare_greedy(own_weights, compared[:prompt_tokens], theirs)
        finally:
            model.train(was_training)
        return VerifyReport(
            path=path,
            file_type=file_type,
            kl_of_rounding=kl_of_rounding,
            n_text_tokens=len(ids),
            ids_equal=np.array_equal(np.fromfile(folder / "tokens.i32", dtype=np.int32), ids),
            pieces_equal=(folder / "pieces.bin").read_bytes() == tokenizer.decode_bytes(ids.tolist()),
            detokenize_equal=(folder / "detokenized.bin").read_bytes() == text.encode(),
            n_logit_tokens=len(compared),
            greedy_tokens=greedy_tokens,
            greedy_equal=equal,
            greedy_gap=gap,
            **statistics,
        )


def require_llama_cpp() -> None:
    """Stop before the work begins that needs it.

    Raises:
        ConvertError: llama-cpp-python is not installed.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConvertError(
            'llama.cpp is not installed: pip install "llmforge[verify]" (it is compiled; needs a C++ compiler)'
        )


def file_type_of(header: GGUFHeader) -> str:
    """The name of a file's type; its number where it has no name here."""
    file_type = header.metadata.get("general.file_type")
    return next((key for key, (number, _) in FILE_TYPES.items() if number == file_type), str(file_type))


@torch.no_grad()
def kl_divergence(model: nn.Module, other: nn.Module, ids: Tensor, windows: list[int]) -> float:
    """Mean KL(model || other), nats per token, over ids (T) in windows; tokens that only one of them has are left out."""
    device, kls = next(model.parameters()).device, []
    for window in torch.split(ids, windows):
        ours, theirs = (m(window[None].to(device))[0].float().cpu().double() for m in (model, other))
        n = min(ours.shape[1], theirs.shape[1])
        ours, theirs = ours[:, :n].log_softmax(-1), theirs[:, :n].log_softmax(-1)
        kls.append((ours.exp() * (ours - theirs)).sum(-1))
    return torch.cat(kls).mean().item()


def _context_of(metadata: dict[str, Any]) -> int:
    theirs = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if not isinstance(theirs, int):
        raise ConvertError("the file does not say how long its context is, so llama.cpp cannot run it")
    return theirs


def text_of(model: nn.Module, tokenizer: Tokenizer, n_tokens: int) -> str:
    """Text that the model writes, so that it suits the vocabulary."""
    start = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    ids = generate(model, start, max_new_tokens=n_tokens, seed=0)[0].tolist()
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size and i != tokenizer.eos_token_id])


def run_llama_cpp(folder: Path, path: Path, timeout_seconds: float) -> None:
    """Let the worker answer the request in `folder`; see llama_cpp_worker.py."""
    worker = Path(__file__).with_name("llama_cpp_worker.py")
    # A failed assertion may hang in a debugger otherwise; and threads that wait must not keep the cores from other processes.
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            [sys.executable, str(worker), str(folder)],
            capture_output=True,
            env=environment,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConvertError(
            f"llama.cpp did not finish {path} in {timeout_seconds} s; compare less text, or wait longer"
        ) from error
    if done.returncode != 0:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        raise ConvertError(f"llama.cpp could not run {path} ({how}); its last words: " + " | ".join(lines[-4:]))


@torch.no_grad()
def _compare_logits(model: nn.Module, ids: Tensor, windows: list[int], logits: np.ndarray) -> dict[str, float]:
    """Statistics over all positions; `logits` (T, n_vocab) may have more columns than the model: a row for <|endoftext|>, padding."""
    device = next(model.parameters()).device
    kls, diffs, agree, nll_model, nll_file, start = [], [], [], [], [], 0
    for length in windows:
        window = ids[start : start + length]
        ours = model(window[None].to(device))[0].float().cpu().double().log_softmax(-1)  # (T, V)
        theirs = torch.from_numpy(logits[start : start + length].astype(np.float64)).log_softmax(-1)
        if theirs.shape[1] < ours.shape[1]:
            raise ConvertError(
                f"the file has {theirs.shape[1]:,} tokens, the model {ours.shape[1]:,}; was it made from this model?"
            )
        theirs = theirs[:, : ours.shape[1]]
        kls.append((ours.exp() * (ours - theirs)).sum(-1))
        agree.append(ours.argmax(-1) == theirs.argmax(-1))
        top = ours.topk(min(10, ours.shape[1])).indices
        diffs.append((ours - theirs).gather(1, top).abs().max())
        nll_model.append(-ours[:-1].gather(1, window[1:, None]))
        nll_file.append(-theirs[:-1].gather(1, window[1:, None]))
        start += length
    kl = torch.cat(kls)
    return {
        "kl_mean": kl.mean().item(),
        "kl_max": kl.max().item(),
        "logit_diff_max": torch.stack(diffs).max().item(),
        "argmax_agreement": torch.cat(agree).double().mean().item(),
        "perplexity_model": _perplexity(nll_model),
        "perplexity_file": _perplexity(nll_file),
    }


def _perplexity(nll: list[Tensor]) -> float:
    return math.exp(min(torch.cat(nll).mean().item(), 700.0))


@torch.no_grad()
def _compare_greedy(model: nn.Module, prompt: Tensor, theirs: list[int]) -> tuple[int, float]:
    """How many tokens of llama.cpp's continuation are the model's, and how much the model prefers its own at the first other."""
    idx = prompt[None].to(next(model.parameters()).device)
    ours = generate(model, idx, max_new_tokens=len(theirs), temperature=0.0)[0, len(prompt) :].tolist()
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
    if equal == len(theirs):
        return equal, 0.0
    seen = torch.cat([idx, torch.tensor([ours[:equal]], dtype=torch.long, device=idx.device)], dim=1)
    log_probs = model(seen)[0, -1].float().log_softmax(-1)
    if theirs[equal] >= len(log_probs):
        return equal, math.inf
    return equal, (log_probs[ours[equal]] - log_probs[theirs[equal]]).item()
