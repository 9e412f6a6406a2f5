"""Memory of tuning Llama-3-8B (NF4 with double quantization, r=32 on all linear layers, one row per micro-step), from dry runs.

    python benchmarks/memory.py

By plan and tokens per row: the peak on the device, what it consists of, host memory, and how long the dry run took. Then, for cards of
some sizes, what `fit` changes of a plan that saves nothing but block activations. On a machine with CUDA each plan is run as well (random
weights), in the memory of a card of --gpu-gb, and torch.cuda.max_memory_allocated stands beside the prediction.
"""

import argparse
import functools
import gc
import time
from dataclasses import replace
from typing import Any

import machine
import torch
from torch import nn

from llmforge.cli.dry_run import Rows, dry_run, train_config
from llmforge.errors import OutOfMemoryError
from llmforge.finetune import LoRAConfig, NF4Config, apply_lora_, quantize_
from llmforge.finetune.memory import GPU, GiB, MemoryEstimate, MemoryPlan, fit
from llmforge.models import Llama, LlamaConfig
from llmforge.nn import Linear4bit, offload_embedding_
from llmforge.training import Trainer, chunked_next_token_loss, next_token_loss

# Each with what is above it.
PLANS: dict[str, dict[str, Any]] = {
    "checkpoints, all logits": dict(chunked_loss=False),
    "loss in chunks": dict(chunked_loss=True),
    "embedding on the host": dict(embedding_on_host=True),
    "checkpoints on the host": dict(activation_checkpointing="offload"),
    "8-bit AdamW": dict(optimizer="adamw8bit"),
    "8 tiles": dict(mlp_tiles=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3-8b", help="of LlamaConfig; a smaller one to try the script")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16_384, 32_768])
    parser.add_argument(
        "--fit", type=int, nargs="*", default=[1024, 4096, 32_768], help="tokens per row, for what fits"
    )
    parser.add_argument("--cards", type=float, nargs="*", default=[6, 8, 12], help="GB, for what fits")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gpu-gb", type=float, default=12, help="the card that a larger one stands for")
    parser.add_argument("--name", default=None)
    args = parser.parse_args()
    config = LlamaConfig.preset(args.preset)
    # Rows longer than the context are for packing; here each is one document, which needs as much.
    config = config.replace(max_position_embeddings=max(config.max_position_embeddings, *args.seq_len, *args.fit))
    nf4, lora = NF4Config(), LoRAConfig(r=args.rank)
    estimate = functools.cache(lambda plan: dry_run(config, nf4=nf4, lora=lora, plan=plan))
    cuda = torch.cuda.is_available()
    rows: list[dict[str, Any]] = []
    for seq_len in args.seq_len:
        plan = MemoryPlan(seq_len=seq_len, grad_accum_steps=2)
        for name, changes in PLANS.items():
            plan = replace(plan, **changes)
            start = time.perf_counter()
            row = {"tokens": seq_len, "plan": name, **described(estimate(plan))}
            row["dry_run_seconds"] = round(time.perf_counter() - start, 1)
            if cuda:
                row["measured"] = measured(config, nf4, lora, plan, args.gpu_gb, row["peak_bytes"])
            print(row, flush=True)
            rows.append(row)
    result = {
        **machine.describe(torch.device("cuda" if cuda else "cpu")),
        "model": args.preset,
        "adapter": f"r={args.rank}, all linear layers, float32",
        "rows": rows,
        "fit": [fitted(seq_len, card, estimate) for seq_len in args.fit for card in args.cards],
    }
    machine.write(args.name or f"memory-{args.preset}{'-cuda' if cuda else ''}", result)


def described(estimate: MemoryEstimate) -> dict[str, Any]:
    return {
        "peak_gib": round(estimate.peak_bytes / GiB, 2),
        "peak_bytes": estimate.peak_bytes,
        "host_bytes": estimate.host_bytes,
        "items": dict(estimate.items),
    }


def fitted(seq_len: int, card: float, estimate: Any) -> dict[str, Any]:
    """What is changed of a plan with all logits and block checkpoints until it fits a card."""
    gpu = GPU.of_size(card)
    found: dict[str, Any] = {"tokens": seq_len, "card_gb": card, "usable_gib": round(gpu.usable_bytes / GiB, 2)}
    try:
        plan, rungs = fit(
            MemoryPlan(seq_len=seq_len, grad_accum_steps=2, chunked_loss=False), gpu.usable_bytes, estimate
        )
        found |= {"switches": [rung.name for rung in rungs], "peak_gib": round(estimate(plan).peak_bytes / GiB, 2)}
    except OutOfMemoryError as error:
        found["error"] = str(error)
    print(found, flush=True)
    return found


def measured(
    config: LlamaConfig, nf4: NF4Config, lora: LoRAConfig, plan: MemoryPlan, gpu_gb: float, predicted: int
) -> dict[str, Any]:
    """Two steps of two micro-steps on the GPU, within the usable memory of a card of `gpu_gb`."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, GPU.of_size(gpu_gb).usable_bytes / total))
    found: dict[str, Any] = {"card_gb": gpu_gb}
    try:
        trainer = random_run(config, nf4, lora, plan, device="cuda")
        next(trainer)
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        metrics = next(trainer)
        torch.cuda.synchronize()
        found["seconds_per_step"] = round(time.perf_counter() - start, 3)
        found["loss_is_finite"] = bool(torch.isfinite(torch.tensor(metrics.loss)))
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["predicted_to_measured"] = round(predicted / found["peak_bytes"], 4)
    except (torch.OutOfMemoryError, OutOfMemoryError) as error:
        found["error"] = str(error)[:200]
    finally:
        trainer = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def random_run(config: LlamaConfig, nf4: NF4Config, lora: LoRAConfig, plan: MemoryPlan, *, device: str) -> Trainer:
    """The trainer of a model with random weights, which is never anywhere in 16 bits."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Llama(config)
    finally:
        torch.set_default_dtype(torch.float32)
    quantize_(model, nf4)
    apply_lora_(model, lora)
    if plan.embedding_on_host:
        offload_embedding_(model)
    model.to_empty(device=device)
    fill_(model)
    model.set_mlp_tiles(plan.mlp_tiles)
    # Accumulation is the trainer's here, not a shortcut: two micro-steps per step.
    train = replace(train_config(plan, dtype, device=device, steps=4), grad_accum_steps=plan.grad_accum_steps)
    loss_fn = chunked_next_token_loss if plan.chunked_loss else next_token_loss
    return Trainer(model, Rows(plan.seq_len, packed=True), config=train, loss_fn=loss_fn)


@torch.no_grad()
def fill_(model: nn.Module) -> None:
    """Values of an untrained model: N(0, 0.02), norms 1, B of an adapter 0."""
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.codes.random_(0, 256)
            if module.double_quant:
                module.absmax.random_(0, 256)
                module.nested_absmax.fill_(0.01)
                module.offset.fill_(0.04)
            else:
                module.absmax.fill_(0.04)
        for buffer in module._buffers.values():
            if buffer is not None and buffer.is_floating_point() and buffer.ndim == 2:
                buffer.normal_(std=0.02)  # an embedding on the host


if __name__ == "__main__":
    main()
