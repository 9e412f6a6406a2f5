"""Text from a language model: sampling with a KV cache, whole or as a stream.

Any module with `forward(idx) -> logits (B, T, V)` will do. The families of `llmforge.models` also have `features`, `lm_head` and a
`context_length`, and are then read through a KV cache: one token costs one token.
"""

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.config import Config
from llmforge.errors import ConfigError
from llmforge.nn import KVCache
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
    **sampling: Any,
) -> Tensor:
    """Continue a batch of token sequences.

    Args:
        model: maps (B, T) ids to (B, T, V) logits.
        idx: (B, T) int64, T >= 1: prompts of equal length.
        max_new_tokens: how many tokens to add at most.
        eos_token_id: a row that produced it is finished and filled up with it; the batch ends when all rows are finished.
        seed: same seed, same text; None = different every time.
        use_cache: False reads the whole context again for every token: slower, same result.
        **sampling: fields of `Sampling`.
    Returns:
        (B, T + new) int64, the prompts and what was added.
    Beyond the model's context the window slides: each new token is chosen from the last `context_length` ones, and since learned
    positions move with the window, the cache is of no use there.
    """
    finished = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    for token in _tokens(model, idx, max_new_tokens=max_new_tokens, seed=seed, use_cache=use_cache, sampling=sampling):
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
    prompt: str,
    *,
    max_new_tokens: int = 200,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    use_cache: bool = True,
    **sampling: Any,
) -> Iterator[str]:
    """Continue a text, piece by piece as it is generated.

    Args:
        prompt: the beginning; an empty one starts from a line break.
        max_new_tokens: how many tokens to add at most; fewer when the model ends the text.
        stop: strings that end the text; they are not part of it.
        seed, use_cache, **sampling: as for `generate`.
    Yields:
        the new text only, in pieces of whole characters: bytes of an unfinished character and the possible beginning of a stop
        string are held back until the next token decides.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise ConfigError("a stop string must not be empty; leave it out to generate max_new_tokens tokens")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    idx = torch.tensor([tokenizer.encode(prompt) or _beginning(tokenizer)], dtype=torch.long, device=device)
    to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    for token in _tokens(model, idx, max_new_tokens=max_new_tokens, seed=seed, use_cache=use_cache, sampling=sampling):
        token_id = int(token)
        if token_id == tokenizer.eos_token_id:
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
    """Tokens to start from when there is no prompt: a line break, or the end-of-text token where there is none."""
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return [tokenizer.eos_token_id or 0]


@torch.no_grad()
def _tokens(
    model: nn.Module, idx: Tensor, *, max_new_tokens: int, seed: int | None, use_cache: bool, sampling: dict[str, Any]
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,) int64, `max_new_tokens` times."""
    settings = Sampling.from_dict(sampling)
    if idx.ndim != 2 or idx.shape[1] == 0:
        raise ConfigError(f"idx must be (B, T) with at least one token, got shape {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens ({max_new_tokens}) must be 0 or more")
    generator = torch.Generator(device=idx.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    context: int | None = getattr(model, "context_length", None)
    family: Any = model if hasattr(model, "features") and hasattr(model, "lm_head") else None
    cache = KVCache(context) if family is not None and context is not None and use_cache else None
    was_training = model.training
    model.eval()  # no dropout
    try:
        for _ in range(max_new_tokens):
            window = idx if context is None else idx[:, -context:]
            if cache is not None and idx.shape[1] <= cache.max_tokens:
                logits = family.lm_head(family.features(idx[:, cache.length :], cache)[:, -1])
            elif family is not None:  # logits of the last position alone: V may be large
                logits = family.lm_head(family.features(window)[:, -1])
            else:
                logits = model(window)[:, -1]
            token = settings.choose(logits, idx, generator)  # (B,)
            idx = torch.cat([idx, token[:, None]], dim=1)
            yield token
    finally:
        model.train(was_training)
