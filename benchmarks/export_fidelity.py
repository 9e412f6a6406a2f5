"""How closely llama.cpp and transformers compute what a trained run computes, for every GGUF file type.

    python benchmarks/export_fidelity.py runs/quijote --text quijote.txt

Needs `pip install "llmforge[verify]" transformers`. The token ids of the whole text are compared, the probabilities on its first
tokens, and the most probable continuation.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import machine
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmforge as lf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder, or anything that llmforge.load reads")
    parser.add_argument("--text", required=True, help="UTF-8 text to compare on")
    parser.add_argument("--max-tokens", type=int, default=8_192, help="positions whose probabilities are compared")
    parser.add_argument("--greedy-tokens", type=int, default=200)
    args = parser.parse_args()
    model, tokenizer = lf.load(args.run)
    assert tokenizer is not None
    text = Path(args.text).read_bytes().decode("utf-8")
    result = {**machine.describe(torch.device("cpu")), "parameters": model.num_params()}
    with tempfile.TemporaryDirectory() as folder:
        result["transformers"] = compare_with_transformers(model, tokenizer, text, Path(folder) / "hf")
        for file_type in ("F32", "F16", "BF16", "Q8_0"):
            path = Path(folder) / f"{file_type}.gguf"
            lf.export_gguf(model, tokenizer, path, file_type=file_type)
            report = lf.verify_gguf(
                path, model, tokenizer, text=text, max_tokens=args.max_tokens, greedy_tokens=args.greedy_tokens
            )
            figures = {key: value for key, value in dataclasses.asdict(report).items() if key != "path"}
            result[file_type] = {"bytes": path.stat().st_size, "passed": report.passed, **figures}
    machine.write(f"export-fidelity-{Path(args.run).name}", result)


def compare_with_transformers(model: torch.nn.Module, tokenizer: object, text: str, folder: Path) -> dict[str, object]:
    """Ids of the whole text, and the largest difference of a logit over the first windows of it."""
    lf.export_hf(model, tokenizer, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.encode(text)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    their_ids = their_tokenizer(text)["input_ids"]
    context = model.context_length
    idx = torch.tensor(ids[: 8 * context]).view(8, context)
    with torch.no_grad():
        difference = (model(idx) - theirs(idx).logits).abs().max().item()
    return {
        "ids_equal": their_ids == ids,
        "decode_equal": their_tokenizer.decode(ids) == text,
        "n_text_tokens": len(ids),
        "largest_logit_difference": difference,
    }


if __name__ == "__main__":
    main()
