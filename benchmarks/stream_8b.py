"""A checkpoint of Llama-3-8B's exact shapes (16 GB of BF16 shards): from folder to GGUF, in how much memory and how fast.

    python benchmarks/stream_8b.py --out /somewhere/with/35/GB

Makes the checkpoint (values of a normal distribution, not a model), and measures each of these in a process of its own: peak
resident memory (VmHWM, file mappings included) and time.

    copy     a plain copy of the shards, read and written 16 MB at a time, with fsync: what the disk can do
    meta     load(folder, device="meta"): everything is checked, nothing is read
    gguf     llmforge export folder --gguf FILE --file-type BF16
    hf       llmforge export folder --hf FOLDER, as it is
    load     load(folder, dtype=bfloat16) (only with --load: needs 17 GB of memory)

Before each, the page cache is dropped for the checkpoint's files where the system can. Everything is deleted at the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import machine
import torch

from llmforge import BPETokenizer, LlamaConfig
from llmforge.formats.lazy import LazyTensor
from llmforge.formats.safetensors import write_safetensors
from llmforge.models import Llama

CHUNK = 1 << 24

# Run as `python -c`: imports, then the work, then what it took.
CHILD = """
import json, sys, time
from pathlib import Path
import torch
folder, target = Path(sys.argv[1]), Path(sys.argv[2])
from llmforge.convert import export_gguf, export_hf, load
idle = {line.split()[0]: int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")}["VmHWM:"]
start, cpu = time.perf_counter(), time.process_time()
WORK
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
peak = {line.split()[0]: int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")}["VmHWM:"]
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak * 1024, "imports_bytes": idle * 1024}))
"""
WORKS = {
    "copy": """
import os
target.mkdir()
for file in sorted(folder.glob("*.safetensors")):
    with file.open("rb") as source, (target / file.name).open("wb") as out:
        while chunk := source.read(1 << 24):
            out.write(chunk)
        os.fsync(out.fileno())
""",
    "meta": 'load(folder, device="meta")',
    "gguf": 'export_gguf(folder, None, target / "m.gguf", file_type="BF16")',
    "hf": "export_hf(folder, None, target)",
    "load": "model, _ = load(folder, dtype=torch.bfloat16)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("stream-8b"), help="a new folder for 35 GB")
    parser.add_argument("--preset", default="llama-3-8b", help="of LlamaConfig; a smaller one to try the script")
    parser.add_argument("--layers", type=int, help="fewer than the preset's, to try the script: the result is not kept")
    parser.add_argument("--load", action="store_true", help="also load the model on the CPU in bfloat16")
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    try:
        folder = args.out / "base"
        largest = make_checkpoint(folder, args.preset, layers=args.layers)
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        names = ["copy", "meta", "gguf", "hf", *(["load"] if args.load else [])]
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(args.repeat):
            for name in names:
                results[name].append(measure(name, folder, args.out / name))
                print(name, results[name][-1], flush=True)
        summary = {}
        for name, runs in results.items():
            seconds, peak = machine.spread([run["seconds"] for run in runs]), max(run["peak_bytes"] for run in runs)
            imports = max(run["imports_bytes"] for run in runs)
            summary[name] = {
                "seconds": seconds,
                "peak_bytes": int(peak),
                "peak_bytes_beyond_imports": int(peak - imports),
            }
            if name != "meta":
                summary[name]["megabytes_per_second"] = round(total / seconds["median"] / 1e6, 1)
        copy = summary["copy"]["seconds"]["median"]
        for name in ("gguf", "hf"):
            summary[name]["time_relative_to_copy"] = round(summary[name]["seconds"]["median"] / copy, 3)
        if args.layers is not None:
            return
        machine.write(
            f"stream-{args.preset}",
            {
                **machine.describe(torch.device("cpu")),
                "checkpoint_bytes": total,
                "largest_tensor_bytes": largest,
                "results": summary,
                "runs": results,
            },
        )
    finally:
        shutil.rmtree(args.out)


def make_checkpoint(folder: Path, preset: str, *, layers: int | None = None) -> int:
    """Write the shards, config.json and a tokenizer; returns the bytes of the largest tensor."""
    folder.mkdir()
    tokenizer = BPETokenizer.from_texts(["In a hole in the ground " * 9], vocab_size=300)
    config = LlamaConfig.preset(preset)
    if layers is not None:
        config = config.replace(num_hidden_layers=layers)
    with torch.device("meta"):
        model = Llama(config)
    block = torch.randn(1 << 22).bfloat16() * 0.02

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        numel = int(torch.tensor(shape).prod())
        return block.repeat(-(-numel // len(block)))[:numel].view(shape)

    tensors = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        tensors[name] = LazyTensor(shape, torch.bfloat16, lambda shape=shape: values(shape))
    write_safetensors(folder, tensors)
    theirs = {
        key: value for key, value in config.to_dict().items() if key not in ("qkv_bias", "qk_norm", "sliding_window")
    }
    theirs.pop("max_window_layers")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **theirs}), encoding="utf-8")
    # The vocabulary is padded with names, as a tokenizer of another size would be refused.
    pad_vocabulary(tokenizer, folder, config.vocab_size)
    return max(tensor.nbytes for tensor in tensors.values())


def pad_vocabulary(tokenizer: BPETokenizer, folder: Path, size: int) -> None:
    tokenizer.save(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    for i in range(tokenizer.vocab_size, size):
        vocabulary[f"padding{i}"] = i
    path.write_text(json.dumps(content), encoding="utf-8")


def measure(name: str, folder: Path, target: Path) -> dict[str, float]:
    """Run one of WORKS in a process of its own, on files that are not in the page cache."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    code = CHILD.replace("WORK", WORKS[name])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
    shutil.rmtree(target, ignore_errors=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    time.sleep(1)
    return result


if __name__ == "__main__":
    main()
