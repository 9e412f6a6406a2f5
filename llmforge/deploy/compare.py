"""Two models on the same prompts: what each answers, and how well each predicts the answers that it should give."""

import gc
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from llmforge.convert.load import load, open_model
from llmforge.deploy.chat_form import FileChat
from llmforge.deploy.pages import html_page, markdown_page, terminal_text
from llmforge.deploy.prompts import Prompt, prompt_of, read_prompts
from llmforge.deploy.verify import require_llama_cpp, run_llama_cpp
from llmforge.errors import ConfigError, DataError
from llmforge.formats.gguf import read_gguf_header
from llmforge.generation import Sampling, stream_text
from llmforge.tokenizers import Tokenizer, render_chat
from llmforge.tokenizers.templates import has_input, joined_input

Engine = Literal["torch", "llama.cpp"]
ENGINES: tuple[Engine, ...] = ("torch", "llama.cpp")
Model = str | os.PathLike[str] | tuple[nn.Module, Tokenizer]

_CHUNK = 256  # positions whose logits are held at a time: a vocabulary may have 128k tokens


@dataclass(frozen=True, kw_only=True)
class AnswerLoss:
    """How well a model predicts answers that it was not shown: on the tokens of the answers alone, the end token included."""

    nats: float  # sum over the tokens
    n_tokens: int
    n_bytes: int  # UTF-8, of the answers' text

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which does not depend on the tokenizer."""
        return self.nats / math.log(2) / max(1, self.n_bytes)

    @classmethod
    def total(cls, losses: Iterable["AnswerLoss | None"]) -> "AnswerLoss | None":
        """All of them as one text; None where there is none."""
        found = [loss for loss in losses if loss is not None]
        if not found:
            return None
        sums = (
            sum(loss.nats for loss in found),
            sum(loss.n_tokens for loss in found),
            sum(loss.n_bytes for loss in found),
        )
        return cls(nats=sums[0], n_tokens=sums[1], n_bytes=sums[2])


@dataclass(frozen=True, kw_only=True)
class ComparedPrompt:
    """One prompt and what came of it."""

    prompt: str
    reference: str | None
    base: str
    tuned: str
    base_loss: AnswerLoss | None  # on the reference
    tuned_loss: AnswerLoss | None

    @property
    def changed(self) -> bool:
        """The two answers differ in more than blanks around them."""
        return self.base.strip() != self.tuned.strip()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same prompts; `str(comparison)` is for a terminal."""

    base: str  # names
    tuned: str
    rows: list[ComparedPrompt]
    temperature: float
    max_new_tokens: int
    seed: int
    same_tokens: (
        bool  # both models cut the reference answers into the same tokens, so that figures per token can be compared
    )
    notes: list[str] = field(default_factory=list)

    @property
    def base_loss(self) -> AnswerLoss | None:
        """On all reference answers; None where there are none."""
        return AnswerLoss.total(row.base_loss for row in self.rows)

    @property
    def tuned_loss(self) -> AnswerLoss | None:
        """On all reference answers; None where there are none."""
        return AnswerLoss.total(row.tuned_loss for row in self.rows)

    @property
    def changed_fraction(self) -> float:
        """Of the prompts: those with another answer."""
        return sum(row.changed for row in self.rows) / len(self.rows)

    def summary(self) -> list[tuple[str, str, str]]:
        """The figures: what, of the base, of the tuned model."""
        base, tuned = self.base_loss, self.tuned_loss
        if base is None or tuned is None:
            return []
        rows = [("bits per byte", f"{base.bits_per_byte:.4f}", f"{tuned.bits_per_byte:.4f}")]
        per_token = [
            ("loss (nats per token)", f"{base.loss:.4f}", f"{tuned.loss:.4f}"),
            ("perplexity", f"{base.perplexity:.4g}", f"{tuned.perplexity:.4g}"),
            ("answer tokens", f"{base.n_tokens:,}", f"{tuned.n_tokens:,}"),
        ]
        return [*per_token, *rows] if self.same_tokens else [*rows, *per_token]

    def facts(self) -> list[str]:
        """Sentences about the whole."""
        changed = sum(row.changed for row in self.rows)
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}, seed {self.seed} for both"
        facts = [
            f"{changed} of {len(self.rows)} answers changed ({self.changed_fraction:.0%}); {how}, at most {self.max_new_tokens} tokens"
        ]
        if self.base_loss is not None and not self.same_tokens:
            facts.append("the two models have different tokens: compare the bits per byte, not the figures per token")
        return [*facts, *self.notes]

    def to_text(self, width: int = 100, *, references: bool = False) -> str:
        """For a terminal of `width` columns: the answers side by side, or one below the other where it is narrow.

        Args:
            references: show the reference answers too.
        """
        return terminal_text(self, width, references=references)

    def to_markdown(self) -> str:
        """A page in Markdown."""
        return markdown_page(self)

    def to_html(self) -> str:
        """A page in HTML: one file, no scripts, nothing from elsewhere."""
        return html_page(self)

    def __str__(self) -> str:
        return self.to_text()


