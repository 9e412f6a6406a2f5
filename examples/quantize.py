"""A model in fewer bits: what each GGUF type costs, and what an importance matrix gives back.

    python examples/quantize.py runs/my-text quijote.txt

Takes whatever `llmforge.load` reads. The text calibrates (its beginning) and measures (its end), so give one in the language that
the model is for. With llama-cpp-python installed, each file is measured in llama.cpp too.
"""

import argparse
from pathlib import Path

import llmforge as lf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder, Hugging Face folder or owner/name, .gguf")
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M", "Q2_K"])
    parser.add_argument("--max-tokens", type=int, default=4096, help="to calibrate on, and to measure on")
    parser.add_argument("--out", type=Path, default=Path("quantized"))
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)

    model, tokenizer = lf.load(args.model)
    text = args.text.read_text(encoding="utf-8")
    seen, unseen = text[: len(text) // 2], text[len(text) // 2 :]

    # How large the inputs of each matrix are, column by column. llama.cpp reads and writes the same file.
    importance = lf.collect_imatrix(model, tokenizer.encode(seen)[: args.max_tokens])
    lf.write_imatrix(args.out / "imatrix.gguf", importance)

    for file_type in args.types:
        for name, weighted in ((f"{file_type}.gguf", None), (f"{file_type}-imatrix.gguf", importance)):
            path = args.out / name
            lf.export_gguf(model, tokenizer, path, file_type=file_type, importance=weighted)
            print(lf.quantization_report(path, model, tokenizer, text=unseen, max_tokens=args.max_tokens))
            print()


if __name__ == "__main__":
    main()
