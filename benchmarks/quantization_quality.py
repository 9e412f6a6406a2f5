"""What each GGUF type costs a trained model: perplexity and KL divergence, in torch and in llama.cpp, with importance and without.

    python benchmarks/quantization_quality.py runs/quijote quijote.txt

Measured on the validation part of the text that the run was trained on, which is its end; the importance matrix is collected on
the part before it. Needs llama-cpp-python.
"""

import argparse
import tempfile
from pathlib import Path

import machine
import torch

from llmforge import collect_imatrix, export_gguf, load, quantization_report
from llmforge.cli.types import FILE_TYPES
from llmforge.tokenizers.text_files import read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("text", help="the text it was trained on")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="of the text's end, as the run had it")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="of the validation text")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--types", nargs="*", default=FILE_TYPES.replace(" or ", ", ").split(", "))
    args = parser.parse_args()
    model, tokenizer = load(args.run)
    text = "".join(read_text(args.text))
    cut = round(len(text) * (1 - args.val_fraction))
    calibration = tokenizer.encode_array(text[:cut])[: args.calibration_tokens]
    importance = collect_imatrix(model, calibration, chunk_tokens=model.context_length)
    rows: dict[str, dict[str, object]] = {}
    float_model = None
    with tempfile.TemporaryDirectory() as folder:
        for file_type in args.types:
            for weighted in (False, True) if file_type not in ("F32", "F16", "BF16", "Q8_0") else (False,):
                if file_type == "Q2_K_S" and not weighted:
                    continue  # llama.cpp refuses it
                path = Path(folder, "model.gguf")
                export_gguf(model, tokenizer, path, file_type=file_type, importance=importance if weighted else None)
                report = quantization_report(
                    path, model, tokenizer, text=text[cut:], max_tokens=args.max_tokens, llama_cpp=True
                )
                assert report.llama_cpp is not None
                float_model = {"perplexity": report.float_model.perplexity, "tokens": report.n_tokens}
                row = {
                    "bytes": report.bytes,
                    "bits_per_weight": report.bits_per_weight,
                    "types": {found.type_name: found.n_tensors for found in report.types},
                    "relative_error": {found.type_name: found.relative_error for found in report.types},
                }
                for name, quality in (("torch", report.torch), ("llama_cpp", report.llama_cpp)):
                    row[f"{name}_perplexity"] = quality.perplexity
                    row[f"{name}_kl_mean"] = quality.kl_mean
                    row[f"{name}_argmax_agreement"] = quality.argmax_agreement
                rows[file_type + (" with importance" if weighted else "")] = row
                print(
                    f"{file_type:8}{'+' if weighted else ' '} {report.bits_per_weight:6.2f} bits  perplexity "
                    f"{report.torch.perplexity:8.3f} {report.llama_cpp.perplexity:8.3f}  KL {report.torch.kl_mean:.2e} "
                    f"{report.llama_cpp.kl_mean:.2e}  argmax {report.torch.argmax_agreement:.2%}",
                    flush=True,
                )
    machine.write(
        "quantization-quality",
        {
            **machine.describe(torch.device("cpu")),
            "weights": sum(parameter.numel() for parameter in model.parameters()),
            "calibration_tokens": len(calibration),
            "float_model": float_model,
            "types": rows,
        },
    )


if __name__ == "__main__":
    main()