def compare_models(
    base: Model,
    tuned: Model,
    prompts: str | os.PathLike[str] | Sequence[Prompt | str | Mapping[str, Any]],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 200,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    raw: bool = False,
    engine: Engine = "torch",
    limit: int | None = None,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    timeout_seconds: float = 3600,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Let two models answer the same prompts, one model in memory at a time.

    Args:
        base, tuned: whatever `load` takes (a run, a folder, an adapter's folder, a .gguf file), or (model, tokenizer) in memory.
        prompts: a file as for `read_prompts`, or the records themselves.
        temperature, top_k, top_p: of sampling; 0 = always the most probable token. Both models draw with the same `seed`.
        max_new_tokens: of an answer.
        stop: texts that end an answer.
        raw: give the prompt as it is, without a chat template. A model without a template takes the other's, so that both read the
            same text; where neither has one, the prompt goes in as it is.
        engine: "torch", or "llama.cpp" for those of the two that are .gguf files (needs llama-cpp-python, in a process of its own).
        limit: take the first so many prompts.
        tokenizer: for a model without one.
        device, dtype: of the weights, for "torch".
        timeout_seconds: for llama.cpp.
        progress: called with answers given and answers in all.
    Returns:
        the answers, and where prompts have reference answers, each model's loss on these.
    Raises:
        DataError: prompts that cannot be read, or no tokenizer.
        ConfigError: a setting that cannot work.
        CheckpointError, ConvertError: a model that cannot be read, or that llama.cpp cannot run.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine ({engine!r}) must be 'torch' or 'llama.cpp'")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p)  # checks them before a model is read
    if isinstance(prompts, str | os.PathLike):
        asked = read_prompts(prompts, limit=limit)
    else:
        asked = [prompt_of(record) for record in prompts][:limit]
    if not asked:
        raise DataError("there are no prompts; give one at least")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    with_llama_cpp = [engine == "llama.cpp" and _is_gguf(model) for model in (base, tuned)]
    if engine == "llama.cpp":
        require_llama_cpp()
        if not any(with_llama_cpp):
            raise ConfigError(
                "engine 'llama.cpp' runs .gguf files, and neither model is one; leave it out, or export one"
            )
        if top_k is not None or top_p is not None:
            raise ConfigError("engine 'llama.cpp' samples by temperature alone; leave out top_k and top_p")
    sides = [
        _Side.of_file(model) if llama_cpp else _Side.of_model(model, tokenizer)
        for model, llama_cpp in zip((base, tuned), with_llama_cpp, strict=True)
    ]
    notes = _share(sides, raw)
    results: list[list[_Answer]] = []
    for side, llama_cpp in zip(sides, with_llama_cpp, strict=True):
        done = sum(map(len, results))
        if llama_cpp:
            answers = _llama_cpp_answers(side, asked, max_new_tokens, temperature, seed, stop, timeout_seconds)
        else:
            answers = _torch_answers(side, asked, max_new_tokens, stop, seed, sampling, device, dtype)
        found = []
        for answer in answers:
            found.append(answer)
            if progress is not None:
                progress(done + len(found), 2 * len(asked))
        results.append(found)
        gc.collect()  # before the other model is read
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for side, found in zip(sides, results, strict=True):
        if cut := sum(answer.cut for answer in found):
            notes.append(f"{side.name}: {cut} prompts with their answers are longer than its context and were cut")
    rows = [
        ComparedPrompt(
            prompt=prompt.title,
            reference=prompt.answer,
            base=left.text,
            tuned=right.text,
            base_loss=left.loss,
            tuned_loss=right.loss,
        )
        for prompt, left, right in zip(asked, *results, strict=True)
    ]
    return Comparison(
        base=sides[0].name,
        tuned=sides[1].name,
        rows=rows,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        same_tokens=all(left.scored == right.scored for left, right in zip(*results, strict=True)),
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    text: str
    loss: AnswerLoss | None
    scored: list[int]  # ids of the reference answer
    cut: bool = False  # more than the context holds


@dataclass
class _Side:
    """One of the two models, before it is in memory."""

    name: str
    model: Model
    chat_template: str | None
    special_tokens: Mapping[str, str]
    tokenizer: Tokenizer | None  # None: a file that llama.cpp tokenizes for
    add_bos: bool = False
    context: int | None = None

    @classmethod
    def of_file(cls, model: Model) -> "_Side":
        """A GGUF for llama.cpp: any that llama.cpp knows."""
        path = Path(cast(str, model))
        metadata = read_gguf_header(path).metadata
        chat = FileChat.from_metadata(metadata)
        context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        return cls(
            name=str(path),
            model=path,
            chat_template=chat.chat_template,
            special_tokens=chat.special_tokens,
            tokenizer=None,
            add_bos=chat.add_bos,
            context=context if isinstance(context, int) else None,
        )

    @classmethod
    def of_model(cls, model: Model, tokenizer: Tokenizer | None) -> "_Side":
        if isinstance(model, tuple):
            name, own = type(model[0]).__name__, model[1]
        else:  # the weights wait on the disk
            name, own = os.fspath(model), cast(Tokenizer, open_model(model)[1] or tokenizer)
        if own is None:
            raise DataError(f"{name} has no tokenizer.json; name a folder that has one (--tokenizer)")
        return cls(
            name=name,
            model=model,
            chat_template=getattr(own, "chat_template", None),
            special_tokens=getattr(own, "special_tokens", {}),
            tokenizer=own,
        )

    def is_raw(self, prompt: Prompt) -> bool:
        """Whether the model reads this prompt without a chat template."""
        return prompt.raw or self.chat_template is None

    def texts(self, prompt: Prompt) -> tuple[str, str | None]:
        """The text that the model reads, and what it should write; None where that is not known. A template writes its end, too."""
        if self.is_raw(prompt):
            return prompt.text, prompt.answer
        # render_chat looks at these two alone: the template may be the other model's.
        chat = cast(Tokenizer, SimpleNamespace(chat_template=self.chat_template, special_tokens=self.special_tokens))
        asked = list(prompt.messages)
        if not has_input(chat):  # no place for an Alpaca record's
            asked = [joined_input(message) for message in asked]
        before = render_chat(chat, asked, tools=prompt.tools)
        if prompt.answer is None:
            return before, None
        messages = [*asked, {"role": "assistant", "content": prompt.answer}]
        whole = render_chat(chat, messages, add_generation_prompt=False, tools=prompt.tools)
        if whole.startswith(before):
            return before, whole[len(before) :]
        return before, prompt.answer


def _is_gguf(model: Model) -> bool:
    return not isinstance(model, tuple) and Path(model).suffix.lower() == ".gguf"


def _share(sides: list[_Side], raw: bool) -> list[str]:
    """Both models read the same text: one without a chat template takes the other's."""
    if raw:
        for side in sides:
            side.chat_template = None
        return []
    notes = []
    for side, other in (sides, sides[::-1]):
        if side.chat_template is None and other.chat_template is not None:
            side.chat_template = other.chat_template
            notes.append(f"{side.name} has no chat template and reads the prompts in that of {other.name}")
            break
    return notes


# torch


def _torch_answers(
    side: _Side,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop: Sequence[str],
    seed: int,
    sampling: Mapping[str, Any],
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Iterator[_Answer]:
    tokenizer = cast(Tokenizer, side.tokenizer)
    with _in_memory(side.model, device, dtype) as model:
        context: int | None = getattr(model, "context_length", None)
        rows: int | None = getattr(getattr(model, "lm_head", None), "out_features", None)
        for prompt in prompts:
            before, after = side.texts(prompt)
            raw = side.is_raw(prompt)
            if raw:
                ids = getattr(tokenizer, "prompt_ids", tokenizer.encode)(before)
            else:
                ids = tokenizer.encode_special(before)
                if getattr(tokenizer, "add_bos", False) and ids[:1] != [tokenizer.bos_token_id]:
                    ids = [cast(int, tokenizer.bos_token_id), *ids]
            answer_ids = None if after is None else _answer_ids(tokenizer, after, raw=raw)
            _check_ids([*ids, *(answer_ids or [])], rows, side.name)
            pieces = stream_text(model, tokenizer, ids, max_new_tokens=max_new_tokens, stop=stop, seed=seed, **sampling)
            text = "".join(pieces)
            if answer_ids is None or prompt.answer is None:
                yield _Answer(text=text, loss=None, scored=[])
                continue
            kept_ids, kept = _fit(ids, answer_ids, context)
            cut = len(kept) < len(answer_ids)
            n_bytes = len(tokenizer.decode_bytes(kept)) if cut else len(prompt.answer.encode())
            loss = AnswerLoss(nats=_nats(model, kept_ids, kept), n_tokens=len(kept), n_bytes=n_bytes)
            yield _Answer(text=text, loss=loss, scored=kept, cut=cut or len(kept_ids) < len(ids))


@contextmanager
def _in_memory(model: Model, device: str | torch.device, dtype: torch.dtype | None) -> Iterator[nn.Module]:
    """The model, ready to compute; one that is read from the disk lives as long as its user holds it."""
    if isinstance(model, tuple):
        was_training = model[0].training
        model[0].eval()
        try:
            yield model[0]
        finally:
            model[0].train(was_training)
        return
    yield load(model, device=device, dtype=dtype)[0]


def _answer_ids(tokenizer: Tokenizer, text: str, *, raw: bool) -> list[int]:
    """Ids of an answer by itself, since the model is given its prompt's, whatever follows; with the token that ends it.

    As tuning has them: what a template writes after the end is the beginning of the next question.
    """
    if hasattr(tokenizer, "encode_batch"):
        ids: list[int] = tokenizer.encode_batch([text], special=not raw, after=True)[0].tolist()
    else:  # one of four methods
        ids = tokenizer.encode(text)
    if not raw:
        ends = getattr(tokenizer, "end_token_ids", {tokenizer.eos_token_id})
        last = max((i for i, token in enumerate(ids) if token in ends), default=None)
        if last is not None:
            return ids[: last + 1]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _fit(ids: list[int], answer: list[int], context: int | None) -> tuple[list[int], list[int]]:
    """Prompt and answer in the context: first the prompt loses its beginning, then the answer its end."""
    if context is None:
        return ids, answer
    answer = answer[:context]  # the last token is predicted, not read
    return ids[-max(1, context + 1 - len(answer)) :], answer


def _check_ids(ids: Sequence[int], rows: int | None, name: str) -> None:
    if rows is not None and max(ids) >= rows:
        raise ConfigError(
            f"a prompt has the id {max(ids)}, {name} {rows:,} tokens; give the tokenizer that it was trained with"
        )


@torch.no_grad()
def _nats(model: Any, ids: list[int], answer: list[int]) -> float:
    """-log p(answer | prompt), summed over the answer's tokens."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    idx = torch.tensor([[*ids, *answer[:-1]]], dtype=torch.long, device=device)
    targets = torch.tensor(answer, dtype=torch.long, device=device)
    is_family = hasattr(model, "features") and hasattr(model, "lm_head")
    states = (model.features(idx) if is_family else model(idx))[0, len(ids) - 1 :]  # (n, C), or logits (n, V)
    total = 0.0
    for some, theirs in zip(torch.split(states, _CHUNK), torch.split(targets, _CHUNK), strict=True):
        logits = model.lm_head(some) if is_family else some
        total += F.cross_entropy(logits.float(), theirs, reduction="sum").item()
    return total


# llama.cpp


def _llama_cpp_answers(
    side: _Side,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop: Sequence[str],
    timeout_seconds: float,
) -> Iterator[_Answer]:
    path = Path(cast(str, side.model))
    texts = [side.texts(prompt) for prompt in prompts]
    request = {
        "gguf": str(path.resolve()),
        "context": side.context,
        "prompts": [
            {"before": before, "after": after, "raw": side.is_raw(prompt)}
            for prompt, (before, after) in zip(prompts, texts, strict=True)
        ],
        "add_bos": side.add_bos,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "stop": list(stop),
    }
    with tempfile.TemporaryDirectory(prefix="llmforge-compare-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        run_llama_cpp(folder, path, timeout_seconds)
        found = json.loads((folder / "response.json").read_text(encoding="utf-8"))
    for prompt, answer in zip(prompts, found["answers"], strict=True):
        loss = None
        if answer["scored"] and prompt.answer is not None:
            n_bytes = len(prompt.answer.encode()) if answer["n_bytes"] is None else answer["n_bytes"]
            loss = AnswerLoss(nats=answer["nats"], n_tokens=len(answer["scored"]), n_bytes=n_bytes)
        yield _Answer(text=answer["text"], loss=loss, scored=answer["scored"], cut=answer["cut"])
