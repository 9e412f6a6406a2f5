"""What rounding costs while training: a step of a BitNet against a step of its float twin, in the same run, in turns.

    python benchmarks/ternary_training.py

Forward, backward and AdamW step of the preset's shape; eager and compiled; without and with gradient accumulation, over whose
micro-steps the weights are rounded once (in eager mode; compiled code rounds them each time, fused). Ratios are of medians.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
import torch.nn.functional as F

import llmforge as lf
from llmforge.nn import constant_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bitnet-15m")
    parser.add_argument("--tokens", type=int, default=2048, help="per micro-step")
    parser.add_argument("--accum", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--act-quant", nargs="+", default=["token", "group"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="ternary-training")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = lf.BitNetConfig.preset(args.preset)
    result: dict[str, Any] = {
        **machine.describe(device),
        "preset": args.preset,
        "dtype": "float32",
        "tokens_per_micro_step": args.tokens,
        "rows": [],
    }
    for mode in args.modes:
        for accum in args.accum:
            steps = {"float": stepper(lf.Llama(config.float_twin()), mode, accum, args.tokens, device)}
            for act_quant in args.act_quant:
                model = lf.BitNet(config.replace(act_quant=act_quant))
                steps[act_quant] = stepper(model, mode, accum, args.tokens, device)
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for repeat in range(args.repeats + 2):
                for name, step in steps.items():
                    start = time.perf_counter()
                    step()
                    if repeat >= 2:  # the first ones compile, and find their memory
                        seconds[name].append(time.perf_counter() - start)
            floats = machine.spread(seconds["float"])
            for name in args.act_quant:
                spread = machine.spread(seconds[name])
                row = {
                    "mode": mode,
                    "grad_accum_steps": accum,
                    "act_quant": name,
                    "ratio": spread["median"] / floats["median"],
                }
                result["rows"].append({**row, "seconds": spread, "float_seconds": floats})
    machine.write(args.name, result)


def stepper(model: lf.Llama, mode: str, accum: int, tokens: int, device: torch.device) -> Callable[[], None]:
    """A function that does one optimizer step."""
    model = model.to(device).train()
    if mode == "compiled":
        model.compile(dynamic=False)
    length = min(model.context_length, tokens)
    idx = torch.randint(model.config.vocab_size, (accum, tokens // length, length), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with constant_weights():
            for micro in idx:
                F.cross_entropy(model(micro).flatten(0, 1), micro.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


if __name__ == "__main__":
    main()
