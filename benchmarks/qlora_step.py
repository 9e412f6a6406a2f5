"""A step of QLoRA beside the same step on an unquantized base, and beside peft + bitsandbytes: tokens/s and peak memory.

    python benchmarks/qlora_step.py --preset llama-3-8b --tokens 4096                  on a GPU: all 32 layers
    python benchmarks/qlora_step.py --preset llama-3-8b --layers 2 --tokens 1024       on a CPU

    nf4      llmforge: the base in 4 bits, adapters of rank 32 on all linear layers, recomputed blocks, the loss in chunks
    dense    the same on a base in the type of the arithmetic
    peft     transformers with bitsandbytes' 4-bit layers, peft's adapters, its gradient checkpointing (only where they are installed)

The three take turns in one process. --gpu-gb 12 gives torch no more than such a card has. Random weights: nothing here depends on values.
"""

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
from torch import Tensor, nn

import llmforge as lf
from llmforge.training import chunked_next_token_loss, pick_device

Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="so many; default: all")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--device")
    parser.add_argument("--gpu-gb", type=float, help="memory that torch may use")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.gpu_gb is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gpu_gb * 2**30 / total), device)
    config = lf.LlamaConfig.preset(args.preset)
    config = config.replace(
        num_hidden_layers=args.layers or config.num_hidden_layers,
        max_position_embeddings=max(args.tokens, config.max_position_embeddings),
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    idx = torch.randint(0, config.vocab_size, (1, args.tokens + 1), device=device)
    steps, memory, failed = {}, {}, {}
    for kind in args.kinds:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            step = KINDS[kind](config, args.rank, dtype, idx)
            step(), step()  # the optimizer's state is there in the second
        except (ImportError, torch.OutOfMemoryError) as error:
            failed[kind] = str(error).splitlines()[0][:200]
            continue
        if device.type == "cuda":
            memory[kind] = torch.cuda.max_memory_allocated(device)
            if len(args.kinds) > 1:
                continue  # all of them would not fit: each is timed by a run of its own, with --kinds
        steps[kind] = step
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(args.repeat):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[kind].append(time.perf_counter() - start)
    result = {
        **machine.describe(device),
        "preset": args.preset,
        "layers": config.num_hidden_layers,
        "tokens": args.tokens,
        "rank": args.rank,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {kind: machine.spread(times) for kind, times in seconds.items()},
        "peak_bytes": memory,
        "failed": failed,
    }
    median = {kind: spread["median"] for kind, spread in result["seconds"].items()}
    result["tokens_per_second"] = {kind: round(args.tokens / value, 2) for kind, value in median.items()}
    if "nf4" in median:
        result["time_of_nf4_relative_to"] = {k: round(median["nf4"] / v, 3) for k, v in median.items() if k != "nf4"}
    machine.write(f"qlora-step-{device.type}-{args.preset}", result)


def ours(config: lf.LlamaConfig, rank: int, dtype: torch.dtype, idx: Tensor, *, quantize: bool) -> Step:
    model = built(lambda: lf.Llama(config), dtype, idx.device, quantize=quantize)
    lf.apply_lora_(model, lf.LoRAConfig(r=rank, lora_alpha=16))
    model.set_activation_checkpointing("blocks")

    def loss() -> Tensor:
        loss_sum, count = chunked_next_token_loss(model, (idx[:, :-1], idx[:, 1:]))
        return loss_sum / count

    return stepper(model, loss, dtype)


def built(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, *, quantize: bool) -> Any:
    """A model, rounded layer by layer, so that the dense one is never on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = make()
    finally:
        torch.set_default_dtype(before)
    if quantize:
        lf.quantize_(model, lf.NF4Config())
    return model.to(device).train()


def stepper(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Step:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    device = params[0].device.type

    def step() -> float:
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def theirs(config: lf.LlamaConfig, rank: int, dtype: torch.dtype, idx: Tensor) -> Step:
    import bitsandbytes as bnb
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        use_cache=False,
    )
    model = LlamaForCausalLM(theirs_config).to(dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=dtype
            )
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, new.to(idx.device))
    model = model.to(idx.device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, lora).train()

    def loss() -> Tensor:
        value: Tensor = tuned(input_ids=idx[:, :-1], labels=idx[:, :-1]).loss
        return value

    return stepper(tuned, loss, dtype)


KINDS: dict[str, Callable[[lf.LlamaConfig, int, torch.dtype, Tensor], Step]] = {
    "nf4": lambda *shape: ours(*shape, quantize=True),
    "dense": lambda *shape: ours(*shape, quantize=False),
    "peft": theirs,
}


if __name__ == "__main__":
    main()
