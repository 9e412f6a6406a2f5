"""A tuning run without a GPU and without weights: what memory its step needs, by `finetune.memory` (torch is imported when called)."""

import dataclasses
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from llmforge.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from llmforge.finetune import LoRAConfig, NF4Config
    from llmforge.finetune.memory import MemoryEstimate, MemoryPlan, MemoryProfile, MemoryTracker
    from llmforge.models import ModelConfig
    from llmforge.training import TrainConfig


def dry_run(
    model_config: "ModelConfig",
    *,
    nf4: "NF4Config | None",
    lora: "LoRAConfig | None",
    plan: "MemoryPlan",
    dtype: "torch.dtype | None" = None,
    answer_tokens: int | None = None,
    device_type: str = "cuda",
    packed: bool = True,
) -> "MemoryEstimate":
    """What a step of this run needs in its steady state, as `llmforge finetune` would do it.

    The model, its 4-bit layers and adapters are built without values, and the trainer does a step with them. Of a model of many alike
    blocks, 3 and 4 are built, and the rest follows from these to the byte (`finetune.memory.extrapolated`).

    Args:
        model_config: of a family of `llmforge.models`.
        nf4: how the frozen base is rounded; None = not.
        lora: the adapter; None = all weights are trained, in float32.
        dtype: of the arithmetic and of frozen weights; None = bfloat16 on "cuda", float32 on others.
        answer_tokens: tokens of each row that have a target; None = all.
        device_type: "cuda": attention is FlashAttention, and kernels need some workspace; "cpu": what torch does there.
        packed: rows come with positions and may hold several documents, as those of `InstructionDataset`.
    Raises:
        ConfigError: what the run itself would raise; a switch of the plan that this model does not have.
    """
    from llmforge.finetune.memory import extrapolated

    def profile(layers: int) -> "MemoryProfile":
        return profile_run(
            _with_layers(model_config, layers), nf4=nf4, lora=lora, plan=plan, dtype=dtype, answer_tokens=answer_tokens,
            device_type=device_type, packed=packed,
        )  # fmt: skip

    layers = _layers(model_config)
    alike = _blocks_are_alike(model_config, nf4, lora)
    return (extrapolated(profile, layers) if alike else profile(layers)).estimate


def profile_run(
    model_config: "ModelConfig",
    *,
    nf4: "NF4Config | None",
    lora: "LoRAConfig | None",
    plan: "MemoryPlan",
    dtype: "torch.dtype | None" = None,
    answer_tokens: int | None = None,
    device_type: str = "cuda",
    packed: bool = True,
    fake: bool = True,
) -> "MemoryProfile":
    """`dry_run` of all blocks, part by part; with fake=False in earnest, on the CPU."""
    import torch

    from llmforge.finetune.memory import CUDA_WORKSPACE_BYTES, GRADIENTS, profile_memory
    from llmforge.training import Trainer, chunked_next_token_loss, next_token_loss

    on_cuda = device_type == "cuda"
    if dtype is None:
        dtype = torch.bfloat16 if on_cuda else torch.float32
    if dtype is torch.float16:
        dtype = torch.bfloat16  # of the same size, and without a scaler that asks for values
    answers = plan.seq_len if answer_tokens is None else min(answer_tokens, plan.seq_len)

    def build(tracker: "MemoryTracker") -> Callable[[], object]:
        model = _build_model(model_config, nf4, lora, plan, dtype, on_cuda=on_cuda, fake=fake)
        trainer = Trainer(
            model,
            Rows(answers, packed),
            config=train_config(plan, dtype),
            loss_fn=chunked_next_token_loss if plan.chunked_loss else next_token_loss,
        )
        if fake:  # no values that could be looked at: no step is skipped
            trainer._update_weights = lambda skipped: trainer.optimizer.step()  # type: ignore[method-assign]
            trainer._count = lambda skipped: None  # type: ignore[method-assign]
        tracker.watch(model, trainer.optimizer, blocks=_blocks(model, _layers(model_config)))
        # What is there from the second micro-step of the second step on, without computing the first ones.
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        tracker.assign((p.grad for p in trained), GRADIENTS)
        trainer.optimizer.step()
        if plan.grad_accum_steps == 1:
            trainer.optimizer.zero_grad()
        return lambda: next(trainer)

    with ExitStack() as stack:
        if fake:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of FakeTensors: that they have no values
            stack.enter_context(_modules_that_can_be_cast())
            stack.enter_context(_nothing_to_decode(on_cuda))
            stack.enter_context(_functions(plan.micro_batch_size * answers, on_cuda))
        return profile_memory(
            build,
            fake=fake,
            steps=1,
            scratch=flash_attention_scratch if on_cuda else None,
            workspace_bytes=CUDA_WORKSPACE_BYTES if on_cuda else 0,
        )


