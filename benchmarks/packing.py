"""What packing, a loss in chunks and recomputation cost and save on this machine: seconds of a step, and bytes that live at once.

    python benchmarks/packing.py

Packing: forward and backward of a small Llama over 2,048 tokens of documents of a mean length, as one row (documents in a loop,
under a mask, and what the package chooses), and as rows of one document each, filled up to the longest. The loss in chunks: forward
and backward of output projection and cross-entropy against logits all at once, and a step of a whole model with either. Seconds
are those of the processor, on one thread, medians of runs in turns. Bytes are the largest sum of living tensors beyond the weights, counted under FakeTensorMode.
"""

import argparse
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llmforge as lf
from llmforge.nn import allocates_on_host, document_backend
from llmforge.training import next_token_loss
from llmforge.training.loss import chunked_cross_entropy, chunked_next_token_loss

SHAPE = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--documents", type=int, nargs="+", default=[8, 32, 128, 512], help="mean lengths in tokens")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--width", type=int, default=256, help="of the hidden states before the output projection")
    parser.add_argument("--layers", type=int, default=6, help="of the model whose activations are recomputed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", default="packing")
    args = parser.parse_args()
    torch.set_num_threads(1)  # seconds of the processor add up over threads
    torch.manual_seed(0)
    result = {
        **machine.describe(torch.device("cpu")),
        "dtype": "float32",
        "tokens": args.tokens,
        "attention": [packing(args.tokens, mean, args.repeats) for mean in args.documents],
        "loss": [loss(args.tokens // 4, vocab, args.width, args.repeats) for vocab in args.vocab],
        "step": [step(args.tokens // 2, vocab, args.repeats) for vocab in (args.vocab[0] // 4, args.vocab[0])],
        "recompute": recompute(args.tokens // 2, args.layers, args.repeats),
    }
    machine.write(args.name, result)


def packing(tokens: int, mean: int, repeats: int) -> dict[str, Any]:
    """A step over documents whose lengths spread as those of instructions do (log-normal)."""
    lengths: list[int] = []
    while sum(lengths) < tokens:
        length = int(torch.distributions.LogNormal(0.0, 0.7).sample() * mean / 1.28)  # 1.28 = exp(0.7 ** 2 / 2)
        lengths.append(max(2, min(length, tokens - sum(lengths))))
    if sum(lengths) > tokens:
        lengths[-1] -= sum(lengths) - tokens
    model = lf.Llama(lf.LlamaConfig(vocab_size=1024, max_position_embeddings=tokens, **SHAPE))
    idx = torch.randint(1024, (1, tokens))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    padded = pad_sequence(list(idx[0].split(lengths)), batch_first=True)

    def packed(backend: Any) -> Callable[[], None]:
        def run() -> None:
            with document_backend(backend) if backend is not None else nullcontext():
                model.features(idx, positions=positions).sum().backward()  # type: ignore[no-untyped-call]

        return run

    seconds = timed(
        {
            "loop": packed("loop"),
            "mask": packed("mask"),
            "chosen": packed(None),
            "padded": lambda: model.features(padded).sum().backward(),  # type: ignore[no-untyped-call]
        },
        repeats,
    )
    return {
        "mean_document_tokens": tokens / len(lengths),
        "documents": len(lengths),
        "longest": max(lengths),
        "padding_fraction": 1 - tokens / padded.numel(),
        "seconds": seconds,
    }


def loss(tokens: int, vocab: int, width: int, repeats: int) -> dict[str, Any]:
    """Cross-entropy of all positions, with a head that trains and one that does not."""
    rows: dict[str, Any] = {"vocab_size": vocab, "width": width, "tokens": tokens, "logits_bytes": 4 * tokens * vocab}
    runs = {"whole": whole, "chunked": chunks(None), "chunks_of_64": chunks(64)}

    def make(trains: bool) -> tuple[Tensor, nn.Linear, Tensor]:
        head = nn.Linear(width, vocab, bias=False).requires_grad_(trains)
        return torch.randn(tokens, width, requires_grad=True), head, torch.randint(vocab, (tokens,))

    for name, trains in (("head_trains", True), ("head_frozen", False)):
        args = make(trains)
        rows[name] = {
            "seconds": timed({key: partial(run, *args) for key, run in runs.items()}, repeats),
            "peak_bytes": {key: peak(partial(make, trains), run) for key, run in runs.items()},
        }
    return rows


def whole(hidden: Tensor, head: nn.Linear, targets: Tensor) -> None:
    F.cross_entropy(head(hidden).float(), targets, reduction="sum").backward()  # type: ignore[no-untyped-call]


def chunks(chunk_tokens: int | None) -> Callable[[Tensor, nn.Linear, Tensor], None]:
    def run(hidden: Tensor, head: nn.Linear, targets: Tensor) -> None:
        chunked_cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens).backward()  # type: ignore[no-untyped-call]

    return run


def step(tokens: int, vocab: int, repeats: int) -> dict[str, Any]:
    """A step of a whole model from scratch, every position a target: what a Trainer would gain or lose."""

    T = min(256, tokens)

    def make() -> tuple[lf.Llama, tuple[Tensor, Tensor]]:
        model = lf.Llama(lf.LlamaConfig(vocab_size=vocab, max_position_embeddings=T, **SHAPE))
        idx, targets = torch.randint(vocab, (2, tokens // T, T))
        return model, (idx, targets)

    def run_with(loss_fn: Any) -> Callable[[lf.Llama, Sequence[Tensor]], None]:
        return lambda model, batch: loss_fn(model, batch)[0].backward()

    def in_chunks(
        model: lf.Llama, batch: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:  # without shapes that depend on data
        hidden = model.features(batch[0]).flatten(0, 1)
        return chunked_cross_entropy(hidden, model.lm_head, batch[1].flatten()), torch.tensor(0)

    runs = {"whole": run_with(next_token_loss), "chunked": run_with(chunked_next_token_loss)}
    model, batch = make()
    return {
        "vocab_size": vocab,
        "tokens": tokens,
        "seconds": timed({key: partial(run, model, batch) for key, run in runs.items()}, repeats),
        "peak_bytes": {"whole": peak(make, runs["whole"]), "chunked": peak(make, run_with(in_chunks))},
    }


def recompute(tokens: int, layers: int, repeats: int) -> list[dict[str, Any]]:
    """A step of a frozen model with trained norms, as adapters train: activations kept, recomputed, offloaded, in tiles."""
    shape = {**SHAPE, "num_hidden_layers": layers, "intermediate_size": 1024}
    settings = [("none", 1), ("none", 4), ("blocks", 1), ("blocks", 4), ("offload", 1), ("offload", 4)]

    def make(mode: Any, tiles: int) -> tuple[lf.Llama, Tensor]:
        model = lf.Llama(lf.LlamaConfig(vocab_size=64, max_position_embeddings=tokens, **shape)).train()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        model.set_activation_checkpointing(mode)
        model.set_mlp_tiles(tiles)
        return model, torch.zeros(1, tokens, dtype=torch.long)

    def run(model: lf.Llama, idx: Tensor) -> None:
        model.features(idx).sum().backward()  # type: ignore[no-untyped-call]

    made = {pair: make(*pair) for pair in settings}
    seconds = timed(
        {f"{mode} {tiles}": lambda pair=(mode, tiles): run(*made[pair]) for mode, tiles in settings}, repeats
    )
    return [
        {
            "checkpointing": mode,
            "mlp_tiles": tiles,
            "seconds": seconds[f"{mode} {tiles}"],
            "peak_bytes": peak(partial(make, mode, tiles), run),
        }
        for mode, tiles in settings
    ]


def timed(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, Any]:
    """Spread of each one's seconds, measured in turns; a first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat:
                seconds[name].append(time.process_time() - start)
    return {name: machine.spread(values) for name, values in seconds.items()}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make, as long as they live; what was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, 0 if allocates_on_host() else storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak(make: Callable[[], Any], run: Callable[..., None]) -> int:
    with FakeTensorMode():
        args = make()
        with LiveBytes() as live:
            run(*args)
    return live.peak


if __name__ == "__main__":
    main()
