"""A Llama and a GPT of the same size, trained from scratch on the same tokens in the same order: curves, speed, samples.

    python benchmarks/llama_vs_gpt.py quijote.txt --out runs/compare

About 15 million parameters each: the preset llama-15m (4 layers, 512 wide, 8 heads over 4) and a GPT of 4 layers, 480 wide and 8
heads, without biases. Vocabulary: a BPE of 8,192 tokens trained on the text. Both see the same batches with the same learning rates.
`--model llama` and `--model gpt` train one of them, so that two processes can share a machine; the result is written when both
runs are complete. A run that was stopped goes on.
"""

import argparse
from pathlib import Path
from typing import Any

import machine
import torch

from llmforge import (
    GPT,
    BPETokenizer,
    GPTConfig,
    Llama,
    LlamaConfig,
    TokenDataset,
    TrainConfig,
    Trainer,
    generate_text,
    load,
)
from llmforge.training import read_log

MODELS = ("llama", "gpt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="UTF-8 text file")
    parser.add_argument("--out", type=Path, default=Path("runs/llama-vs-gpt"))
    parser.add_argument("--model", choices=MODELS, help="train only this one")
    parser.add_argument("--steps", type=int, default=1_200)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=8_192)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, help="of torch; one each lets both run side by side")
    parser.add_argument("--prompt", default="En un lugar de la Mancha")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tokenizer = BPETokenizer.from_text_file(args.text, vocab_size=args.vocab_size)
    train_data, val_data = TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.05)
    for name in MODELS if args.model is None else [args.model]:
        torch.manual_seed(0)
        model = new_model(name, tokenizer.vocab_size, args.seq_len)
        config = TrainConfig(
            max_steps=args.steps,
            micro_batch_size=args.micro_batch_size,
            seq_len=args.seq_len,
            lr=args.lr,
            betas=(0.9, 0.99),
            eval_every_steps=100,
            eval_batches=None,
            sample_every_steps=None,
            save_every_steps=100,
            out_dir=str(args.out / name),
        )
        trainer = Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config)
        trainer.resume()
        trainer.train()
    results = {name: summary(args.out / name, args.steps, args.prompt) for name in MODELS}
    if None in results.values():
        print("the other run is not complete yet; no result")
        return
    machine.write(
        "llama-vs-gpt",
        {
            **machine.describe(torch.device("cpu")),
            "text": Path(args.text).name,
            "train_tokens": len(train_data),
            "tokens_seen": args.steps * args.micro_batch_size * args.seq_len,
            "steps": args.steps,
            "models": results,
        },
    )


def new_model(name: str, vocab_size: int, seq_len: int) -> torch.nn.Module:
    if name == "llama":
        return Llama(LlamaConfig.preset("llama-15m", vocab_size=vocab_size, max_position_embeddings=seq_len))
    return GPT(GPTConfig(vocab_size=vocab_size, block_size=seq_len, n_layer=4, n_head=8, n_embd=480, bias=False))


def summary(run: Path, steps: int, prompt: str) -> dict[str, Any] | None:
    """What a complete run has learned; None while it is not complete."""
    if not (run / f"step-{steps:06d}").is_dir():
        return None
    model, tokenizer = load(run)
    records = read_log(run / "log.jsonl")
    evaluations = [record for record in records if "val_loss" in record]
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return {
        "parameters": model.num_params(),
        "flops_per_token": model.flops_per_token(),
        "tokens_per_second": machine.spread(speeds),
        "val_loss": {record["step"]: round(record["val_loss"], 4) for record in evaluations},
        "val_bits_per_byte": round(evaluations[-1]["val_bits_per_byte"], 4),
        "sample": generate_text(model, tokenizer, prompt, max_new_tokens=120, temperature=0.7, top_k=40, seed=1),
    }


if __name__ == "__main__":
    main()