def _build_model(
    config: "ModelConfig",
    nf4: "NF4Config | None",
    lora: "LoRAConfig | None",
    plan: "MemoryPlan",
    dtype: "torch.dtype",
    *,
    on_cuda: bool,
    fake: bool,
) -> "nn.Module":
    """The model as `llmforge finetune` makes it."""
    import torch

    from llmforge.finetune import apply_lora_, quantize_
    from llmforge.models import FAMILIES
    from llmforge.nn import offload_embedding_

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if lora is None else dtype)
    try:
        model = FAMILIES[config.FAMILY][1](config)
    finally:
        torch.set_default_dtype(before)
    if nf4 is not None:
        quantize_(model, nf4)
    if lora is not None:
        apply_lora_(model, lora)
    if plan.embedding_on_host:
        offload_embedding_(model)
    model.set_mlp_tiles(plan.mlp_tiles)
    if fake:
        model._documents = _documents(on_cuda)  # type: ignore[method-assign]
    return model


def train_config(plan: "MemoryPlan", dtype: "torch.dtype", *, device: str = "cpu", steps: int = 1) -> "TrainConfig":
    """The trainer's settings of a plan, of as many micro-steps as a dry run does: one."""
    from llmforge.training import TrainConfig

    return TrainConfig.from_dict(
        dict(
            max_steps=steps,
            micro_batch_size=plan.micro_batch_size,
            seq_len=plan.seq_len,
            optimizer="adamw" if plan.optimizer == "adamw" else "adamw8bit",
            activation_checkpointing=plan.activation_checkpointing,
            device=device,
            dtype=str(dtype).removeprefix("torch."),
        )
    )


@dataclasses.dataclass
class Rows:
    """Data of a given shape: the last tokens of each row have a target."""

    answers: int
    packed: bool

    def batch(self, step: int, *, batch_size: int, seq_len: int, seed: int) -> "Sequence[Tensor]":
        import torch

        idx = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        targets = torch.full((batch_size, seq_len), -100)
        targets[:, seq_len - self.answers :] = 0
        if not self.packed:
            return idx, targets
        return idx, targets, torch.arange(seq_len).expand(batch_size, -1).contiguous()


# Models of fewer blocks


def _layers_field(config: "ModelConfig") -> str:
    names = {field.name for field in dataclasses.fields(config)}
    return "num_hidden_layers" if "num_hidden_layers" in names else "n_layer"


def _layers(config: "ModelConfig") -> int:
    return int(getattr(config, _layers_field(config)))


def _with_layers(config: "ModelConfig", layers: int) -> "ModelConfig":
    return config.replace(**{_layers_field(config): layers})


def _blocks_are_alike(config: "ModelConfig", nf4: "NF4Config | None", lora: "LoRAConfig | None") -> bool:
    """Whether nothing of what is asked for is about single blocks."""
    if getattr(config, "sliding_window", None) is not None and getattr(config, "max_window_layers", False):
        return False
    names = [*(nf4.skip if nf4 is not None else ())]
    if lora is not None:
        targets = lora.target_modules
        names += [*((targets,) if isinstance(targets, str) else targets), *lora.modules_to_save]
    return not any(part.isdigit() for name in names for part in name.replace("\\", ".").split("."))


def _blocks(model: "nn.Module", layers: int) -> "Sequence[nn.Module]":
    from torch import nn

    found = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), None)
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no list of {layers} blocks, which a dry run looks for")
    return list(found)


# What stands for the GPU, and for values


@contextmanager
def _replaced(owner: Any, name: str, new: object) -> "Iterator[None]":
    """A function exchanged while the block runs. (A TorchFunctionMode would be off while a backward pass computes things again.)"""
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _functions(answers: int, on_cuda: bool) -> "Iterator[None]":
    """How many tokens have a target, which no tensor without values can say; and functions as CUDA has them.

    On CUDA, RMSNorm is one kernel that keeps its input and a number per row, LayerNorm is float32 under autocast, and attention without
    a mask is FlashAttention; fake tensors of the CPU would take the CPU's ways.
    """
    import torch
    import torch.nn.functional as F

    class RMSNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: "Tensor") -> "Tensor":
            ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, *grads: "Tensor") -> "Tensor":
            return torch.empty_like(ctx.saved_tensors[0])

    rms_norm, layer_norm, attention = F.rms_norm, F.layer_norm, F.scaled_dot_product_attention

    def fused_rms_norm(x: "Tensor", shape: Any, weight: "Tensor | None" = None, eps: float | None = None) -> "Tensor":
        if weight is not None:
            return rms_norm(x, shape, weight, eps)
        y: Tensor = RMSNorm.apply(x)  # type: ignore[no-untyped-call]
        return y

    def float32_layer_norm(x: "Tensor", *args: Any, **kwargs: Any) -> "Tensor":
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    def flash_attention(q: "Tensor", k: "Tensor", v: "Tensor", **kwargs: Any) -> "Tensor":
        if kwargs.get("attn_mask") is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256:
            return _flash_attention(q, k, v, kwargs.get("dropout_p", 0.0))
        return attention(q, k, v, **kwargs)

    def nonzero(x: "Tensor") -> "Tensor":
        return x.new_empty(answers, x.ndim, dtype=torch.int64)

    with ExitStack() as stack:
        stack.enter_context(_replaced(torch.Tensor, "nonzero", nonzero))
        if on_cuda:
            stack.enter_context(_replaced(F, "rms_norm", fused_rms_norm))
            stack.enter_context(_replaced(F, "layer_norm", float32_layer_norm))
            stack.enter_context(_replaced(F, "scaled_dot_product_attention", flash_attention))
        yield


