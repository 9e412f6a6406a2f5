"""The loss is a sum and a count, so that a step's mean does not depend on how the step was split."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmforge.errors import ConfigError
from llmforge.training.compiling import compiled, is_compiling

IGNORED = -100  # target positions with this id carry no loss

# (model, micro-batch) -> (sum of the losses, number of targets), both scalar tensors.
LossFunction = Callable[[nn.Module, Sequence[Tensor]], tuple[Tensor, Tensor]]

# Float32 logits of a chunk: 128 MB. Larger chunks are no faster (benchmarks/packing.py).
_CHUNK_LOGITS = 2**25

# From so many tokens on chunks are faster on a CPU too (benchmarks/step_profile.py).
_LARGE_VOCABULARY = 4096


def next_token_loss(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the next token.

    Args:
        model: maps (B, T) ids to (B, T, V) logits.
        batch: idx and targets, both (B, T) int64; targets of -100 do not count.
    Returns:
        the sum over all targets, float32 scalar; how many they are, int64 scalar.
    """
    idx, targets = batch[0], batch[1]
    logits = model(idx)
    loss_sum = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss_sum, (targets != IGNORED).sum()


def chunked_next_token_loss(
    model: nn.Module, batch: Sequence[Tensor], *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """`next_token_loss` in the memory of a few logits: the output projection sees only positions that have a target, a chunk at a time.

    Args:
        model: has `features(idx) -> (B, T, C)` and `lm_head`, as the families of `llmforge.models` do.
        batch: idx and targets as for `next_token_loss`, and positions where rows hold several documents: they go to `features`.
        chunk_tokens: as for `chunked_cross_entropy`.
    Returns:
        the sum over all targets, float32 scalar; how many they are, int64 scalar.
    Raises:
        ConfigError: the model has no features or lm_head.
    """
    inner: Any = model
    if not (hasattr(model, "features") and hasattr(model, "lm_head")):
        raise ConfigError(
            f"{type(model).__name__} lacks features(idx) or lm_head, which a loss in chunks needs; use next_token_loss"
        )
    idx, targets = batch[0], batch[1].flatten()
    places = {"positions": batch[2]} if len(batch) > 2 else {}
    hidden = inner.features(idx, **places).flatten(0, 1)  # (B*T, C)
    answers = _answers(batch[1])
    if is_part := len(answers) < len(targets):
        hidden, targets = hidden.index_select(0, answers), targets[answers]
    # Compiled code is made for one number of rows, which is always the same where none is left out.
    loss_sum = _chunked(hidden, inner.lm_head, targets, chunk_tokens, of_any_length=is_part)
    return loss_sum, torch.full((), len(answers), dtype=torch.int64, device=idx.device)


def default_loss(model: nn.Module) -> LossFunction:
    """The loss in chunks where the model can have it and its vocabulary is large enough for that to pay; else all logits at once."""
    out_features = getattr(getattr(model, "lm_head", None), "out_features", 0)
    in_chunks = callable(getattr(model, "features", None)) and out_features >= _LARGE_VOCABULARY
    return chunked_next_token_loss if in_chunks else next_token_loss


def _answers(targets: Tensor) -> Tensor:
    """Where the targets are that count, in (B, T) laid end to end."""
    host: Tensor = getattr(
        targets, "on_host", targets
    )  # how many they are must be known there: do not wait for the device
    answers = (host.flatten() != IGNORED).nonzero().squeeze(1)
    if answers.device != targets.device:
        answers = answers.pin_memory() if targets.is_cuda else answers
        answers = answers.to(targets.device, non_blocking=True)
    return answers


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Sum of the cross-entropies of head(hidden), in nats, whose gradients are found along with it: no chunk's logits outlive it.

    Value and gradients are those of `F.cross_entropy(head(hidden).float(), targets, reduction="sum")` up to the order of float
    sums; gradients of the head's parameters are summed in float32. No shape depends on the values of the arguments.

    Args:
        hidden: (N, C).
        head: the output projection, (n, C) -> (n, V), each row for itself: nn.Linear or any other module.
        targets: (N,) int64; -100 does not count.
        chunk_tokens: rows whose logits exist at once; None = as many as make 128 MB of float32.
    Returns:
        float32 scalar.
    Raises:
        ConfigError: chunk_tokens below 1, or a head that does not say its out_features and no chunk_tokens.
    """
    return _chunked(hidden, head, targets, chunk_tokens, of_any_length=True)


def _chunked(
    hidden: Tensor, head: nn.Module, targets: Tensor, chunk_tokens: int | None, *, of_any_length: bool
) -> Tensor:
    fuse = not of_any_length and is_compiling()
    if chunk_tokens is None:
        vocab_size = getattr(head, "out_features", None)
        if vocab_size is None:
            raise ConfigError(
                f"{type(head).__name__} has no out_features, so chunk_tokens must be given; 256 is cautious"
            )
        chunk_tokens = max(1, _CHUNK_LOGITS // vocab_size)
        if fuse:
            chunk_tokens = _even(len(hidden), chunk_tokens)
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens ({chunk_tokens}) must be at least 1")
    params = [p for p in head.parameters() if p.requires_grad]
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or bool(params))
    loss_sum: Tensor = _ChunkedCrossEntropy.apply(hidden, targets, head, chunk_tokens, fuse, with_gradients, *params)  # type: ignore[no-untyped-call]
    return loss_sum


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Finds the gradients of the sum in the forward pass, while the logits are there; the backward pass multiplies them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Module,
        chunk_tokens: int,
        fuse: bool,
        with_gradients: bool,
        *params: nn.Parameter,
    ) -> Tensor:
        d_hidden = torch.empty_like(hidden) if with_gradients and hidden.requires_grad else None
        wanted = params if with_gradients else ()
        d_params = [torch.zeros_like(p, dtype=torch.float32) for p in wanted]
        chunk = _linear_chunk(head, fuse) if type(head) is nn.Linear else _module_chunk(head)
        loss_sum = hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, max(1, len(hidden)), chunk_tokens):  # without a target too, for gradients of zero
            rows = slice(first, first + chunk_tokens)
            d_rows = None if d_hidden is None else d_hidden[rows]
            loss_sum += chunk(hidden[rows], targets[rows], d_rows, wanted, d_params)
        ctx.save_for_backward(d_hidden, *d_params)
        ctx.dtypes = [p.dtype for p in wanted]
        return loss_sum

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *d_params = ctx.saved_tensors
        # In place: of a matrix (V, C) there must not be two. A second pass through this graph is then an error of autograd's.
        grads = [d.mul_(grad).to(dtype) for d, dtype in zip(d_params, ctx.dtypes, strict=True)]
        return (None if d_hidden is None else d_hidden * grad, None, None, None, None, None, *grads)


# (hidden (n, C), targets (n), where to put the gradient of hidden, parameters, where to add their gradients) -> sum of the losses
_Chunk = Callable[[Tensor, Tensor, Tensor | None, Sequence[nn.Parameter], Sequence[Tensor]], Tensor]


def _linear_chunk(head: nn.Linear, fuse: bool) -> _Chunk:
    device = head.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    weight = head.weight.detach().to(dtype)  # once for all chunks
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    cross_entropy = _compiled_cross_entropy() if fuse else _cross_entropy_

    def chunk(
        hidden: Tensor,
        targets: Tensor,
        d_hidden: Tensor | None,
        params: Sequence[nn.Parameter],
        d_params: Sequence[Tensor],
    ) -> Tensor:
        hidden = hidden.to(dtype)
        loss_sum, d_logits = cross_entropy(F.linear(hidden, weight, bias), targets)
        if d_hidden is None and not params:
            return loss_sum
        d_logits = d_logits.to(dtype)
        if d_hidden is not None:
            d_hidden.copy_(d_logits @ weight)
        for param, d_param in zip(params, d_params, strict=True):
            if param is head.bias:
                d_param += d_logits.sum(0, dtype=torch.float32)
            elif dtype is torch.float32:
                d_param.addmm_(d_logits.T, hidden)
            else:
                d_param += d_logits.T @ hidden
        return loss_sum

    return chunk


def _module_chunk(head: nn.Module) -> _Chunk:
    def chunk(
        hidden: Tensor,
        targets: Tensor,
        d_hidden: Tensor | None,
        params: Sequence[nn.Parameter],
        d_params: Sequence[Tensor],
    ) -> Tensor:
        with torch.set_grad_enabled(d_hidden is not None or bool(params)):
            hidden = hidden.detach().requires_grad_(d_hidden is not None)
            logits = head(hidden)
        scores = logits.detach().to(torch.float32, copy=True)  # a copy: the module may look at its output again
        loss_sum, _ = _cross_entropy_(scores, targets)
        if logits.requires_grad:
            wanted = [*([hidden] if d_hidden is not None else []), *params]
            # As a backward pass outside of autocast would: it computes in the dtypes of the forward pass.
            with torch.autocast(hidden.device.type, enabled=False):
                found = torch.autograd.grad(logits, wanted, scores.to(logits.dtype), allow_unused=True)
            if d_hidden is not None:
                d_hidden.copy_(found[0])
            for d_param, d in zip(d_params, found[len(found) - len(d_params) :], strict=True):
                if d is not None:
                    d_param += d
        return loss_sum

    return chunk


def _cross_entropy_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of (n, V) logits, and its gradient, float32: in the place of the logits, if they are float32 too."""
    logits = logits.float()
    counts = (targets != IGNORED)[:, None]
    index = targets[:, None].where(counts, 0)
    logits -= logits.amax(1, keepdim=True)
    of_target = logits.gather(1, index)
    sums = logits.exp_().sum(1, keepdim=True)
    losses = (sums.log() - of_target).where(counts, 0)
    logits.mul_(sums.reciprocal().where(counts, 0))  # p
    logits.scatter_(1, index, (of_target.exp() / sums - 1).where(counts, 0))  # p - 1
    return losses.sum(), logits


def _fused_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`_cross_entropy_` to be compiled: a few passes over the logits instead of ten, and the gradient in their dtype."""
    counts = (targets != IGNORED)[:, None]
    index = targets[:, None].where(counts, 0)
    log_probs = F.log_softmax(logits.float(), 1)
    losses = -log_probs.gather(1, index).where(counts, 0)
    is_target = torch.arange(logits.shape[1], device=logits.device) == index
    return losses.sum(), ((log_probs.exp() - is_target.float()) * counts).to(logits.dtype)


@functools.cache
def _compiled_cross_entropy() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return compiled(_fused_cross_entropy)


def _even(length: int, most: int) -> int:
    """Rows of a chunk, such that all chunks have as many, or else all but the last: compiled code is made for one number."""
    return next((size for size in range(most, most // 2, -1) if length % size == 0), most)
