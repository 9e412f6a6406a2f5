"""The command line, as a user types it: each command does its job, and bad input ends in one clear message and exit code 2."""

import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import TEXT

from llmforge.cli.main import main
from llmforge.cli.program import program

TOY = ["--set", "n_layer=1", "--set", "n_embd=16", "--set", "n_head=2", "--set", "block_size=16", "--set", "device=cpu"]
TOY += ["--set", "eval_batches=2", "--set", "sample_tokens=10", "--preset", "char-gpt-cpu"]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "quijote.txt"
    path.write_bytes(TEXT.replace("\n", "\r\n").encode())
    return path


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quijote"
    assert main(["train", str(text), "--out", str(out), "--steps", "6", *TOY]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_train_writes_a_run(trained):
    assert sorted(entry.name for entry in trained.iterdir()) == [
        "config.yaml",
        "log.jsonl",
        "loss.html",
        "loss.png",
        "step-000006",
    ]
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_train_says_what_it_does_and_what_to_type_next(text, tmp_path, capsys):
    assert main(["train", str(text), "--out", str(tmp_path / "r"), "--steps", "3", *TOY]) == 0
    out, err = capsys.readouterr()
    assert "tokens" in out.splitlines()[0]
    assert f"llmforge train --resume {tmp_path / 'r'}" in out
    assert f"llmforge export {tmp_path / 'r'} --gguf r.gguf" in out
    assert "step 3/3  loss" in err


def test_the_saved_config_gives_the_same_run(trained, text, tmp_path):
    out = tmp_path / "again"
    assert main(["train", "--config", str(trained / "config.yaml"), "--out", str(out)]) == 0
    ours, theirs = (load_file(folder / "step-000006" / "model.safetensors") for folder in (trained, out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_stopped_by_sigterm_resumes_to_the_same_weights(text, tmp_path):
    arguments = ["train", str(text), "--steps", "800", *TOY, "--set", "dropout=0.1", "--set", "save_every_steps=100000"]
    arguments += [
        "--set",
        "eval_every_steps=100000",
        "--set",
        "sample_every_steps=100000",
        "--set",
        "log_every_steps=1",
    ]
    stopped = [sys.executable, "-m", "llmforge", *arguments, "--out", str(tmp_path / "stopped")]
    process = subprocess.Popen(stopped, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stopped" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size > 500):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143, err
    assert "stopped by SIGTERM and saved; go on with: " in out
    assert f"llmforge train --resume {tmp_path / 'stopped'}" in out.splitlines()[-1]
    assert main(["train", "--resume", str(tmp_path / "stopped")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    ours, theirs = (load_file(tmp_path / name / "step-000800" / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_before_the_first_checkpoint_starts_again(run, capsys):
    shutil.rmtree(run / "step-000006")
    assert main(["train", "--resume", str(run)]) == 0
    assert "has no checkpoint yet: starting from the beginning" in capsys.readouterr().err
    assert (run / "step-000006").is_dir()


def test_resume_can_be_given_more_steps(run, capsys):
    assert main(["train", "--resume", str(run), "--steps", "9"]) == 0
    assert "max_steps 6 -> 9" in capsys.readouterr().err
    assert (run / "step-000009").is_dir()


def test_resume_keeps_the_vocabulary_when_the_text_has_changed(run, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(TEXT * 2, encoding="utf-8")  # no \r: another vocabulary, if it were made anew
    config = (run / "config.yaml").read_text(encoding="utf-8").replace(str(text), str(other))
    (run / "config.yaml").write_text(config, encoding="utf-8")
    assert main(["train", "--resume", str(run), "--steps", "8"]) == 0
    assert "the training data" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", [["--tokenizer", "bpe", "--vocab-size", "300"], ["--set", "tokenizer.kind=bpe"]])
def test_train_with_a_tokenizer_of_its_own(text, tmp_path, tokenizer, capsys):
    assert main(["train", str(text), "--out", str(tmp_path / "r"), "--steps", "2", *tokenizer, *TOY]) == 0
    assert "(bpe, vocabulary of" in capsys.readouterr().out


def test_generate_prints_the_prompt_and_its_continuation(trained, capsys):
    arguments = ["generate", str(trained), "--prompt", "En un ", "--max-new-tokens", "20", "--seed", "1"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("En un ")
    assert len(first.strip()) > len("En un")
    assert main([*arguments, "--checkpoint", "best"]) == 0
    assert capsys.readouterr().out == first


def test_export_writes_both_forms_and_info_describes_them(trained, tmp_path, capsys):
    gguf, folder = tmp_path / "q.gguf", tmp_path / "hf"
    assert main(["export", str(trained), "--gguf", str(gguf), "--file-type", "Q8_0", "--hf", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"llmforge verify {gguf}" in out
    assert main(["info", str(gguf)]) == 0
    assert "general.architecture" in capsys.readouterr().out
    assert main(["info", str(folder)]) == 0
    assert main(["info", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "step-000006" in out
    assert "CharTokenizer" in out


def test_verify_passes_for_the_right_model_and_fails_for_another(trained, run, text, tmp_path, capsys):
    gguf = tmp_path / "q.gguf"
    assert main(["export", str(trained), "--gguf", str(gguf), "--file-type", "F32"]) == 0
    assert main(["verify", str(gguf), str(trained), "--text", str(text)]) == 0
    assert main(["train", "--resume", str(run), "--steps", "60"]) == 0
    assert main(["verify", str(gguf), str(run), "--text", str(text)]) == 1


def test_demo_goes_the_whole_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "4"]) == 0
    out = capsys.readouterr().out
    demo = tmp_path / "runs" / "demo"
    assert json.loads((demo / "hf" / "config.json").read_text(encoding="utf-8"))["model_type"] == "gpt2"
    assert (demo / "demo.gguf").read_bytes().startswith(b"GGUF")
    assert (demo / "loss.png").is_file()
    assert (demo / "python-reference.txt").stat().st_size > 300_000
    assert "What to type next" in out
    for line in out[out.index("What to type next") :].splitlines():
        words = line.partition("llmforge ")[2].split()
        if words and words[0] in ("generate", "export", "info"):  # they do work
            assert main([word.strip('"') for word in words if word != '"']) == 0
    assert main(["demo", "--steps", "2"]) == 0
    assert (tmp_path / "runs" / "demo-2").is_dir()


def test_demo_takes_a_text(tmp_path):
    text = tmp_path / "capítulos.txt"
    text.write_text("\n".join(f"Capítulo {n}: de {n * n} molinos" for n in range(2_000)), encoding="utf-8")
    assert main(["demo", "--text", str(text), "--steps", "2", "--out", str(tmp_path / "d")]) == 0
    assert not (tmp_path / "d" / "python-reference.txt").exists()


def test_an_output_that_is_cut_off_is_no_error(trained):
    generate = f"{sys.executable} -m llmforge generate {trained} --max-new-tokens 300 --seed 0 | head -c 5"
    done = subprocess.run(["bash", "-c", generate], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Bad input. Each case: a name, what it does to a copy of the run (or to the folder around it), the command, and the message.


def spoil(name, change):
    def apply(run):
        path = run / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def forge_manifest(run):
    (run / "step-000006" / "manifest.json").write_text("{}", encoding="utf-8")


def write(name, content):
    def apply(run):
        (run.parent / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def both(*changes):
    def apply(run):
        for change in changes:
            change(run)

    return apply


def nothing(run):
    pass


def remove(name):
    return lambda run: (run / name).unlink()


def longer_context(config: bytes) -> bytes:
    return config.replace(b'"block_size": 16', b'"block_size": 32')


MODEL, CONFIG = "step-000006/model.safetensors", "step-000006/config.json"
HEADER_BOMB = struct.pack("<Q", 2**62) + b"{}"
TRAIN = ["train", "TEXT", "--steps", "1", "--out", "DIR/new", *TOY]

BAD_INPUT = [
    # texts
    ("missing text", nothing, ["train", "DIR/none.txt"], "none.txt"),
    ("no text", nothing, ["train"], "name a text file to train on"),
    ("empty text", write("e.txt", ""), ["train", "DIR/e.txt", *TOY, "--out", "DIR/new"], "e.txt is empty"),
    ("short text", write("s.txt", "En un lugar"), ["train", "DIR/s.txt", *TOY, "--out", "DIR/new"], "tokens"),
    ("latin-1 text", write("l.txt", "mañana".encode("latin-1") * 99), ["train", "DIR/l.txt", *TOY], "byte 0xf1 at position 2"),
    ("utf-16 text", write("u.txt", "mañana".encode("utf-16") * 99), ["train", "DIR/u.txt", *TOY], "It looks like UTF-16 text"),
    ("binary file", write("b.txt", bytes(range(256)) * 9), ["train", "DIR/b.txt", *TOY], "b.txt"),
    ("folder without texts", lambda run: (run.parent / "f").mkdir(), ["train", "DIR/f", *TOY], ".txt"),
    ("validation too short", nothing, [*TRAIN, "--set", "val_fraction=0.001"], "val_data has"),
    ("val_fraction out of range", nothing, [*TRAIN, "--set", "val_fraction=1.5"], "val_fraction"),
    # settings
    ("unknown setting", nothing, [*TRAIN, "--set", "learning_rate=1"], "did you mean 'lr'?"),
    ("unknown section", nothing, [*TRAIN, "--set", "trian.lr=1"], "did you mean 'train.lr'?"),
    ("setting without value", nothing, [*TRAIN, "--set", "lr"], "--set needs key=value, got 'lr'"),
    ("setting of the wrong type", nothing, [*TRAIN, "--set", "lr=fast"], "TrainConfig.lr must be a number, got 'fast'"),
    ("impossible shape", nothing, [*TRAIN, "--set", "n_head=3"], "n_embd (16) must be divisible by n_head (3)"),
    ("no layers", nothing, [*TRAIN, "--set", "n_layer=0"], "n_layer (0) must be at least 1"),
    ("no steps", nothing, [*TRAIN, "--steps", "0"], "max_steps (0) must be at least 1"),
    ("sequence beyond the context", nothing, [*TRAIN, "--set", "seq_len=99"], "seq_len (99) exceeds the model's context (16)"),
    ("unknown preset", nothing, ["train", "TEXT", "--preset", "gtp2"], "did you mean 'gpt2'?"),
    ("unknown device", nothing, [*TRAIN, "--set", "device=gpu"], "unknown device 'gpu'"),
    ("vocabulary size of characters", nothing, [*TRAIN, "--tokenizer", "char", "--vocab-size", "99"], "is for --tokenizer bpe"),
    ("vocabulary size of a model", nothing, [*TRAIN, "--set", "model.vocab_size=99"], "unknown setting 'model.vocab_size'"),
    ("vocabulary below the bytes", nothing, [*TRAIN, "--tokenizer", "bpe", "--vocab-size", "100"], "257"),
    ("missing config file", nothing, ["train", "--config", "DIR/none.yaml"], "cannot read"),
    ("broken yaml", write("c.yaml", "train: [1"), ["train", "TEXT", "--config", "DIR/c.yaml"], "is not valid YAML"),
    ("yaml with code", write("c.yaml", "a: !!python/object/apply:os.abort []"), ["train", "--config", "DIR/c.yaml"], "not valid YAML"),
    ("yaml that is a list", write("c.yaml", "- a"), ["train", "--config", "DIR/c.yaml"], "must hold a mapping"),
    ("unknown yaml field", write("c.yaml", "modle: {}"), ["train", "TEXT", "--config", "DIR/c.yaml"], "did you mean 'model'?"),
    ("section that is no mapping", write("c.yaml", "train: 3"), ["train", "TEXT", "--config", "DIR/c.yaml"], "train needs a mapping"),
    # places
    ("run that exists", nothing, ["train", "TEXT", *TOY, "--out", "RUN"], "already holds step-000006"),
    ("out below a file", nothing, ["train", "TEXT", *TOY, "--out", "TEXT/run"], "a part of that path is a file"),
    ("folder without permission", nothing, ["train", "TEXT", *TOY, "--out", "/sys/llmforge/run"], "cannot write /sys/llmforge"),
    ("export onto a folder", nothing, ["export", "RUN", "--gguf", "RUN"], "is a folder"),
    ("export onto a full folder", nothing, ["export", "RUN", "--hf", "RUN"], "exists and is not empty"),
    # runs and models
    ("resume of nothing", nothing, ["train", "--resume", "DIR/none"], "is not a run folder"),
    ("resume with another text", nothing, ["train", "TEXT", "--resume", "RUN"], "leave out text"),
    ("resume with another model", nothing, ["train", "--resume", "RUN", "--set", "n_layer=2"], "settings of train only"),
    ("missing model", nothing, ["generate", "DIR/none"], "none"),
    ("empty folder as model", lambda run: (run.parent / "f").mkdir(), ["generate", "DIR/f"], "DIR/f"),
    ("unknown checkpoint", nothing, ["generate", "RUN", "--checkpoint", "step-000001"], "no checkpoint 'step-000001'"),
    ("cut weights", spoil(MODEL, lambda b: b[:-9]), ["generate", "RUN"], "damaged"),
    ("flipped bit", spoil(MODEL, lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]), ["generate", "RUN"], "sha256 differs"),
    ("missing weights", remove(MODEL), ["generate", "RUN"], "model.safetensors is missing"),
    ("cut weights, forged manifest", both(spoil(MODEL, lambda b: b[:-9]), forge_manifest), ["generate", "RUN"], "model.safetensors"),
    ("header bomb", both(spoil(MODEL, lambda b: HEADER_BOMB), forge_manifest), ["generate", "RUN"], "model.safetensors"),
    ("empty weights", both(spoil(MODEL, lambda b: b""), forge_manifest), ["generate", "RUN"], "model.safetensors"),
    ("checkpoint of another shape", both(spoil(CONFIG, longer_context), forge_manifest), ["generate", "RUN"], "wpe.weight"),
    ("config that is no JSON", both(spoil(CONFIG, lambda b: b[:-5]), forge_manifest), ["generate", "RUN"], "is not valid JSON"),
    ("config of an unknown family", both(spoil(CONFIG, lambda b: b'{"llmforge_family": "mamba"}'), forge_manifest), ["generate", "RUN"], "mamba"),
    ("broken tokenizer", both(spoil("step-000006/tokenizer.json", lambda b: b[:50]), forge_manifest), ["generate", "RUN"], "tokenizer.json"),
    ("not a nanoGPT checkpoint", write("x.pt", b"PK\3\4 nothing"), ["generate", "DIR/x.pt"], "x.pt"),
    ("not a GGUF", write("x.gguf", b"GGML" + bytes(40)), ["info", "DIR/x.gguf"], "x.gguf"),
    ("cut GGUF", write("x.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)), ["info", "DIR/x.gguf"], "x.gguf"),
    ("GGUF that llama.cpp refuses", write("x.gguf", b"GGUF" + bytes(60)), ["verify", "DIR/x.gguf", "RUN"], "x.gguf"),
    ("missing GGUF", nothing, ["verify", "DIR/none.gguf", "RUN"], "none.gguf"),
    ("missing info", nothing, ["info", "DIR/none"], "does not exist"),
    # generation and export
    ("unknown character in the prompt", nothing, ["generate", "RUN", "--prompt", "€"], "'€'"),
    ("negative temperature", nothing, ["generate", "RUN", "--temperature", "-1"], "temperature (-1.0) must be 0"),
    ("top-p out of range", nothing, ["generate", "RUN", "--top-p", "7"], "top_p (7.0) must be above 0 and at most 1"),
    ("nothing to export", nothing, ["export", "RUN"], "say what to write"),
    ("unknown file type", nothing, ["export", "RUN", "--gguf", "DIR/q.gguf", "--file-type", "Q9_X"], "Q9_X"),
    ("tokenizer that is not there", nothing, ["export", "RUN", "--gguf", "DIR/q.gguf", "--tokenizer", "DIR"], "no tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil_run", "command", "message"), [case[1:] for case in BAD_INPUT], ids=[case[0] for case in BAD_INPUT]
)
def test_bad_input_gets_one_message_and_loses_nothing(run, text, capsys, monkeypatch, spoil_run, command, message):
    monkeypatch.chdir(run.parent)
    spoil_run(run)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}

    def place(part: str) -> str:
        return part.replace("TEXT", str(text)).replace("RUN", str(run)).replace("DIR", str(run.parent))

    assert main([place(part) for part in command]) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert place(message) in errors[0]
    assert "Traceback" not in err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert not list(run.parent.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--stepz", "3"], "unrecognized arguments"),
        (["train", "--steps", "many"], "invalid int value: 'many'"),
        (["export"], "the following arguments are required: model"),
    ],
)
def test_a_mistyped_command_is_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_debug_shows_the_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "llmforge", "generate", "nowhere", "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_what_is_printed_to_be_typed_works_without_an_activated_environment(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "argv", [".venv/bin/llmforge", "demo"])
    assert program() == ".venv/bin/llmforge"
    monkeypatch.setattr(sys, "argv", ["/somewhere/llmforge/__main__.py", "demo"])
    assert program() == "python -m llmforge"
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/llmforge")
    assert program() == "llmforge"


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "llmforge demo" in capsys.readouterr().out


LLAMA = ["--preset", "llama-15m", "--vocab-size", "300", "--set", "hidden_size=64", "--set", "intermediate_size=96"]
LLAMA += ["--set", "num_hidden_layers=1", "--set", "max_position_embeddings=32", "--set", "device=cpu"]
LLAMA += ["--set", "eval_batches=2", "--set", "sample_tokens=10"]


@pytest.fixture(scope="session")
def llama(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "llama"
    assert main(["train", str(text), "--out", str(out), "--steps", "4", *LLAMA]) == 0
    return out


def test_a_llama_trains_resumes_and_is_described(llama, tmp_path, capsys):
    run = Path(shutil.copytree(llama, tmp_path / "run"))
    assert "family: llama" in (run / "config.yaml").read_text(encoding="utf-8")
    assert main(["train", "--resume", str(run), "--steps", "6"]) == 0
    assert (run / "step-000006").is_dir()
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    out = capsys.readouterr().out
    assert "Llama " in out
    assert "num_key_value_heads    4" in out
    assert "BPETokenizer, vocabulary of 300" in out
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again"), "--steps", "2"]) == 0
    assert (tmp_path / "again" / "step-000002").is_dir()


def test_a_setting_of_the_other_family_is_named(text, tmp_path, capsys):
    assert main(["train", str(text), "--out", str(tmp_path / "r"), *LLAMA, "--set", "n_layer=2"]) == 2
    assert "unknown LlamaConfig field 'n_layer'; did you mean 'num_hidden_layers'?" in capsys.readouterr().err
    assert main(["train", str(text), "--preset", "llama-15", "--out", str(tmp_path / "r")]) == 2
    assert "unknown preset 'llama-15'; did you mean 'llama-15m'?" in capsys.readouterr().err
    assert main(["train", str(text), "--set", "family=lama", "--out", str(tmp_path / "r")]) == 2
    assert "unknown family 'lama'; did you mean 'llama'?" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_export_goes_from_file_to_file(llama, tmp_path, capsys):
    assert main(["export", str(llama), "--hf", str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    assert main(["export", str(tmp_path / "hf"), "--gguf", str(tmp_path / "a.gguf"), "--file-type", "BF16"]) == 0
    assert main(["info", str(tmp_path / "a.gguf")]) == 0
    assert "llama.attention.head_count_kv" in capsys.readouterr().out
    # A GGUF is a model like any other.
    assert main(["generate", str(tmp_path / "a.gguf"), "--prompt", "En", "--max-new-tokens", "5", "--seed", "1"]) == 0
    assert main(["export", str(tmp_path / "a.gguf"), "--hf", str(tmp_path / "back")]) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


def test_chat_answers_in_the_models_form(llama, tmp_path, capsys, monkeypatch):
    hf = tmp_path / "hf"
    assert main(["export", str(llama), "--hf", str(hf)]) == 0
    arguments = ["chat", str(hf), "--max-new-tokens", "4", "--temperature", "0", "--device", "cpu"]
    assert main(arguments) == 2
    assert "has no chat template: it continues texts and does not answer" in capsys.readouterr().err
    path = hf / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}|{% endfor %}a"
    values = {**json.loads(path.read_text(encoding="utf-8")), "chat_template": template}
    path.write_text(json.dumps(values), encoding="utf-8")
    seen = []
    import llmforge.generation

    stream = llmforge.generation.stream_text

    def spy(model, tokenizer, ids, **options):
        seen.append(tokenizer.decode(ids))
        return stream(model, tokenizer, ids, **options)

    monkeypatch.setattr(llmforge.generation, "stream_text", spy)
    lines = iter(["Hola", "y", "/new", "Lugar"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, ""))
    assert main([*arguments, "--system", "S"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert seen[0] == "sS|uHola|a"
    assert seen[1] == f"sS|uHola|a{answers[0]}|uy|a"
    assert seen[2] == "sS|uLugar|a"
    # What does not fit the context of 32 tokens is forgotten from the front, the system's part last.
    lines = iter([f"pregunta {i}" for i in range(5)])
    assert main([*arguments, "--system", "S"]) == 0
    assert all(text.startswith("sS|u") for text in seen)
    assert "pregunta 0" not in seen[-1]
    assert "pregunta 4" in seen[-1]


def test_a_revision_is_of_a_repository(llama, capsys):
    assert main(["generate", str(llama), "--revision", "main"]) == 2
    assert "is not 'owner/name'" in capsys.readouterr().err
    assert main(["info", "no-such-owner/no-such-model"]) == 2
    assert "neither in the cache nor can it be downloaded" in capsys.readouterr().err