def _flash_attention(q: "Tensor", k: "Tensor", v: "Tensor", dropout: float) -> "Tensor":
    import torch

    y: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, True)[0]
    return y


def flash_attention_scratch(func: Any, args: "Sequence[Any]") -> int:
    """What FlashAttention-2 allocates in its backward pass, beside the gradients: float32 sums of that of q, padded to 128 tokens and 32
    values, a number per query; and, where a head of k serves several of q, the gradients of k and v for each of these."""
    import torch

    if func is not torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
        return 0
    q, k = args[1], args[2]
    B, H, T, D = q.shape
    rows = B * H * (-(-T // 128) * 128)
    sums = rows * (-(-D // 32) * 32) * 4 + rows * 4
    repeated = 2 * k.element_size() * B * H * k.shape[2] * D if k.shape[1] != H else 0
    return int(sums + repeated)


def _documents(on_cuda: bool) -> Callable[..., Any]:
    """Instead of `LanguageModel._documents`: positions without values cannot be asked where documents begin, so each row is one."""
    import torch

    from llmforge.nn.documents import Documents, _Pack

    class Unknown(Documents):
        def __init__(self, positions: "Tensor") -> None:
            B, T = positions.shape
            self._pack = _Pack(positions, (T,) * B, None)
            self.window = None

        def windowed(self, window: int | None) -> "Documents":
            documents = Unknown(self.positions)
            documents.window = window if window is not None and window < self.positions.shape[1] else None
            return documents

        def attention(self, q: "Tensor", k: "Tensor", v: "Tensor", *, dropout: float = 0.0) -> "Tensor":
            if (
                on_cuda and dropout == 0 and q.dtype is torch.bfloat16
            ):  # varlen, which does without repeated heads and masks
                return _flash_attention(q, k, v, 0.0)
            return super().attention(q, k, v, dropout=dropout)

    def documents(idx: "Tensor", kv_cache: object, positions: "Tensor | None", context: str) -> Documents | None:
        return None if positions is None else Unknown(positions)

    return documents


@contextmanager
def _nothing_to_decode(on_cuda: bool) -> "Iterator[None]":
    """Layers of 4 and 8 bits that only allocate what decoding does, and tables without values: most of the operations of a step would be
    theirs."""
    import torch

    from llmforge.quant import nf4

    largest = nf4._CHUNK if on_cuda else nf4._CHUNK_CPU

    def allocate(x: nf4.NF4Tensor, *, dtype: torch.dtype = torch.float32, backend: str | None = None) -> "Tensor":
        out = x.codes.new_empty(x.shape, dtype=dtype)
        chunk = min(largest, x.numel + x.numel % 2)
        scales = None if x.nested_absmax is None else x.codes.new_empty(x.absmax.numel(), dtype=torch.float32)
        index = x.codes.new_empty(chunk // 2, dtype=torch.int32)
        buffer = None if dtype is torch.float32 else x.codes.new_empty(chunk // 2, dtype=torch.int64)
        del scales, index, buffer
        return out

    def tables(
        values: "Tensor", signed: bool
    ) -> "tuple[Tensor, Tensor]":  # of 8-bit codes: values would make them slow
        return values.new_empty(256, dtype=torch.float32), values.new_empty(255, dtype=torch.float32)

    int8 = importlib.import_module("llmforge.nn.int8")
    slices = int8._slices

    def first_slice(codes: "Tensor") -> "Iterator[slice]":  # no other needs more memory
        return itertools.islice(slices(codes), 1)

    with (
        _replaced(int8, "_slices", first_slice),
        _replaced(importlib.import_module("llmforge.nn.linear4bit"), "dequantize_nf4", allocate),
        _replaced(importlib.import_module("llmforge.quant.dynamic8"), "_tables_for", tables),
    ):
        yield


@contextmanager
def _modules_that_can_be_cast() -> "Iterator[None]":
    """nn.Module.to and float without an exchange of tensors in place, which fails under FakeTensorMode (torch 2.13)."""
    import torch
    from torch import nn

    def apply(self: nn.Module, fn: "Callable[[Tensor], Tensor]", recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        for name, parameter in self._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    new = fn(parameter)
                if new is not parameter:
                    self._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else fn(buffer)
        return self

    with _replaced(nn.Module, "_apply", apply):
        yield
