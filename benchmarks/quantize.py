"""How fast GGUF types are written, beside llama.cpp's own quantize in the same run, and whether the bytes are the same.

    python benchmarks/quantize.py --out /somewhere/with/4/GB

Two measurements:

    types    every type, 8 million weights in memory: ours (compiled, and plain torch) and ggml's function on as many threads,
             without and with an importance matrix; on a GPU too where there is one
    files    a file of Llama's 350M shape (normal weights), F32 and BF16, to Q4_K_M: `quantize_gguf` and `llama_model_quantize`,
             each in a process of its own, in turns; time without imports (the compilation of ours is in), and peak memory

Needs llama-cpp-python. Everything is deleted at the end.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import machine
import torch
from gguf import GGMLQuantizationType

from llmforge import BPETokenizer, LlamaConfig, export_gguf
from llmforge.formats.gguf import read_gguf_bytes, read_gguf_header
from llmforge.models import Llama
from llmforge.quant.ggml import block_shape, decode, encode, types

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
TYPES += ["TQ1_0", "TQ2_0", "MXFP4"]

OURS = """
import json, sys, time
import torch
from llmforge.convert import quantize_gguf
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(FIELD)) * 1024
FIELD = "VmHWM"
before = peak()
start = time.perf_counter()
quantize_gguf(sys.argv[1], sys.argv[2], file_type=sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak(), "imports_bytes": before}))
"""
THEIRS = """
import json, sys, time
import llama_cpp
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = {"Q4_K_M": 15, "Q8_0": 7, "Q6_K": 18}[sys.argv[3]], int(sys.argv[4])
start = time.perf_counter()
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params) == 0
print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak(), "imports_bytes": before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quantize-bench"), help="a new folder for 4 GB")
    parser.add_argument("--preset", default="llama-350m", help="of LlamaConfig; a smaller one to try the script")
    parser.add_argument("--rows", type=int, default=2048, help="of 4,096 weights, for the types")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    result = {
        **machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "types": measure_types(args.rows, args.repeat),
    }
    args.out.mkdir(parents=True)
    try:
        result["files"] = measure_files(args.out, args.preset, args.repeat)
    finally:
        shutil.rmtree(args.out)
    machine.write("quantize" + ("-cuda" if torch.cuda.is_available() else ""), result)


