"""Size and speed in llama.cpp: a ternary model beside its float twin in 4 and 16 bits, in the same run, in turns.

    python benchmarks/ternary_decode.py --preset bitnet-42m

Weights are random: neither size nor speed depends on them. Needs llama-cpp-python (llmforge[verify]).
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch

import llmforge as lf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bitnet-42m")
    parser.add_argument("--text", help="for the vocabulary of the preset's size, else one of random words")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", default="ternary-decode")
    args = parser.parse_args()
    import llama_cpp

    config = lf.BitNetConfig.preset(args.preset)
    if args.text:
        tokenizer = lf.BPETokenizer.from_text_file(args.text, vocab_size=config.vocab_size)
    else:
        words = torch.randint(0, 26, (60_000, 7), generator=torch.Generator().manual_seed(0)).tolist()
        text = " ".join("".join(chr(97 + letter) for letter in word) for word in words)
        tokenizer = lf.BPETokenizer.from_texts([text], vocab_size=config.vocab_size)
    config = config.replace(vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    ternary, twin = lf.BitNet(config), lf.Llama(config.float_twin())
    result: dict[str, Any] = {
        **machine.describe(torch.device("cpu")),
        "llama_cpp_python": llama_cpp.__version__,
        "preset": args.preset,
        "parameters": ternary.num_params(),
        "vocabulary": tokenizer.vocab_size,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, model, file_type in [
            ("ternary TQ2_0", ternary, "TQ2_0"),
            ("ternary TQ1_0", ternary, "TQ1_0"),
            ("twin Q4_K_M", twin, "Q4_K_M"),
            ("twin Q8_0", twin, "Q8_0"),
            ("twin F16", twin, "F16"),
        ]:
            files[name] = Path(folder) / f"{name}.gguf"
            report = lf.export_gguf(model, tokenizer, files[name], file_type=file_type)
            result["rows"].append({"model": name, "bytes": report.bytes, "bits_per_weight": report.bits_per_weight})
        ids = torch.randint(tokenizer.vocab_size - 1, (args.prompt_tokens,)).tolist()
        for threads in args.threads:
            n_ctx = args.prompt_tokens + args.decode_tokens
            options = dict(n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False)
            models = {name: llama_cpp.Llama(str(path), **options) for name, path in files.items()}
            prefill: dict[str, list[float]] = {name: [] for name in models}
            decode: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(args.repeats):
                for name, llama in models.items():
                    llama.reset()
                    start = time.perf_counter()
                    llama.eval(ids)
                    middle = time.perf_counter()
                    for token in ids[: args.decode_tokens]:
                        llama.eval([token])
                    prefill[name].append(args.prompt_tokens / (middle - start))
                    decode[name].append(args.decode_tokens / (time.perf_counter() - middle))
            for row in result["rows"]:
                row[f"prefill_tokens_per_second_{threads}_threads"] = machine.spread(prefill[row["model"]])
                row[f"decode_tokens_per_second_{threads}_threads"] = machine.spread(decode[row["model"]])
    machine.write(args.name, result)


if __name__ == "__main__":
    main()
