"""The last steps of a run with the weights that its GGUF file will have, so that the small file loses less.

    python examples/quantization_aware.py runs/my-text mybook.txt

Goes on from a trained run twice, with the same batches: as it was, and quantization-aware; writes both files and compares them.
"""

import argparse
import copy

import llmforge as lf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="a run folder of llmforge train, or any model that llmforge.load reads")
parser.add_argument("text", help="the UTF-8 text file that it was trained on")
parser.add_argument("--file-type", default="Q4_0", help="Q4_0, Q4_K_M ...; the fewer bits, the more there is to win")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--lr", type=float, default=3e-4, help="a third of the run's or less; falls to 0")
args = parser.parse_args()

model, tokenizer = lf.load(args.run)
train_data, val_data = lf.TokenDataset.from_text_file(args.text, tokenizer).split(val_fraction=0.1)
config = lf.TrainConfig(
    max_steps=args.steps,
    micro_batch_size=8,
    seq_len=model.context_length,  # a file may have a longer context, filled up
    lr=args.lr,
    min_lr=0.0,
    warmup_steps=args.steps // 10,
    eval_batches=None,
)

for name, quantize_aware in (("float", False), ("quantization-aware", True)):
    trained = copy.deepcopy(model)
    if quantize_aware:
        # Before the Trainer is built; checkpoints would be those of a float model.
        types = lf.quantize_aware_(trained, args.file_type)
        print(f"{len(types)} matrices train as {', '.join(sorted(set(types.values())))}")
    trainer = lf.Trainer(trained, train_data, val_data=val_data, config=config)
    for metrics in trainer:
        if metrics.step % 50 == 0:
            print(f"{name}: step {metrics.step}  loss {metrics.loss:.3f}")
    loss = trainer.evaluate().loss
    path = f"{name}-{args.file_type}.gguf"
    lf.export_gguf(trained, tokenizer, path, file_type=args.file_type)
    in_file, _ = lf.load(path)  # the weights of the file
    file_loss = lf.Trainer(in_file, train_data, val_data=val_data, config=config).evaluate().loss
    print(f"{name}: validation loss {loss:.4f} in training, {file_loss:.4f} from {path}")
