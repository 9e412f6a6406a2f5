"""The layout's promises: who imports whom, what the package exports, and that importing it does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmforge

PACKAGE = Path(llmforge.__file__).parent

# Room -> rooms it may import. errors and config are the ground under all; docs/design.md has the same table.
ALLOWED = {
    "errors": set(),
    "config": set(),
    "quant": set(),
    "formats": {"quant"},
    "tokenizers": {"formats"},
    "nn": {"quant"},
    "models": {"nn"},
    "data": {"tokenizers", "formats"},
    "generation": {"nn", "tokenizers"},
    "training": {"nn", "data", "formats", "tokenizers", "generation", "quant"},
    "finetune": {"nn", "quant", "formats", "tokenizers"},
    "convert": {"models", "finetune", "nn", "training", "tokenizers", "formats", "quant"},
    "deploy": {"convert", "training", "generation", "data", "models", "tokenizers", "formats", "quant"},
}


def rooms_imported_by(file: Path) -> set[str]:
    """Names of the llmforge rooms that a file imports anywhere in it, lazily too."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "llmforge" else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = (name or "").split(".")
            if parts[0] == "llmforge":
                assert len(parts) > 1, f"{file}: imports the top level, not the room that has the name"
                rooms.add(parts[1])
    return rooms


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOM_FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if room_of(file) in ALLOWED]


@pytest.mark.parametrize("file", ROOM_FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down_only(file):
    room = room_of(file)
    assert rooms_imported_by(file) <= ALLOWED[room] | {room, "errors", "config"}


def test_every_room_is_under_the_import_rule():
    rooms = {room_of(file) for file in PACKAGE.rglob("*.py")} - {"__init__", "__main__", "cli"}
    assert rooms == set(ALLOWED)


def test_public_names_are_these():
    assert sorted(llmforge.__all__) == [
        "BPETokenizer",
        "BitNet",
        "BitNetConfig",
        "CharTokenizer",
        "CheckpointError",
        "ConfigError",
        "ConvertError",
        "DataError",
        "GPT",
        "GPTConfig",
        "InstructionDataset",
        "LLMForgeError",
        "Llama",
        "LlamaConfig",
        "LoRAConfig",
        "NF4Config",
        "SentencePieceTokenizer",
        "TiktokenTokenizer",
        "TokenDataset",
        "TrainConfig",
        "Trainer",
        "WordPieceTokenizer",
        "__version__",
        "apply_lora_",
        "collect_imatrix",
        "compare_models",
        "deploy_gguf",
        "export_adapter_gguf",
        "export_gguf",
        "export_hf",
        "generate",
        "generate_batch",
        "generate_text",
        "load",
        "load_adapter_",
        "load_tokenizer",
        "merge_lora_",
        "pack_",
        "quantization_report",
        "quantize_",
        "quantize_aware_",
        "quantize_gguf",
        "read_imatrix",
        "save_adapter",
        "stream_text",
        "verify_gguf",
        "write_imatrix",
    ]
    for name in llmforge.__all__:
        assert getattr(llmforge, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Llamma'"):
        llmforge.Llamma  # noqa: B018


def test_importing_does_nothing():
    code = """
import os, sys
before = dict(os.environ)
import llmforge
assert dict(os.environ) == before
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_answers_without_torch():
    code = """
import sys
from llmforge.cli.main import main
try:
    main(["train", "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert not {"torch", "numpy", "tokenizers", "matplotlib", "yaml", "tqdm"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_types_ship():
    assert (PACKAGE / "py.typed").is_file()


def calls_in(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_nothing_unpickles_evaluates_or_runs_a_shell():
    for file in PACKAGE.rglob("*.py"):
        assert "pickle" not in rooms_and_modules(file), file
        for name, keywords in calls_in(file):
            assert name not in ("eval", "exec", "os.system", "yaml.load", "np.load"), (file, name)
            assert keywords.get("shell") in (None, "False"), (file, name)
            assert keywords.get("trust_remote_code") is None, (file, name)
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", file


def rooms_and_modules(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return imported | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_only_the_command_line_and_the_progress_line_print():
    for file in PACKAGE.rglob("*.py"):
        if room_of(file) == "cli" or file.name in ("progress.py", "llama_cpp_worker.py"):
            continue
        assert "print" not in {name for name, _ in calls_in(file)}, file


def test_command_runs_as_a_module_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llmforge", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ,
        check=True,
    )
    assert done.stdout.strip() == f"llmforge {llmforge.__version__}"
