"""llama.cpp in a process of its own: reads a request, writes what it computed. A failed assertion there ends this process only.

    python llama_cpp_worker.py FOLDER

FOLDER/request.json   {"gguf", "n_ctx", "windows": [length, ...], "prompt_tokens", "greedy_tokens"}
FOLDER/text.txt       UTF-8, to be tokenized
FOLDER/ids.i32        the ids to compute logits of: the windows one after the other; the prompt is their beginning
FOLDER/tokens.i32     <- ids of text.txt
FOLDER/pieces.bin     <- bytes of those ids, one by one, as programs show them while they stream
FOLDER/detokenized.bin <- bytes of those ids, all at once
FOLDER/logits.f32     <- (number of ids, n_vocab)
FOLDER/greedy.i32     <- the most probable continuation of the prompt
FOLDER/response.json  <- {"n_vocab"}

It imports nothing of llmforge: verify.py runs it as a file, so that torch is not loaded twice.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def main(folder: Path) -> None:
    """Answer the request in `folder`."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    llama = _load(request["gguf"], request["n_ctx"])
    vocab = llama_cpp.llama_model_get_vocab(llama.model)

    tokens = llama.tokenize((folder / "text.txt").read_bytes(), add_bos=False, special=False)
    np.array(tokens, dtype=np.int32).tofile(folder / "tokens.i32")
    pieces = {token: _piece(vocab, token) for token in set(tokens)}
    (folder / "pieces.bin").write_bytes(b"".join(pieces[token] for token in tokens))
    (folder / "detokenized.bin").write_bytes(_detokenize(vocab, tokens))

    ids = np.fromfile(folder / "ids.i32", dtype=np.int32).tolist()
    with (folder / "logits.f32").open("wb") as out:
        start = 0
        for length in request["windows"]:
            llama.reset()
            llama.eval(ids[start : start + length])
            llama.scores[:length].tofile(out)
            start += length

    llama.reset()
    llama.eval(ids[: request["prompt_tokens"]])
    greedy: list[int] = []
    while len(greedy) < request["greedy_tokens"]:
        greedy.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(greedy[-1:])
    np.array(greedy, dtype=np.int32).tofile(folder / "greedy.i32")
    (folder / "response.json").write_text(json.dumps({"n_vocab": llama.n_vocab()}), encoding="utf-8")


def _load(gguf: str, n_ctx: int) -> Any:
    # Without the weights repacked for the CPU: llama.cpp built by GCC 12 crashes on Q8_0 there, on a CPU with AMX. The binding has
    # no argument for it, so the defaults that it starts from are changed.
    module = llama_cpp.llama_cpp
    defaults = module.llama_model_default_params

    def without_extra_buffers() -> Any:
        params = defaults()
        if hasattr(params, "use_extra_bufts"):
            params.use_extra_bufts = False
        return params

    module.llama_model_default_params = without_extra_buffers
    # Keys and values as float32 and no flash attention: what is compared is the file, not the cache's rounding.
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(gguf, n_ctx=n_ctx, logits_all=True, flash_attn=False, type_k=f32, type_v=f32, verbose=True)


def _piece(vocab: Any, token: int) -> bytes:
    return _filled(lambda buffer, size: llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, True))


def _detokenize(vocab: Any, tokens: list[int]) -> bytes:
    array, n = (llama_cpp.llama_token * len(tokens))(*tokens), len(tokens)
    return _filled(lambda buffer, size: llama_cpp.llama_detokenize(vocab, array, n, buffer, size, False, True))


def _filled(call: Callable[[Any, int], int]) -> bytes:
    """What a llama.cpp function writes into a buffer; it says how many bytes, or minus how many it needs."""
    size = 1024
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = call(buffer, size)
        if length >= 0:
            return buffer.raw[:length]
        size = -length


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as error:  # one line, so that llama.cpp's own words stay the last ones
        sys.exit(f"{type(error).__name__}: {error}")
