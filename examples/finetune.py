"""An adapter for an open model, learned from your examples, and the tuned model as one GGUF.

    python examples/finetune.py path/to/base examples/tutor.jsonl

The base is held in 4 bits (QLoRA): an 8B model takes 6 GB. The same as `llmforge finetune base tutor.jsonl --qlora`, in Python.
"""

import argparse
from pathlib import Path

import torch

import llmforge as lf
from llmforge.finetune import AdapterFiles
from llmforge.training import chunked_next_token_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="run folder, Hugging Face folder or owner/name, .gguf")
    parser.add_argument("examples", help="JSONL or JSON: Alpaca, messages, ShareGPT ...")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    args = parser.parse_args()

    # Quantized while it is read, tensor by tensor: the 16-bit model never exists.
    cuda = torch.cuda.is_available()
    model, tokenizer = lf.load(
        args.base,
        quantize=lf.NF4Config(),
        device="cuda" if cuda else "cpu",
        dtype=torch.bfloat16 if cuda else torch.float32,
    )
    names = lf.apply_lora_(model, lf.LoRAConfig(r=16, lora_alpha=32))
    print(f"adapters on {len(names)} layers")

    # The loss counts the tokens of answers; several examples share a row, and do not see each other.
    data = lf.InstructionDataset.from_file(args.examples, tokenizer)
    train_data, val_data = data.split(val_fraction=0.1)

    config = lf.TrainConfig(
        max_steps=args.steps,
        micro_batch_size=1,
        grad_accum_steps=4,
        seq_len=min(args.seq_len, model.context_length),
        lr=2e-4,
        warmup_steps=min(10, args.steps - 1),
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eval_batches=None,
        sample_every_steps=None,
        activation_checkpointing="blocks",
        out_dir=str(args.out),
    )
    trainer = lf.Trainer(
        model,
        train_data,
        val_data=val_data,
        tokenizer=data.tokenizer,  # with the chat template of the examples, Alpaca's where the base has none
        config=config,
        loss_fn=chunked_next_token_loss,
        model_files=AdapterFiles(base_model=args.base),  # checkpoints hold the adapter, not the base
    )
    if trainer.resume():
        print(f"going on from step {trainer.step}")
    before = trainer.evaluate().loss
    trainer.train()
    print(f"held-out answers: loss {before:.4f} before, {trainer.evaluate().loss:.4f} after")

    # An adapter is a model: its base is found, and merged tensor by tensor on the way into the file.
    report = lf.export_gguf(args.out, None, args.out / "tuned.gguf", file_type="Q4_K_M")
    for note in report.notes:
        print(f"note: {note}")
    print(f"wrote {report.path}")


if __name__ == "__main__":
    main()
