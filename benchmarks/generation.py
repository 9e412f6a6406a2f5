"""Tokens per second of generation: eager, compiled, with and without KV cache, beside transformers' generate and litgpt's.

    python benchmarks/generation.py --preset char-gpt --new-tokens 200

One text, greedy. transformers generates with the same weights, by way of export_hf, and must give the same tokens; litgpt's model has the
same shape and weights of its own. They take turns, a few texts each.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import peers
import torch
import turns
from torch import Tensor, nn

from llmforge.convert import export_hf
from llmforge.generation import generate
from llmforge.training import pick_device


@dataclass(frozen=True)
class Generation:
    """A race of generating: one model, one prompt."""

    family: str
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    device_name: str | None = None
    dtype: str = "float32"  # of the weights too
    prompt_tokens: int = 32
    new_tokens: int = 96
    threads: int | None = None
    gpu_gb: float | None = None

    @property
    def device(self) -> torch.device:
        return pick_device(self.device_name)

    def build(self) -> Any:
        torch.manual_seed(0)
        model = peers.FAMILIES[self.family][0](self._config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:  # the likeliest token is likely by far, as in a trained model
                    parameter.mul_(4)
        return model.eval().to(self.device, getattr(torch, self.dtype))

    def _config(self) -> Any:
        return peers.FAMILIES[self.family][1].preset(self.preset, **self.changes)

    def prompt(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self._config().vocab_size, (1, self.prompt_tokens), generator=generator).to(self.device)


def _ours(race: Generation, turn: turns.Turn, **options: Any) -> None:
    turn.begin()
    model, prompt = race.build(), race.prompt()
    while True:
        ids = generate(model, prompt, max_new_tokens=race.new_tokens, temperature=0, **options)
        turn(lambda: ids[0, race.prompt_tokens :].tolist())  # noqa: B023


def llmforge(race: Generation, turn: turns.Turn) -> None:
    _ours(race, turn)


def llmforge_compiled(race: Generation, turn: turns.Turn) -> None:
    _ours(race, turn, compile=True)


def llmforge_without_cache(race: Generation, turn: turns.Turn) -> None:
    _ours(race, turn, use_cache=False)


def _transformers(race: Generation, turn: turns.Turn, **options: Any) -> None:
    import transformers

    turn.begin()
    with tempfile.TemporaryDirectory() as folder:
        export_hf(race.build(), None, Path(folder) / "hf")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "hf", dtype=getattr(torch, race.dtype), attn_implementation="sdpa"
        )
        model = model.to(race.device).eval()
    model.generation_config.eos_token_id = None  # to the end
    prompt = race.prompt()
    mask = torch.ones_like(prompt)
    while True:
        ids = model.generate(
            prompt, attention_mask=mask, max_new_tokens=race.new_tokens, do_sample=False, pad_token_id=0, **options
        )
        turn(lambda: ids[0, race.prompt_tokens :].tolist())  # noqa: B023


def transformers_generate(race: Generation, turn: turns.Turn) -> None:
    _transformers(race, turn)


def transformers_compiled(race: Generation, turn: turns.Turn) -> None:
    """A cache of fixed size, with which transformers compiles by itself on a GPU."""
    _transformers(race, turn, cache_implementation="static")


def litgpt_generate(race: Generation, turn: turns.Turn) -> None:
    from litgpt.generate.base import generate as lit_generate
    from litgpt.model import GPT

    turn.begin()
    shape = peers.Training(
        race.family, race.preset, race.changes, race.device_name, seq_len=race.prompt_tokens + race.new_tokens
    )
    torch.manual_seed(0)
    model: nn.Module = GPT(peers.litgpt_config(shape)).eval().to(race.device, getattr(torch, race.dtype))
    model.set_kv_cache(batch_size=1, device=race.device, dtype=getattr(torch, race.dtype))  # type: ignore[operator]
    prompt = race.prompt()[0]
    while True:
        lit_generate(model, prompt, race.prompt_tokens + race.new_tokens, temperature=0.0, include_prompt=False)
        turn()


CONTESTANTS: dict[str, tuple[turns.Contestant, str, tuple[str, ...]]] = {
    "llmforge": (llmforge, "`generate`, KV cache", ()),
    "llmforge_compiled": (llmforge_compiled, "`generate(compile=True)`", ()),
    "llmforge_without_cache": (llmforge_without_cache, "`generate(use_cache=False)`", ()),
    "transformers": (transformers_generate, "transformers' generate, the same weights", ("transformers",)),
    "transformers_compiled": (transformers_compiled, "the same with its static cache", ("transformers",)),
    "litgpt": (litgpt_generate, "litgpt's generate, its own GPT", ("litgpt", "lightning")),
}


def measure(race: Generation, names: list[str], *, blocks: int, block_seconds: float) -> dict[str, Any]:
    """Let them take turns; see the module."""
    able, skipped = {}, {}
    for name in names:
        run, _, packages = CONTESTANTS[name]
        missing = [package for package in packages if not turns.is_installed(package)]
        if missing:
            skipped[name] = f"not installed: {', '.join(missing)}"
        else:
            able[name] = run
    outcomes, failed, texts = turns.take_turns(able, race, blocks=blocks, block_seconds=block_seconds, warmup_steps=1)
    texts_of = {name: outcome.notes[0] for name, outcome in outcomes.items() if outcome.notes}
    return {
        "family": race.family,
        "preset": race.preset,
        "changes": dict(race.changes),
        "device": str(race.device),
        "dtype": race.dtype,
        "prompt_tokens": race.prompt_tokens,
        "new_tokens": race.new_tokens,
        "texts_per_block": texts,
        "tokens_per_second": {
            name: turns.rounded(machine.spread([race.new_tokens / s for s in outcome.seconds]), 1)
            for name, outcome in outcomes.items()
        },
        "times_as_fast_as": turns.compared(outcomes),
        "same_tokens_as_llmforge": {name: ids == texts_of.get("llmforge") for name, ids in texts_of.items()},
        "skipped": skipped,
        "failed": failed,
        "load_average": machine.describe(torch.device("cpu"))["load_average"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="gpt", choices=list(peers.FAMILIES))
    parser.add_argument("--preset", default="char-gpt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    args = parser.parse_args()
    changes = {"vocab_size": 65} if args.preset.startswith("char") else {}
    race = Generation(
        args.family, args.preset, changes, args.device, args.dtype, args.prompt_tokens, args.new_tokens, args.threads
    )
    result = measure(race, args.contestants, blocks=args.blocks, block_seconds=1.0)
    machine.write(f"generation-{race.device.type}-{args.preset}", {**machine.describe(race.device), **result})


if __name__ == "__main__":
    main()
