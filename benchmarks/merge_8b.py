"""An adapter into a checkpoint of Llama-3-8B's exact shapes (16 GB of BF16 shards): in how much memory and how fast.

    python benchmarks/merge_8b.py --out /somewhere/with/40/GB

Makes the checkpoint (values of a normal distribution, not a model) and an adapter of rank 32 on all linear layers that says it was
trained beside 4 bits, and measures each of these in a process of its own: peak resident memory (VmHWM, file mappings included) and
time.

    copy            a plain copy of the shards, read and written 16 MB at a time, with fsync: what the disk can do
    hf-original     llmforge merge base adapter --out FOLDER --merge-base original
    hf-nf4          the same onto the base rounded to NF4, as in training
    q4-original     llmforge export base --adapter adapter --gguf FILE --file-type Q4_K_M --merge-base original
    q4-nf4          the same onto the base rounded to NF4

Before each, the page cache is dropped for the input files where the system can. Everything is deleted at the end.
"""

import argparse
import json
import shutil
from pathlib import Path

import machine
import stream_8b
import torch

from llmforge import LlamaConfig
from llmforge.finetune.quantize import NF4Config, quantizable
from llmforge.formats.lazy import LazyTensor
from llmforge.formats.safetensors import write_safetensors
from llmforge.models import Llama

_HF = 'export_hf(open_model(folder, adapter=folder.parent / "adapter", merge_base="{}")[0], None, target)'
_Q4 = 'export_gguf(*open_model(folder, adapter=folder.parent / "adapter", merge_base="{}"), target / "m.gguf", file_type="Q4_K_M")'
WORKS = {
    "copy": stream_8b.WORKS["copy"],
    "hf-original": _HF.format("original"),
    "hf-nf4": _HF.format("nf4"),
    "q4-original": _Q4.format("original"),
    "q4-nf4": _Q4.format("nf4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("merge-8b"), help="a new folder for 40 GB")
    parser.add_argument("--preset", default="llama-3-8b", help="of LlamaConfig; a smaller one to try the script")
    parser.add_argument("--layers", type=int, help="fewer than the preset's, to try the script: the result is not kept")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    stream_8b.WORKS.update(WORKS)
    stream_8b.CHILD = stream_8b.CHILD.replace("export_hf, load", "export_hf, open_model")
    args.out.mkdir(parents=True)
    try:
        folder = args.out / "base"
        largest = stream_8b.make_checkpoint(folder, args.preset, layers=args.layers)
        adapter_bytes = make_adapter(args.out / "adapter", args.preset, layers=args.layers)
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        results: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
        for _ in range(args.repeat):
            for name in args.only:
                results[name].append(stream_8b.measure(name, folder, args.out / name))
                print(name, results[name][-1], flush=True)
        if args.layers is not None:
            return
        summary = {}
        for name, runs in results.items():
            seconds, peak = machine.spread([run["seconds"] for run in runs]), max(run["peak_bytes"] for run in runs)
            summary[name] = {
                "seconds": seconds,
                "cpu_seconds": machine.spread(
                    [run["cpu_seconds"] for run in runs]
                ),  # of all threads, whatever else runs
                "peak_bytes": int(peak),
                "peak_bytes_beyond_imports": int(peak - max(run["imports_bytes"] for run in runs)),
                "megabytes_per_second": round(total / seconds["median"] / 1e6, 1),
            }
        machine.write(
            f"merge-{args.preset}",
            {
                **machine.describe(torch.device("cpu")),
                "checkpoint_bytes": total,
                "adapter_bytes": adapter_bytes,
                "largest_tensor_bytes": largest,
                "results": summary,
                "runs": results,
            },
        )
    finally:
        shutil.rmtree(args.out)


def make_adapter(folder: Path, preset: str, *, layers: int | None, r: int = 32) -> int:
    """Write an adapter of all linear layers, with the base.json of a QLoRA; returns the bytes of its weights."""
    folder.mkdir()
    config = LlamaConfig.preset(preset)
    if layers is not None:
        config = config.replace(num_hidden_layers=layers)
    with torch.device("meta"):
        linears = quantizable(Llama(config), NF4Config())
    tensors = {}
    for name, linear in linears.items():
        for part, shape in (("A", (r, linear.in_features)), ("B", (linear.out_features, r))):
            values = LazyTensor(shape, torch.float32, lambda shape=shape: torch.randn(shape) * 0.01)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    write_safetensors(folder, tensors, max_shard_bytes=None)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    names = sorted({name.rpartition(".")[2] for name in linears})
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    rounding = {"nf4": NF4Config().to_dict(), "modules": list(linears)}
    base = {"base_model": "../base", "rounding": rounding}
    (folder / "base.json").write_text(json.dumps(base), encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors.values())


if __name__ == "__main__":
    main()
