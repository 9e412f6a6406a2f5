"""Text from a language model: sampling with a KV cache, whole or as a stream.

Any module with `forward(idx) -> logits (B, T, V)` will do. The families of `llmforge.models` also have `features`, `lm_head` and a
`context_length`, and are then read through a KV cache: one token costs one token.
"""

import codecs
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.config import Config
from llmforge.errors import ConfigError
from llmforge.nn import KVCache, StaticKVCache, constant_weights
from llmforge.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How the next token is chosen from the logits; the filters apply in the order of the fields, as in transformers.

    Raises:
        ConfigError: a value out of range.
    """

    # Divides positive and multiplies negative logits of tokens seen; 1 = off (arXiv:1909.05858).
    repetition_penalty: float = 1.0
    temperature: float = 1.0  # divides the logits; 0 = greedy, always the most probable token
    top_k: int | None = None  # keep the k most probable tokens
    top_p: float | None = None  # keep the smallest set whose probabilities reach p (arXiv:1904.09751)
    min_p: float | None = None  # keep tokens at least min_p times as probable as the best one (arXiv:2407.01082)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature ({self.temperature}) must be 0 (greedy) or more; 0.8 is a good start")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(f"repetition_penalty ({self.repetition_penalty}) must be above 0; 1.0 = off")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k ({self.top_k}) must be at least 1; leave it out to keep all tokens")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ConfigError(f"{name} ({value}) must be above 0 and at most 1; leave it out to keep all tokens")

    def choose(self, logits: Tensor, seen: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token per row.

        Args:
            logits: (B, V), of the last position.
            seen: (B, T), the tokens so far, for the repetition penalty.
            generator: source of randomness, on the device of the logits.
        Returns:
            (B,) int64
        """
        logits = logits.float()
        if self.repetition_penalty != 1.0:
            score = logits.gather(1, seen)
            score = torch.where(score < 0, score * self.repetition_penalty, score / self.repetition_penalty)
            logits = logits.scatter(1, seen, score)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p is not None and self.top_p < 1.0:
            ordered, order = logits.sort(descending=True)
            probs = ordered.softmax(-1)
            drop = probs.cumsum(-1) - probs >= self.top_p  # the tokens ahead of this one reach p already
            logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
        if self.min_p is not None:
            probs = logits.softmax(-1)
            logits = logits.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def generate(
    model: nn.Module,
    idx: Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    compile: bool = False,
    **sampling: Any,
) -> Tensor:
    """Continue a batch of token sequences.

    Args:
        model: maps (B, T) ids to (B, T, V) logits.
        idx: (B, T) int64, T >= 1: prompts of equal length; see `generate_batch` for others.
        max_new_tokens: how many tokens to add at most.
        eos_token_id: a row that produced it is finished and filled up with it; the batch ends when all rows are finished.
        seed: same seed, same text; None = different every time.
        use_cache: False reads the whole context again for every token: slower, same result.
        compile: compile the step from one token to the next (CUDA graphs on a GPU): worth its half a minute for long texts.
        **sampling: fields of `Sampling`.
    Returns:
        (B, T + new) int64, the prompts and what was added.
    Beyond the model's context the window slides: each new token is chosen from the last `context_length` ones, and since positions
    move with the window, the cache is of no use there.
    """
    return _continue(model, idx, None, max_new_tokens, eos_token_id, seed, use_cache, compile, sampling)


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    compile: bool = False,
    **sampling: Any,
) -> list[list[int]]:
    """Continue prompts of different length together.

    Each row is what `generate` gives for its prompt alone, up to the order of float sums; sampled rows draw from one generator.

    Args:
        model: of a family of `llmforge.models`; any other module is asked one prompt at a time.
        prompts: ids, at least one each.
        **: as for `generate`.
    Returns:
        for each prompt, it and what was added, without eos_token_id and what follows.
    """
    if not prompts or not all(prompts):
        raise ConfigError(f"generate_batch needs prompts of at least one token each, got {[len(p) for p in prompts]}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    settings = (max_new_tokens, eos_token_id, seed, use_cache, compile, sampling)
    longest = max(map(len, prompts))
    if not _is_family(model) and any(len(prompt) < longest for prompt in prompts):
        rows = [_continue(model, torch.tensor([list(p)], device=device), None, *settings)[0] for p in prompts]
        starts = [0] * len(prompts)
    else:
        starts = [longest - len(prompt) for prompt in prompts]
        # Filled up at the left with a token that the prompt has anyway: a repetition penalty must not meet others.
        filled = [[*[prompt[0]] * start, *prompt] for prompt, start in zip(prompts, starts, strict=True)]
        padding = torch.tensor(starts, device=device) if any(starts) else None
        rows = list(_continue(model, torch.tensor(filled, device=device), padding, *settings))
    results = []
    for row, start, prompt in zip(rows, starts, prompts, strict=True):
        ids = row[start:].tolist()
        new = ids[len(prompt) :]
        results.append([*prompt, *(new[: new.index(eos_token_id)] if eos_token_id in new else new)])
    return results


def _continue(
    model: nn.Module,
    idx: Tensor,
    padding: Tensor | None,
    max_new_tokens: int,
    eos_token_id: int | None,
    seed: int | None,
    use_cache: bool,
    compile: bool,
    sampling: dict[str, Any],
) -> Tensor:
    finished = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    for token in _tokens(model, idx, padding, max_new_tokens, seed, use_cache, compile, sampling):
        if eos_token_id is not None:
            token = token.masked_fill(finished, eos_token_id)
            finished |= token == eos_token_id
        idx = torch.cat([idx, token[:, None]], dim=1)
        if finished.all():
            break
    return idx


def generate_text(model: nn.Module, tokenizer: Tokenizer, prompt: str, **options: Any) -> str:
    """The prompt and its continuation as one text; options as for `stream_text`."""
    return prompt + "".join(stream_text(model, tokenizer, prompt, **options))


def stream_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 200,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    use_cache: bool = True,
    compile: bool = False,
    **sampling: Any,
) -> Iterator[str]:
    """Continue a text, piece by piece as it is generated.

    Args:
        prompt: the beginning, as text or as ids; an empty text starts from the token that begins texts, or else a line break.
        max_new_tokens: how many tokens to add at most; fewer when the model ends the text.
        stop: strings that end the text; they are not part of it.
        seed, use_cache, compile, **sampling: as for `generate`.
    Yields:
        the new text only, in pieces of whole characters: bytes of an unfinished character and the possible beginning of a stop
        string are held back until the next token decides.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise ConfigError("a stop string must not be empty; leave it out to generate max_new_tokens tokens")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # A tokenizer of four methods that does not inherit from `Tokenizer` has neither of these two.
    prompt_ids = getattr(tokenizer, "prompt_ids", tokenizer.encode)
    end_token_ids = getattr(tokenizer, "end_token_ids", {tokenizer.eos_token_id})
    ids = prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
    ids = ids or _beginning(tokenizer)
    rows = getattr(getattr(model, "lm_head", None), "out_features", None)
    if rows is not None and max(ids) >= rows:
        raise ConfigError(
            f"the prompt has the id {max(ids)}, the model {rows:,} tokens; take the tokenizer that it was trained with"
        )
    idx = torch.tensor([ids], dtype=torch.long, device=device)
    to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    for token in _tokens(model, idx, None, max_new_tokens, seed, use_cache, compile, sampling):
        token_id = int(token)
        if token_id in end_token_ids:
            break
        held += to_text.decode(tokenizer.decode_bytes([token_id]))
        found = min((held.find(s) for s in stops if s in held), default=-1)
        if found >= 0:
            yield held[:found]
            return
        ready = len(held) - max((_overlap(held, s) for s in stops), default=0)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if rest := held + to_text.decode(b"", final=True):
        yield rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that ends `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """Tokens to start from when there are none: a line break, or the end-of-text token where there is none."""
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return [tokenizer.eos_token_id or 0]


def _is_family(model: nn.Module) -> bool:
    """Whether the model can be read through a KV cache: it is one of ours, or does the same."""
    return all(hasattr(model, name) for name in ("features", "lm_head", "context_length"))


@torch.no_grad()
def _tokens(
    model: nn.Module,
    idx: Tensor,
    padding: Tensor | None,
    max_new_tokens: int,
    seed: int | None,
    use_cache: bool,
    compile: bool,
    sampling: dict[str, Any],
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,) int64, `max_new_tokens` times; `padding` as in `KVCache`."""
    settings = Sampling.from_dict(sampling)
    if idx.ndim != 2 or idx.shape[1] == 0:
        raise ConfigError(f"idx must be (B, T) with at least one token, got shape {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens ({max_new_tokens}) must be 0 or more")
    generator = torch.Generator(device=idx.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    reader = _Reader(model, idx.shape[1] + max_new_tokens, padding, use_cache=use_cache, compile=compile)
    was_training = model.training
    model.eval()  # no dropout
    try:
        for _ in range(max_new_tokens):
            token = settings.choose(reader.next_logits(idx), idx, generator)  # (B,)
            idx = torch.cat([idx, token[:, None]], dim=1)
            yield token
    finally:
        model.train(was_training)


class _Reader:
    """Logits after the last token of a growing text, by the cheapest way that the model and its length allow."""

    def __init__(
        self, model: nn.Module, max_tokens: int, padding: Tensor | None, *, use_cache: bool, compile: bool
    ) -> None:
        self.model: Any = model
        self.is_family = _is_family(model)
        self.context: int | None = getattr(model, "context_length", None)
        self.padding = padding
        self.cache: KVCache | None = None
        self.compile = compile and use_cache
        if self.is_family and use_cache and self.context is not None:
            if self.compile:  # the same sizes from text to text, so that one compilation serves several
                max_tokens = -(-max_tokens // 256) * 256
            self.cache = KVCache(min(self.context, max_tokens), padding=padding)
        self.length = 0  # tokens in the cache
        self.weights = constant_weights()

    def next_logits(self, idx: Tensor) -> Tensor:
        """(B, T) ids, those of the last call and more -> (B, V)."""
        with self.weights:
            return self._next_logits(idx)

    def _next_logits(self, idx: Tensor) -> Tensor:
        T = idx.shape[1]
        if self.cache is not None and self.cache.max_tokens >= T:
            new, self.length = idx[:, self.length :], T
            if self.compile and new.shape[1] < T:  # everything but the prompt
                if not isinstance(self.cache, StaticKVCache):
                    self.cache = StaticKVCache(self.cache, idx.device)
                # Cloned, since the strides of a slice grow with the text, and each would be compiled for.
                return _compiled_read(idx.device.type)(
                    self.model, new.clone(memory_format=torch.contiguous_format), self.cache
                )
            return _read(self.model, new, self.cache)
        if not self.is_family:
            logits: Tensor = self.model(idx if self.context is None else idx[:, -self.context :])
            return logits[:, -1]
        window = idx if self.context is None else idx[:, -self.context :]
        if self.padding is None:
            return _read(self.model, window, None)
        # A cache for this once: it tells the model where the rows begin.
        padding = (self.padding - (T - window.shape[1])).clamp(min=0)
        return _read(self.model, window, KVCache(window.shape[1], padding=padding))


def _read(model: Any, idx: Tensor, cache: KVCache | None) -> Tensor:
    """Logits of the last position alone, (B, V): V may be large."""
    logits: Tensor = model.lm_head(model.features(idx, cache)[:, -1])
    return logits


@functools.cache
def _compiled_read(device_type: str) -> Callable[[Any, Tensor, KVCache], Tensor]:
    # "reduce-overhead" is torch's name for CUDA graphs: a step of a small model is too short to launch its kernels one by one.
    mode = "reduce-overhead" if device_type == "cuda" else None
    compiled: Callable[[Any, Tensor, KVCache], Tensor] = torch.compile(_read, fullgraph=True, dynamic=False, mode=mode)
    return compiled
