"""Text to ids on disk: MB/s and peak memory, beside the tokenizers library's own batch encoding and nanoGPT's way, in the same run.

python benchmarks/data_preparation.py quijote.txt shakespeare.txt wikitext.txt --megabytes 100

The text is made of paragraphs of the files given, in random order, with single words exchanged for others, so that nothing repeats as
a whole. Each way runs in a process of its own, in turns; its peak memory is that of the process and all that it starts.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import psutil
import torch

import llmforge as lf
from llmforge.data import token_file
from llmforge.tokenizers import fast_bpe, load_tokenizer

WAYS = {
    "library encode_batch": "tokenizers.Tokenizer.encode_batch on the paragraphs, all in memory, its own threads, ids thrown away",
    "library encode_batch_fast": "the same without offsets",
    "bpe text": "TokenDataset.from_sources, one .txt",
    "bpe jsonl": "TokenDataset.from_sources, a record per paragraph",
    "bpe text, library": "the same .txt without llmforge's fast way: what tokenizers it does not know take",
    "bpe jsonl, near-duplicates": "with drop_near_duplicates",
    "char text": "TokenDataset.from_sources with a CharTokenizer",
    "nanogpt": "datasets.map(num_proc) with tiktoken, then a memmap: nanoGPT's data/openwebtext/prepare.py, on the same jsonl and vocabulary",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="UTF-8 text files to make the text of")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--vocab-size", type=int, default=8_192)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a process that measures one
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        measure(args.way, Path(args.folder))
        return
    folder = Path(tempfile.mkdtemp(prefix="data-preparation-"))
    try:
        make_text([Path(text) for text in args.texts], folder, int(args.megabytes * 1e6))
        sample = (folder / "text.txt").read_bytes()[:8_000_000].decode(errors="ignore")
        lf.BPETokenizer.from_texts([sample], vocab_size=args.vocab_size).save(folder / "bpe")
        lf.CharTokenizer.from_text_file(folder / "text.txt").save(folder / "char")
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
        for _ in range(args.repeats):
            for way in args.ways:
                command = [sys.executable, __file__, *args.texts, "--way", way, "--folder", str(folder)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    print(f"{way}: not measured", file=sys.stderr)
                else:
                    found[way].append(json.loads(done.stdout.splitlines()[-1]))
        report(args, folder, {way: runs for way, runs in found.items() if runs})
    finally:
        shutil.rmtree(folder)


def make_text(texts: list[Path], folder: Path, size: int) -> None:
    """text.txt, and text.jsonl with the same paragraphs as records."""
    whole = [text.read_text(encoding="utf-8") for text in texts]
    paragraphs = [part for text in whole for part in text.replace("\n \n", "\n\n").split("\n\n") if part.strip()]
    words = [word for text in whole for word in text.split()]
    choose, written = random.Random(0), 0
    with (
        open(folder / "text.txt", "w", encoding="utf-8", newline="\n") as text_file,
        open(folder / "text.jsonl", "w", encoding="utf-8", newline="\n") as records,
    ):
        while written < size:
            part = choose.choice(paragraphs).split(" ")
            for _ in range(1 + len(part) // 20):
                part[choose.randrange(len(part))] = choose.choice(words)
            paragraph = " ".join(part)
            written += len(paragraph.encode()) + 2
            text_file.write(f"{paragraph}\n\n")
            records.write(json.dumps({"text": paragraph}, ensure_ascii=False) + "\n")


def measure(way: str, folder: Path) -> None:
    """Run one way once, and print what it took as JSON."""
    text = folder / "text.txt"
    cache = Path(tempfile.mkdtemp(dir=folder))
    tokenizer = load_tokenizer(folder / ("char" if way.startswith("char") else "bpe"))
    assert tokenizer is not None
    source = folder / ("text.jsonl" if "jsonl" in way or way == "nanogpt" else "text.txt")
    run: Callable[[], int]
    if way.startswith("library"):
        paragraphs = [part for part in text.read_text(encoding="utf-8").split("\n\n") if part]
        backend = tokenizer._backend  # type: ignore[attr-defined]
        encode = backend.encode_batch if way == "library encode_batch" else backend.encode_batch_fast

        def run() -> int:
            return sum(len(encoding) for encoding in encode(paragraphs, add_special_tokens=False))

    elif way == "nanogpt":
        run = nanogpt_way(source, tokenizer, cache)
    else:
        if way == "bpe text, library":
            type(tokenizer)._fast = None  # type: ignore[attr-defined]

        def run() -> int:
            data = lf.TokenDataset.from_sources(source, tokenizer, cache_dir=cache, drop_near_duplicates="near" in way)
            return len(data)

    with PeakMemory() as memory:
        start, cpu = time.perf_counter(), cpu_seconds()
        tokens = run()
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": tokens,
        "peak_bytes": memory.peak,
        "before_bytes": memory.before,
    }
    print(json.dumps(result))


def nanogpt_way(source: Path, tokenizer: Any, cache: Path) -> Callable[[], int]:
    import datasets

    datasets.disable_progress_bars()
    fast = tokenizer._fast
    encoding, ids, eos = fast._encoding, fast._ids, tokenizer.eos_token_id

    def process(example: dict[str, Any]) -> dict[str, Any]:
        row = [*ids[encoding.encode_ordinary(example["text"])].tolist(), eos]
        return {"ids": row, "len": len(row)}

    def run() -> int:
        loaded = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(cache))
        tokenized = loaded.map(process, remove_columns=["text"], num_proc=fast_bpe.num_threads())
        total = int(np.sum(tokenized["len"][:], dtype=np.uint64))
        array = np.memmap(cache / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
        at, shards = 0, max(1, min(1024, len(tokenized) // 1000))
        for i in range(shards):
            shard = tokenized.shard(num_shards=shards, index=i, contiguous=True).with_format("numpy")
            batch = np.concatenate(shard["ids"][:])
            array[at : at + len(batch)] = batch
            at += len(batch)
        array.flush()
        return total

    return run


def cpu_seconds() -> float:
    """Of this process and the ended ones that it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class PeakMemory:
    """The largest memory of this process and all below it, of its own (Linux: without pages of mapped files), looked at 20 times a second."""

    def __enter__(self) -> "PeakMemory":
        self._process, self._end = psutil.Process(), threading.Event()
        self.before = self.peak = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        total = 0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                memory = process.memory_info()
            except psutil.Error:  # it has ended
                continue
            total += memory.rss - getattr(memory, "shared", 0)
        return total