def measure_types(rows: int, repeat: int) -> dict[str, dict[str, float]]:
    """Million weights per second, medians over `repeat` turns."""
    weights = torch.randn(rows, 4096) * 0.02
    importance = torch.rand(4096)
    few = weights[: max(1, rows // 16)]
    n_threads = torch.get_num_threads()
    found = {}
    for name in TYPES:
        works: dict[str, tuple[Callable[[], object], int, int]] = {
            "llama_cpp": (lambda name=name: ggml(weights, name, None, n_threads), len(weights), 0),
            "compiled": (lambda name=name: encode(weights, name), len(weights), 0),
            "torch": (lambda name=name: encode(few, name), len(few), 1 << 60),
            "llama_cpp_importance": (lambda name=name: ggml(weights, name, importance, n_threads), len(weights), 0),
            "compiled_importance": (lambda name=name: encode(weights, name, importance=importance), len(weights), 0),
        }
        data = encode(weights, name)
        works["decode"] = (lambda name=name, data=data: decode(data, name), len(weights), 0)
        if torch.cuda.is_available():
            on_gpu = weights.repeat(4, 1).cuda()
            works["cuda"] = (
                lambda name=name, on_gpu=on_gpu: (encode(on_gpu, name), torch.cuda.synchronize()),
                len(on_gpu),
                0,
            )
        seconds: dict[str, list[float]] = {key: [] for key in works}
        for turn in range(repeat + 1):
            for key, (work, n_rows, compile_from) in works.items():
                types.COMPILE_FROM = compile_from
                start = time.perf_counter()
                work()
                if turn:  # the first one warms up
                    seconds[key].append((time.perf_counter() - start) / n_rows)
        speeds = {key: round(4096 / machine.spread(times)["median"] / 1e6, 1) for key, times in seconds.items()}
        equal = torch.equal(encode(weights, name), ggml(weights, name, None, n_threads))
        found[name] = {**speeds, "compiled_relative_to_llama_cpp": round(speeds["compiled"] / speeds["llama_cpp"], 2)}
        found[name]["bytes_equal"] = equal
        print(name, found[name], flush=True)
    return found


def ggml(weights: torch.Tensor, name: str, importance: torch.Tensor | None, n_threads: int) -> torch.Tensor:
    """ggml's own function, rows shared among threads as llama_model_quantize does."""
    file = next(
        f for f in Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.*") if f.suffix in (".so", ".dylib", ".dll")
    )
    function = ctypes.CDLL(str(file)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    block, block_bytes = block_shape(name)
    out = torch.empty(len(weights), weights.shape[1] // block * block_bytes, dtype=torch.uint8)
    pointer = importance.data_ptr() if importance is not None else None

    def work(start: int) -> None:
        piece = weights[start : start + 32]
        kind = int(GGMLQuantizationType[name])
        function(kind, piece.data_ptr(), out[start:].data_ptr(), 0, len(piece), weights.shape[1], pointer)

    with ThreadPoolExecutor(n_threads) as threads:
        list(threads.map(work, range(0, len(weights), 32)))
    return out


def measure_files(folder: Path, preset: str, repeat: int) -> dict[str, dict[str, object]]:
    """Seconds and peak bytes of whole files."""
    tokenizer = BPETokenizer.from_texts(["In a hole in the ground " * 9], vocab_size=300)
    model = Llama(LlamaConfig.preset(preset).replace(vocab_size=tokenizer.vocab_size))
    found: dict[str, dict[str, object]] = {}
    n_threads = torch.get_num_threads()
    for source_type in ("F32", "BF16"):
        source = folder / f"{source_type}.gguf"
        export_gguf(model, tokenizer, source, file_type=source_type)
        runs: dict[str, list[dict[str, float]]] = {"llmforge": [], "llama_cpp": []}
        for _ in range(repeat):
            runs["llmforge"].append(child(OURS, source, folder / "ours.gguf"))
            runs["llama_cpp"].append(child(THEIRS, source, folder / "theirs.gguf", str(n_threads)))
            print(source_type, runs["llmforge"][-1], runs["llama_cpp"][-1], flush=True)
        summary: dict[str, object] = {
            name: {
                "seconds": machine.spread([run["seconds"] for run in those]),
                "peak_bytes": int(max(run["peak_bytes"] for run in those)),
                "peak_bytes_beyond_imports": int(max(run["peak_bytes"] - run["imports_bytes"] for run in those)),
            }
            for name, those in runs.items()
        }
        medians = {name: machine.spread([run["seconds"] for run in those])["median"] for name, those in runs.items()}
        found[f"{source_type} to Q4_K_M"] = {
            "weights": sum(parameter.numel() for parameter in model.parameters()),
            "source_bytes": source.stat().st_size,
            "largest_tensor_bytes": max(p.numel() for p in model.parameters()) * 4,
            **summary,
            "speed_relative_to_llama_cpp": round(medians["llama_cpp"] / medians["llmforge"], 2),
            "tensors_equal": equal_tensors(folder / "ours.gguf", folder / "theirs.gguf"),
        }
        source.unlink()
    return found


def child(code: str, source: Path, target: Path, *more: str) -> dict[str, float]:
    """Run one of the programs above in a process of its own."""
    target.unlink(missing_ok=True)
    os.sync()
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(target), "Q4_K_M", *more],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"failed: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def equal_tensors(ours: Path, theirs: Path) -> str:
    """How many tensors have the same type and bytes in both files."""
    left, right = ({info.name: info for info in read_gguf_header(path).tensors} for path in (ours, theirs))
    assert left.keys() == right.keys()
    same = sum(
        left[name].type_name == right[name].type_name
        and torch.equal(read_gguf_bytes(ours, left[name]).read(), read_gguf_bytes(theirs, right[name]).read())
        for name in left
    )
    return f"{same} of {len(left)}"


if __name__ == "__main__":
    main()
