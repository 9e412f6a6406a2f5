"""NF4 beside bitsandbytes, in the same process and in turns, and a model of Llama-3-8B's shapes that is quantized while it loads.

    python benchmarks/nf4.py --out /somewhere/with/16/GB

Three measurements:

    matrices   one of bfloat16 weights: to NF4 with double quantization, back to bfloat16 and float32, and through a linear layer in
               bfloat16 (float32 on a CPU), forward and backward to the input; on the GPU where there is one. Codes and values are
               compared, too
    optimizer  a step of AdamW on as many float32 parameters: torch's, bitsandbytes' 8-bit one, ours
    loading    load(folder, dtype=bfloat16, quantize=NF4Config()) of a checkpoint in BF16 shards, in a process of its own, from files
               that are not in the page cache: time, and peak resident memory (VmHWM) beside the size of the model

Needs bitsandbytes. Everything is deleted at the end.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import machine
import stream_8b
import torch
from torch import nn

from llmforge.convert import load
from llmforge.finetune import NF4Config
from llmforge.nn import Linear4bit
from llmforge.quant.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4
from llmforge.training.adamw8bit import AdamW8bit

stream_8b.WORKS["nf4"] = """
from llmforge.finetune import NF4Config
model, _ = load(folder, dtype=torch.bfloat16, quantize=NF4Config())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("nf4-bench"), help="a new folder for the checkpoint")
    parser.add_argument("--preset", default="llama-3-8b", help="of LlamaConfig")
    parser.add_argument("--layers", type=int, help="fewer than the preset's")
    parser.add_argument("--size", type=int, default=4096, help="of the square matrix")
    parser.add_argument("--tokens", type=int, default=1024, help="through the linear layer")
    parser.add_argument("--repeat", type=int, default=15, help="turns; the checkpoint is loaded twice at most")
    parser.add_argument("--name", default="nf4", help="of the result")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        **machine.describe(device),
        "bitsandbytes": bitsandbytes.__version__,
        "matrices": measure_matrices(args.size, args.tokens, args.repeat, device),
        "optimizer": measure_optimizers(args.size, args.repeat, device),
    }
    args.out.mkdir(parents=True)
    try:
        result["loading"] = measure_loading(args.out, args.preset, args.layers, min(args.repeat, 2))
    finally:
        shutil.rmtree(args.out)
    machine.write(args.name + ("-cuda" if device.type == "cuda" else ""), result)


def in_turns(works: dict[str, Callable[[], object]], repeat: int, device: torch.device) -> dict[str, object]:
    """Milliseconds of each, and how much faster the first is than each other one."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeat + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first one warms up
                times[name].append(1000 * (time.perf_counter() - start))
    milliseconds = {name: machine.spread(values) for name, values in times.items()}
    first, *others = works
    ratios = {
        f"times_as_fast_as_{name}": round(milliseconds[name]["median"] / milliseconds[first]["median"], 3)
        for name in others
    }
    return {"milliseconds": milliseconds, **ratios}


def measure_matrices(size: int, tokens: int, repeat: int, device: torch.device) -> dict[str, object]:
    weight = (torch.randn(size, size, device=device) * 0.02).bfloat16()
    ours = quantize_nf4(weight)

    def their_quantize() -> tuple[torch.Tensor, bitsandbytes.functional.QuantState]:
        return bitsandbytes.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")

    codes, state = their_quantize()
    same_bytes = NF4Tensor(
        codes.view(-1), state.absmax, state.state2.absmax, state.offset, (size, size), state.blocksize
    )

    def their_values(dtype: torch.dtype) -> torch.Tensor:
        state.dtype = dtype
        return bitsandbytes.functional.dequantize_4bit(codes, state)

    def passes(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x.grad = None
        layer(x).sum().backward()
        return x

    found: dict[str, object] = {
        "weights": weight.numel(),
        "bytes_per_weight": round(ours.nbytes / weight.numel(), 4),
        "codes_that_differ": int((ours.codes != codes.view(-1)).sum()),
        "scale_codes_that_differ": int((ours.absmax != state.absmax).sum()),
        "quantize": in_turns(
            {"llmforge": lambda: quantize_nf4(weight), "bitsandbytes": their_quantize}, max(2, repeat // 3), device
        ),
    }
    for dtype in (torch.bfloat16, torch.float32):
        works: dict[str, Callable[[], object]] = {
            "llmforge": lambda dtype=dtype: dequantize_nf4(same_bytes, dtype=dtype, backend="torch"),
            "bitsandbytes": lambda dtype=dtype: their_values(dtype),
        }
        name = str(dtype).removeprefix("torch.")
        found[f"dequantize_to_{name}"] = {
            **in_turns(works, repeat, device),
            "values_equal": torch.equal(dequantize_nf4(same_bytes, dtype=dtype, backend="torch"), their_values(dtype)),
        }
    # Many CPUs multiply bfloat16 so slowly that nothing else would be seen.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    their_layer = bitsandbytes.nn.Linear4bit(size, size, bias=False, compute_dtype=dtype, quant_type="nf4")
    their_layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    their_layer.to(device)
    float_layer = nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)
    layer = Linear4bit.from_nf4(ours, None)
    x = torch.randn(tokens, size, device=device, dtype=dtype, requires_grad=True)
    found[f"linear_{tokens}_tokens_forward_and_backward"] = in_turns(
        {
            "llmforge": lambda: passes(layer, x),
            "bitsandbytes": lambda: passes(their_layer, x),
            "float_weights": lambda: passes(float_layer, x),
        },
        max(2, repeat // 3),
        device,
    )
    return found


def measure_optimizers(size: int, repeat: int, device: torch.device) -> dict[str, object]:
    parameters = [nn.Parameter(torch.randn(size // 16, size, device=device)) for _ in range(3)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    ours, theirs, torchs = parameters
    optimizers = {
        "llmforge": AdamW8bit([ours]),
        "bitsandbytes": bitsandbytes.optim.AdamW8bit([theirs]),
        "torch_adamw_fused": torch.optim.AdamW([torchs], fused=True),
    }
    works: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    return {"parameters": ours.numel(), **in_turns(works, max(2, repeat // 3), device)}


def measure_loading(out: Path, preset: str, layers: int | None, repeat: int) -> dict[str, object]:
    folder = out / "base"
    largest = stream_8b.make_checkpoint(folder, preset, layers=layers)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    model, _ = load(folder, device="meta", dtype=torch.bfloat16, quantize=NF4Config())
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    model_bytes = sum(t.nbytes for t in tensors)
    runs = [stream_8b.measure("nf4", folder, out / "nothing") for _ in range(repeat)]
    seconds = machine.spread([run["seconds"] for run in runs])
    peak, imports = (int(max(run[key] for run in runs)) for key in ("peak_bytes", "imports_bytes"))
    return {
        "preset": preset,
        "layers": layers,
        "checkpoint_bytes": total,
        "largest_tensor_bytes": largest,
        "model_bytes": model_bytes,
        "seconds": seconds,
        "megabytes_per_second": round(total / seconds["median"] / 1e6, 1),
        "peak_bytes": peak,
        "imports_bytes": imports,
        "peak_bytes_beyond_imports_and_model": peak - imports - model_bytes,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
