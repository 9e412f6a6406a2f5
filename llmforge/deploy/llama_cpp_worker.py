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

Or, where the request has "prompts", it answers these (compare.py):

FOLDER/request.json   {"gguf", "context", "prompts": [{"before", "after", "raw"}, ...], "add_bos", "max_new_tokens", "temperature",
                      "seed", "stop"}
FOLDER/response.json  <- {"answers": [{"text", "scored", "nats", "n_bytes", "cut"}, ...]}

It imports nothing of llmforge: it is run as a file, so that torch is not loaded twice.
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
    if "prompts" in request:
        answers = _answers(request)
        (folder / "response.json").write_text(json.dumps({"answers": answers}), encoding="utf-8")
        return
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


def _answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model writes after each prompt, and -log p of what it should write."""
    vocab_only = llama_cpp.Llama(request["gguf"], vocab_only=True, verbose=True)
    vocab = llama_cpp.llama_model_get_vocab(vocab_only.model)
    context = request["context"] or llama_cpp.llama_model_n_ctx_train(vocab_only.model)
    prepared = []
    for prompt in request["prompts"]:
        special = not prompt["raw"]
        start = vocab_only.tokenize(prompt["before"].encode(), add_bos=False, special=special)
        bos = [llama_cpp.llama_vocab_bos(vocab)] if request["add_bos"] else []
        before = start if bos == start[:1] else bos + start  # a template may have written it
        after: list[int] = []
        if prompt["after"] is not None:
            after = vocab_only.tokenize(prompt["after"].encode(), add_bos=False, special=special)
            if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_SPM:  # it puts a space before a text
                whole = vocab_only.tokenize(
                    (prompt["before"] + prompt["after"]).encode(), add_bos=False, special=special
                )
                after = whole[len(start) :] if whole[: len(start)] == start else after
            ends = [i for i, token in enumerate(after) if special and llama_cpp.llama_vocab_is_eog(vocab, token)]
            if ends:
                after = after[: ends[-1] + 1]
            elif (eos := llama_cpp.llama_vocab_eos(vocab)) >= 0:
                after = [*after, eos]
        prepared.append((before, after))
    longest = max(len(before) + max(len(after), request["max_new_tokens"]) for before, after in prepared)
    llama = _load(request["gguf"], min(context, longest), logits_all=False)
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    return [_answer(llama, vocab, before, after, context, request) for before, after in prepared]


def _answer(llama: Any, vocab: Any, before: list[int], after: list[int], context: int, request: dict[str, Any]) -> Any:
    # As compare.py fits them into the context: the prompt loses its beginning, then the answer its end.
    scored = after[:context]
    read = before[-max(1, context + 1 - len(scored)) :]
    nats = 0.0
    if scored:
        llama.reset()
        llama.eval(read)
        for i, token in enumerate(scored):
            nats -= float(_log_probabilities(llama)[token])
            if i + 1 < len(scored):
                llama.eval([token])

    random = np.random.default_rng(request["seed"])
    llama.reset()
    llama.eval(before[-(context - 1) :])
    answer: list[int] = []
    written = b""
    while len(answer) < request["max_new_tokens"]:
        token = _choose(_log_probabilities(llama), request["temperature"], random)
        if llama_cpp.llama_vocab_is_eog(vocab, token):
            break
        answer.append(token)
        written += _piece(vocab, token)
        if any(stop.encode() in written for stop in request["stop"]) or llama.n_tokens >= context:
            break
        llama.eval([token])
    text = written.decode(errors="replace")
    found = min((text.find(stop) for stop in request["stop"] if stop in text), default=len(text))
    return {
        "text": text[:found],
        "scored": scored,
        "nats": nats,
        "n_bytes": sum(len(_piece(vocab, token)) for token in scored)
        if len(scored) < len(after)
        else None,  # all of them
        "cut": len(scored) < len(after) or len(read) < len(before),
    }


def _log_probabilities(llama: Any) -> Any:
    """Of the next token, (n_vocab) float64."""
    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    logits = np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)).astype(np.float64)
    logits -= logits.max()
    return logits - np.log(np.exp(logits).sum())


def _choose(log_probabilities: Any, temperature: float, random: np.random.Generator) -> int:
    if temperature == 0:
        return int(log_probabilities.argmax())
    scaled = log_probabilities / temperature
    weights = np.exp(scaled - scaled.max())
    return int(random.choice(len(weights), p=weights / weights.sum()))


def _load(gguf: str, n_ctx: int, *, logits_all: bool = True) -> Any:
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
    return llama_cpp.Llama(
        gguf, n_ctx=n_ctx, logits_all=logits_all, flash_attn=False, type_k=f32, type_v=f32, verbose=True
    )


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
