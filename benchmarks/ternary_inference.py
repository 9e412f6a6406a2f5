"""How fast ternary models run in torch on the CPU: packed (`pack_`), as they train, and their float twins, in turns.

    python benchmarks/ternary_inference.py

    float32, bfloat16   the twin, a Llama of the same shape
    bitnet              BitNet as it trains, its weights rounded once per text
    packed              the same after pack_

One text at a time, random weights, which make no difference to the speed. Tokens per second; what is relative is the median of the
ratios within a turn, so that what else runs on the machine matters less.
"""

import argparse
import copy
import statistics
import time
from itertools import pairwise
from typing import Any

import machine
import torch

from llmforge.models import BitNet, BitNetConfig, Llama
from llmforge.nn import KVCache, bit_linears, constant_weights, pack_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["bitnet-15m", "bitnet-110m"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompt", type=int, default=192, help="tokens")
    parser.add_argument("--tokens", type=int, default=24, help="generated after it")
    parser.add_argument("--repeat", type=int, default=7, help="turns")
    args = parser.parse_args()
    result = {**machine.describe(torch.device("cpu")), "prompt_tokens": args.prompt, "new_tokens": args.tokens}
    result["runs"] = []
    for preset in args.presets:
        models, weight_bytes = build(preset)
        for n_threads in args.threads:
            torch.set_num_threads(n_threads)
            run = {"preset": preset, "threads": n_threads, "weight_bytes": weight_bytes}
            result["runs"].append({**run, **measure(models, args.prompt, args.tokens, args.repeat)})
            print(result["runs"][-1], flush=True)
    machine.write("ternary-inference", result)


def build(preset: str) -> tuple[dict[str, torch.nn.Module], dict[str, int]]:
    """The models, and the bytes of their weights in memory while they generate."""
    torch.manual_seed(0)
    config = BitNetConfig.preset(preset)
    models: dict[str, Any] = {"float32": Llama(config.float_twin()), "bitnet": BitNet(config)}
    models["bfloat16"] = copy.deepcopy(models["float32"]).bfloat16()
    models["packed"] = copy.deepcopy(models["bitnet"])
    pack_(models["packed"])
    weight_bytes = {name: sum(t.nbytes for t in tensors(model)) for name, model in models.items()}
    weight_bytes["bitnet"] += sum(layer.weight.nbytes for layer in bit_linears(models["bitnet"]).values())  # rounded
    return {name: model.eval() for name, model in models.items()}, weight_bytes


def tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def measure(models: dict[str, torch.nn.Module], prompt: int, new_tokens: int, repeat: int) -> dict[str, Any]:
    speeds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in models} for what in ("prefill", "decode")}
    kept = {name: constant_weights() for name in models}
    for turn in range(repeat + 1):
        for name, model in models.items():
            with kept[name]:
                seconds = generate(model, prompt, new_tokens)
            for what, speed in zip(speeds, seconds, strict=True):
                if turn:  # the first one warms up
                    speeds[what][name].append(speed)
    return {
        what: {
            name: {
                "tokens_per_second": {key: round(value, 1) for key, value in machine.spread(found[name]).items()},
                "relative_to_float32": round(
                    statistics.median(a / b for a, b in zip(found[name], found["float32"], strict=True)), 2
                ),
            }
            for name in models
        }
        for what, found in speeds.items()
    }


@torch.no_grad()
def generate(model: Any, prompt: int, new_tokens: int) -> tuple[float, float]:
    """Tokens per second of reading a prompt, and of each token after it, the median."""
    idx = torch.randint(
        0, model.config.vocab_size, (1, prompt + new_tokens), generator=torch.Generator().manual_seed(0)
    )
    cache, times = KVCache(prompt + new_tokens), [time.perf_counter()]
    for part in (idx[:, :prompt], *idx[:, prompt:].split(1, dim=1)):
        model.lm_head(model.features(part, cache)[:, -1])
        times.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(times[1:])]
    return prompt / (times[1] - times[0]), 1 / statistics.median(steps)


if __name__ == "__main__":
    main()