def report(args: argparse.Namespace, folder: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    size = {suffix: (folder / f"text.{suffix}").stat().st_size for suffix in ("txt", "jsonl")}
    ways = {}
    for way, runs in found.items():
        ways[way] = {
            "what": WAYS[way],
            "megabytes_per_second": machine.spread([size["txt"] / 1e6 / run["seconds"] for run in runs]),
            "megabytes_per_cpu_second": machine.spread(
                [size["txt"] / 1e6 / max(run["cpu_seconds"], 0.01) for run in runs]  # what the clock can tell
            ),
            "tokens": runs[0]["tokens"],
            "peak_mebibytes": max(run["peak_bytes"] for run in runs) / 2**20,
            "of_that_before_mebibytes": max(run["before_bytes"] for run in runs) / 2**20,
        }
    libraries = [ways[way]["megabytes_per_second"]["median"] for way in ways if way.startswith("library")]
    for way in ways.values() if libraries else []:
        way["ratio_to_the_faster_library_call"] = way["megabytes_per_second"]["median"] / max(libraries)
    machine.write(
        "data-preparation",
        {
            **machine.describe(torch.device("cpu")),
            "cores": fast_bpe.num_threads(),
            "text_bytes": size["txt"],
            "jsonl_bytes": size["jsonl"],
            "vocab_size": args.vocab_size,
            "part_chars": token_file.PART_CHARS,
            "ways": ways,
        },
    )


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
