"""load("owner/name"): from huggingface_hub's cache alone, and from a server on this machine that answers as huggingface.co does."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants

from llmforge.convert import export_gguf, export_hf, load
from llmforge.errors import CheckpointError
from llmforge.models import Llama, LlamaConfig
from llmforge.tokenizers import CharTokenizer

CHARS = CharTokenizer.from_text("En un lugar de la Mancha")
SHAPE = dict(vocab_size=CHARS.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
SHAPE |= dict(num_attention_heads=2, max_position_embeddings=16)
FIRST, SECOND = "1" * 40, "2" * 40  # commits


def toy() -> Llama:
    return Llama(LlamaConfig(**SHAPE)).eval()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10)[None])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of our own, and no network."""
    monkeypatch.chdir(tmp_path)  # "owner/name" must not be a folder here
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put(cache, name: str, model: Llama, *, commit: str, ref: str | None):
    """A model as huggingface_hub keeps it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_hf(model, CHARS, folder)
    if ref is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit, encoding="utf-8")
    return folder


def test_a_model_in_the_cache_needs_no_network(cache, tmp_path):
    models = [toy(), toy()]
    put(cache, "owner/name", models[0], commit=FIRST, ref="main")
    put(cache, "owner/name", models[1], commit=SECOND, ref="v2")
    for revision, expected in [(None, 0), ("main", 0), ("v2", 1), (FIRST, 0), (SECOND, 1)]:
        model, tokenizer = load("owner/name", revision=revision)
        assert torch.equal(logits_of(model), logits_of(models[expected]))
        assert tokenizer.chars == CHARS.chars
    assert not torch.equal(logits_of(models[0]), logits_of(models[1]))
    export_gguf("owner/name", None, tmp_path / "x.gguf", file_type="F32")  # exporters take what load takes
    assert torch.equal(logits_of(load(tmp_path / "x.gguf")[0]), logits_of(models[0]))


def test_what_is_not_in_the_cache_is_explained(cache):
    with pytest.raises(
        CheckpointError,
        match=r"there is no folder owner/name here, and the model owner/name is neither in the cache nor can it be downloaded: "
        r"no network, or HF_HUB_OFFLINE is set",
    ):
        load("owner/name")
    put(cache, "owner/name", toy(), commit=FIRST, ref="main")
    with pytest.raises(CheckpointError, match="the model owner/name at v9 is neither in the cache nor"):
        load("owner/name", revision="v9")


def test_a_repository_without_a_model_is_explained(cache):
    (put(cache, "owner/name", toy(), commit=FIRST, ref="main") / "config.json").unlink()
    with pytest.raises(CheckpointError, match="owner/name holds no model in transformers' form: it has no config.json"):
        load("owner/name")


def test_a_folder_of_that_name_comes_first(cache, tmp_path):
    put(cache, "owner/name", toy(), commit=FIRST, ref="main")
    here = toy()
    export_hf(here, CHARS, tmp_path / "owner" / "name")
    assert torch.equal(logits_of(load("owner/name")[0]), logits_of(here))
    with pytest.raises(CheckpointError, match="revision='v2' is of a model on huggingface.co, but owner/name is not"):
        load("owner/name", revision="v2")


@pytest.mark.parametrize(
    "name", ["name", "./owner/name", "owner/name/part", "/owner/name", "owner/", "-owner/name", "a b/c"]
)
def test_only_owner_and_name_are_looked_for_there(cache, name):
    with pytest.raises(CheckpointError, match=r"does not exist; load takes a run folder, .* or 'owner/name'"):
        load(name)
    with pytest.raises(CheckpointError, match="revision='main' is of a model on huggingface.co"):
        load(name, revision="main")


# --- Through HTTP


class Hub(BaseHTTPRequestHandler):
    """The part of huggingface.co's API with which a repository is listed and downloaded."""

    files: ClassVar[dict[str, bytes]] = {}  # of owner/name, at its one commit
    asked: ClassVar[list[str]] = []

    def log_message(self, *args):
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.asked.append("/".join(parts))
        if parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), *parts[4:6])
        elif parts[:3] == ["owner", "name", "resolve"] and (content := self.files.get("/".join(parts[4:]))) is not None:
            self.answer(content, X_Repo_Commit=FIRST, ETag=f'"{hash(content) & (2**63 - 1):040x}"')
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def api(self, repository: str, what: str = "revision", revision: str = "main"):
        if repository == "owner/gated":
            self.answer(b"{}", 403, X_Error_Code="GatedRepo")
        elif repository != "owner/name":
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", FIRST):
            self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
        elif what == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": f"{hash(path) & (2**63 - 1):040x}"}
                for path, content in self.files.items()
            ]
            self.answer(json.dumps(tree).encode(), Content_Type="application/json")
        else:
            siblings = [{"rfilename": path} for path in self.files]
            info = {"id": repository, "modelId": repository, "sha": FIRST, "siblings": siblings, "tags": []}
            self.answer(json.dumps(info).encode(), Content_Type="application/json")


SCRIPT = """
import json, sys, warnings
import torch
from llmforge.convert import load
from llmforge.errors import CheckpointError

answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        model, tokenizer = load(name, revision=revision)
        with torch.no_grad():
            answers.append([model(torch.arange(10)[None]).flatten().tolist(), tokenizer.vocab_size])
    except CheckpointError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def load_elsewhere(home, endpoint: str, *requests: tuple[str, str | None]) -> list:
    """What `load` gives in a process that knows another huggingface.co from its environment."""
    hidden = ("HF_", "HUGGING", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(requests)],
        capture_output=True,
        env=environment,
        cwd=home,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == len(requests)
    return answers


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_model_is_downloaded_once_and_no_pickle_with_it(server, monkeypatch, tmp_path):
    model = toy()
    export_hf(model, CHARS, tmp_path / "hf", max_shard_bytes=3000)
    files = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    others = ["pytorch_model.bin", "model.pt", "modeling_x.py", "original/model.safetensors", "onnx/config.json"]
    others += [
        "extra/model.safetensors",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "model.gguf",
        "flax_model.msgpack",
    ]
    monkeypatch.setattr(Hub, "files", {**files, **dict.fromkeys(others, b"never")})
    monkeypatch.setattr(Hub, "asked", [])
    (tmp_path / "home").mkdir()
    found, missing, private, gated = load_elsewhere(
        tmp_path / "home",
        server,
        ("owner/name", None),
        ("owner/name", "v9"),
        ("owner/other", None),
        ("owner/gated", None),
    )
    assert found == [logits_of(model).flatten().tolist(), CHARS.vocab_size]
    fetched = {path.split("/", 4)[4] for path in Hub.asked if "/resolve/" in path}
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) > 2
    assert fetched == {*weights, *(name for name in files if name.endswith(".json"))}
    assert missing == "owner/name has no revision 'v9' on huggingface.co"
    assert private.startswith(
        "there is no folder owner/other here and no model owner/other on huggingface.co (or it is"
    )
    assert gated.startswith("owner/gated is gated: accept its terms at https://huggingface.co/owner/gated, then log in")
    # From now on the server is not needed.
    again, unknown = load_elsewhere(
        tmp_path / "home", "http://127.0.0.1:9", ("owner/name", None), ("owner/other", None)
    )
    assert again == found
    assert "the model owner/other is neither in the cache nor can it be downloaded: no network" in unknown
