"""The examples, the notebook, the benchmarks and the README's code, run as they stand at toy size."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import nbformat
import pytest
from nbclient import NotebookClient
from toy import TEXT

import llmforge as lf

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "quijote.txt"
    path.write_text(TEXT * 4, encoding="utf-8")
    return path


def run(*arguments, cwd):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def toy_llama(folder):
    """A base model for tuning."""
    tokenizer = lf.BPETokenizer.from_texts(
        [TEXT, (EXAMPLES / "tutor.jsonl").read_text(encoding="utf-8")], vocab_size=300
    )
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = lf.Llama(lf.LlamaConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024, **shape))
    lf.export_hf(model, tokenizer, folder)


def test_tuning_script(tmp_path):
    toy_llama(tmp_path / "base")
    arguments = [EXAMPLES / "finetune.py", "base", EXAMPLES / "tutor.jsonl", "--steps"]
    out = run(*arguments, 2, cwd=tmp_path)
    assert "adapters on 14 layers" in out
    assert re.search(r"held-out answers: loss \d\.\d+ before, \d\.\d+ after", out)
    assert "wrote runs/finetune/tuned.gguf" in out
    assert "going on from step 2" in run(*arguments, 3, cwd=tmp_path)


def test_train_export_and_verify_scripts(text, tmp_path):
    arguments = [EXAMPLES / "train_on_your_text.py", text, "--vocab-size", 300]
    out = run(*arguments, "--steps", 3, cwd=tmp_path)
    assert "wrote runs/my-text/model.gguf" in out
    assert "going on from step 3" in run(*arguments, "--steps", 5, cwd=tmp_path)  # as its comment promises
    out = run(EXAMPLES / "export_and_verify.py", "runs/my-text", cwd=tmp_path)
    assert "transformers: token ids equal" in out
    out = run(EXAMPLES / "quantization_aware.py", "runs/my-text", text, "--steps", 2, cwd=tmp_path)
    assert "from quantization-aware-Q4_0.gguf" in out


def test_many_sources_script(text, tmp_path):
    words, random = TEXT.replace('"', "").split(), Random(0)  # lines that are no near-duplicates
    rows = "".join(f'{i},"{" ".join(random.choices(words, k=30))}"\n' for i in range(300))
    (tmp_path / "articles.csv").write_text(f"id,body\n{rows}", encoding="utf-8")
    (tmp_path / "book.txt").write_text(
        "\n".join(f"Capítulo {n}: de {n * n} molinos que giran" for n in range(900)), encoding="utf-8"
    )
    arguments = [EXAMPLES / "many_sources.py", "book.txt", "articles.csv", "--field", "body", "--vocab-size", 300]
    out = run(*arguments, "--weights", 1, 2, "--steps", 2, cwd=tmp_path)
    assert "67% of the rows from" in out
    assert "validation loss" in out


def test_data_preparation_benchmark(text, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    ways = ["library encode_batch", "bpe text", "bpe jsonl", "char text"]
    arguments = [text, "--megabytes", 0.05, "--vocab-size", 300, "--ways", *ways]
    run(ROOT / "benchmarks" / "data_preparation.py", *arguments, cwd=tmp_path)
    result = json.loads((tmp_path / "data-preparation.json").read_text(encoding="utf-8"))
    assert list(result["ways"]) == ways
    assert result["ways"]["bpe text"]["ratio_to_the_faster_library_call"] > 0


def test_your_own_model_script(text, tmp_path):
    assert "step 100  loss" in run(EXAMPLES / "your_own_model.py", text, "--steps", 100, cwd=tmp_path)


def test_a_module_that_is_no_language_model(tmp_path):
    for _ in "ab":  # the second run finds the first one's end
        (error,) = re.findall(r"squared error (\d\.\d+)", run(EXAMPLES / "any_module.py", cwd=tmp_path))
        assert float(error) < 0.1  # 0.5 is that of a model which answers 0
        assert sorted(folder.name for folder in (tmp_path / "runs" / "waves").glob("step-*"))[-1] == "step-000500"


def test_ternary_scripts(text, tmp_path):
    out = run(EXAMPLES / "bitlinear_in_your_model.py", text, "--steps", 100, cwd=tmp_path)
    assert "9 layers are ternary: blocks.0.up, blocks.0.gate, blocks.0.down ..." in out
    assert re.search(r"validation loss: float \d\.\d+, ternary \d\.\d+", out)
    arguments = [EXAMPLES / "ternary_from_scratch.py", text, "--vocab-size", 300, "--width", 256]
    out = run(*arguments, "--steps", 3, cwd=tmp_path)
    assert "wrote runs/bitnet/hf and runs/bitnet/model.gguf" in out
    assert "same as its own weights" in out or "KL" in out
    assert "going on from step 3" in run(*arguments, "--steps", 4, cwd=tmp_path)


def test_llama_scripts(text, tmp_path):
    arguments = [EXAMPLES / "llama_from_scratch.py", text, "--vocab-size", 300, "--width", 64]
    out = run(*arguments, "--steps", 2, cwd=tmp_path)
    assert "wrote runs/llama/hf and runs/llama/model.gguf" in out
    assert "going on from step 2" in run(*arguments, "--steps", 3, cwd=tmp_path)
    out = run(EXAMPLES / "open_model.py", "runs/llama/hf", "--max-new-tokens", 5, "--gguf", "a.gguf", cwd=tmp_path)
    assert "Llama of" in out
    assert (tmp_path / "a.gguf").is_file()
    assert "Llama of" in run(EXAMPLES / "open_model.py", "a.gguf", "--max-new-tokens", 5, cwd=tmp_path)


def test_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("QUIJOTE_STEPS", "4")
    notebook = nbformat.read(EXAMPLES / "quijote.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # stored without outputs
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "out" / "quijote.gguf").is_file()


def test_readme_code_runs(text, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    toy_size = code.replace("max_steps=2_000", "max_steps=3").replace("% 500", "% 3")
    assert toy_size.count("3") > code.count("3")
    assert run("-c", toy_size, cwd=tmp_path).startswith("3 ")
    assert (tmp_path / "out" / "quijote.gguf").is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/inicio-rapido.md"])
def test_documented_commands_run(page, text, tmp_path):
    commands = re.findall(
        r"^llmforge (train|generate|export|verify|finetune|deploy) (.*?)(?:#.*)?$",
        (ROOT / page).read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    ternary = ["train", "export"] if page == "README.md" else []
    assert [command for command, _ in commands] == [
        "train",
        "train",
        "generate",
        "export",
        "verify",
        *ternary,
        "export",
        "finetune",
        "export",
        "deploy",
    ]
    shutil.copy(EXAMPLES / "tutor.jsonl", tmp_path)
    toy_llama(tmp_path / "runs" / "llama")
    for command, arguments in commands:
        if command == "finetune":  # a model that knows the characters of templates
            arguments = arguments.replace("path/to/base", "runs/llama").replace("carpeta-del-modelo", "runs/llama")
        for base in ("path/to/base", "carpeta-del-modelo"):  # any model will do
            arguments = arguments.replace(base, "runs/quijote")
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', arguments)]
        if "--twin" in words:
            words += ["--steps", "3", "--vocab-size", "300", "--set", "device=cpu", "--set", "num_hidden_layers=1"]
            words += ["--set", "hidden_size=256", "--set", "intermediate_size=256", "--set", "num_attention_heads=4"]
        elif command == "finetune":
            words += ["--steps", "2", "--set", "device=cpu"]
        elif command == "train" and "--resume" not in words:
            words += ["--steps", "3", "--set", "device=cpu", "--preset", "char-gpt-cpu"]
        run("-m", "llmforge", command, *words, cwd=tmp_path)


def test_links_in_the_documentation_lead_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def test_training_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    run(
        ROOT / "benchmarks" / "training.py",
        "--blocks",
        2,
        "--block-seconds",
        0.1,
        "--peers",
        "plain_loop",
        "--device",
        "cpu",
        "--preset",
        "char-gpt-cpu",
        cwd=tmp_path,
    )
    result = json.loads((tmp_path / "training-cpu-char-gpt-cpu.json").read_text(encoding="utf-8"))
    assert result["tokens_per_second"]["llmforge"] > 0


def test_llama_vs_gpt_benchmark(text, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    sizes = ["--steps", 2, "--micro-batch-size", 1, "--seq-len", 16, "--vocab-size", 300, "--out", tmp_path / "compare"]
    out = run(ROOT / "benchmarks" / "llama_vs_gpt.py", text, *sizes, "--model", "gpt", cwd=tmp_path)
    assert "not complete yet" in out
    run(ROOT / "benchmarks" / "llama_vs_gpt.py", text, *sizes, cwd=tmp_path)
    result = json.loads((tmp_path / "llama-vs-gpt.json").read_text(encoding="utf-8"))
    assert {name: list(model["val_loss"]) for name, model in result["models"].items()} == {"llama": ["2"], "gpt": ["2"]}


def test_streaming_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    arguments = ["--out", tmp_path / "stream", "--preset", "llama-15m", "--repeat", 1, "--load"]
    run(ROOT / "benchmarks" / "stream_8b.py", *arguments, cwd=tmp_path)
    result = json.loads((tmp_path / "stream-llama-15m.json").read_text(encoding="utf-8"))
    assert set(result["results"]) == {"copy", "meta", "gguf", "hf", "load"}
    assert not (tmp_path / "stream").exists()


def test_quantization_benchmarks(text, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    arguments = ["--out", tmp_path / "quantize", "--preset", "llama-15m", "--repeat", 1, "--rows", 32]
    run(ROOT / "benchmarks" / "quantize.py", *arguments, cwd=tmp_path)
    [result] = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("quantize*.json")]
    assert all(found["bytes_equal"] for found in result["types"].values())
    for found in result["files"].values():
        same, tensors = found["tensors_equal"].split(" of ")
        assert same == tensors
    assert not (tmp_path / "quantize").exists()


def test_quantization_script_and_quality_benchmark(text, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    arguments = ["--tokenizer", "bpe", "--vocab-size", 300, "--steps", 3, "--set", "device=cpu", "--out", "runs/q"]
    sizes = ["--set", "n_embd=256", "--set", "n_layer=1", "--set", "n_head=4", "--set", "block_size=32"]
    run("-m", "llmforge", "train", text, "--preset", "char-gpt-cpu", *arguments, *sizes, cwd=tmp_path)
    out = run(EXAMPLES / "quantize.py", "runs/q", text, "--types", "Q4_K_M", "--max-tokens", 200, cwd=tmp_path)
    assert out.count("file in llama.cpp") == 2
    assert (tmp_path / "quantized" / "imatrix.gguf").is_file()
    few = ["--max-tokens", 100, "--calibration-tokens", 200, "--types", "Q8_0", "Q2_K"]
    run(ROOT / "benchmarks" / "quantization_quality.py", "runs/q", text, *few, cwd=tmp_path)
    result = json.loads((tmp_path / "quantization-quality.json").read_text(encoding="utf-8"))
    assert list(result["types"]) == ["Q8_0", "Q2_K", "Q2_K with importance"]


def test_ternary_benchmarks(text, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    arguments = [text, "--name", "toy", "--layers", 1, "--steps", 2, "--seq-len", 16, "--seeds", 0, 1, "--lr", "1e-3"]
    run(ROOT / "benchmarks" / "ternary_quality.py", *arguments, "--keep", "runs", cwd=tmp_path)
    result = json.loads((tmp_path / "ternary-quality-toy.json").read_text(encoding="utf-8"))
    assert list(result["kinds"]) == ["float", "guide", "canonical", "ours"]
    losses = [result["kinds"][kind]["losses"] for kind in ("ours", "float")]
    gaps = [losses[0][seed] - losses[1][seed] for seed in ("0", "1")]
    assert abs(result["kinds"]["ours"]["gap"] - sum(gaps) / 2) < 1e-6
    runs = [f"runs/toy-{kind}-0.001-0" for kind in ("float", "ours")]
    run(ROOT / "benchmarks" / "ternary_pareto.py", text, *runs, "--plot", "front.png", cwd=tmp_path)
    points = json.loads((tmp_path / "ternary-pareto.json").read_text(encoding="utf-8"))["points"]
    assert [point["file_type"] for point in points] == ["F16", "Q8_0", "Q4_K_M", "TQ2_0"]
    assert (tmp_path / "front.png").stat().st_size > 0


def test_tuning_benchmarks(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    small = ["--preset", "llama-15m", "--layers", 1, "--device", "cpu"]
    run(ROOT / "benchmarks" / "qlora_step.py", *small, "--tokens", 16, "--repeat", 1, cwd=tmp_path)
    result = json.loads((tmp_path / "qlora-step-cpu-llama-15m.json").read_text(encoding="utf-8"))
    assert set(result["tokens_per_second"]) == {"nf4", "dense", "peft"}
    toy_llama(tmp_path / "base")
    arguments = ["base", EXAMPLES / "tutor.jsonl", "--held-out", 2, "--epochs", 1, "--set", "device=cpu"]
    run(ROOT / "benchmarks" / "tuning_story.py", *arguments, cwd=tmp_path)
    result = json.loads((tmp_path / "tuning-story.json").read_text(encoding="utf-8"))
    assert set(result["held_out"]) == {"torch", "llama.cpp"}
    run(
        ROOT / "benchmarks" / "nf4.py",
        "--out",
        "nf4",
        "--preset",
        "llama-15m",
        "--size",
        1024,
        "--tokens",
        64,
        "--repeat",
        3,
        cwd=tmp_path,
    )
    result = json.loads((tmp_path / "nf4.json").read_text(encoding="utf-8"))
    assert not (tmp_path / "nf4").exists()


def test_scaling_law_script(text, tmp_path):
    out = run(EXAMPLES / "scaling_law.py", text, "--widths", 16, 32, 48, "--steps", 5, 15, 30, cwd=tmp_path)
    assert out.count("steps: loss") == 9
    assert re.search(r"loss\(N, D\) = \S+ \+ \S+ / N\^\d\.\d+ \+ \S+ / D\^\d\.\d+, off by", out)


def test_sweep_benchmarks(text, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_BENCHMARK_RESULTS", str(tmp_path))
    sizes = ["--widths", 16, 32, 48, "--steps", 5, 10, 20, "--held-out", 64, 30]
    run(ROOT / "benchmarks" / "scaling_law.py", text, *sizes, "--plot", "law.png", cwd=tmp_path)
    held_out = json.loads((tmp_path / "scaling-law.json").read_text(encoding="utf-8"))["held_out"]
    assert held_out["error"] == held_out["predicted"] - held_out["measured"]
    assert (tmp_path / "law.png").stat().st_size > 0
    few = ["--rules", "mup", "--widths", 16, 32, "--layers", 1, "--steps", 2, "--micro-batch-size", 1]
    few += ["--coordinate-widths", 16]
    run(ROOT / "benchmarks" / "lr_transfer.py", text, *few, "--plot", "transfer.png", cwd=tmp_path)
    rules = json.loads((tmp_path / "lr-transfer.json").read_text(encoding="utf-8"))["rules"]
    assert set(rules["mup"]["widths"]) == {"16", "32"}
    assert (tmp_path / "transfer.png").stat().st_size > 0
