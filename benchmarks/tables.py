"""The tables of docs/benchmarks.md, written from the JSON files under results/: no number there is typed by hand.

    python benchmarks/tables.py            # write them
    python benchmarks/tables.py --check    # fail where the page is not what this writes

A place in the page is `<!-- suite-cpu -->` ... `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

# The contestants of training.py and generation.py, in the order of the columns.
TRAINING = {
    "llmforge": "llmforge",
    "llmforge_compiled": "llmforge, compiled",
    "plain_loop": "nanoGPT's loop",
    "transformers_trainer": "Trainer",
    "transformers_model": "Trainer, its model",
    "litgpt_loop": "litgpt's loop",
    "litgpt_model": "litgpt, its model",
    "x_transformers": "x-transformers",
}
GENERATION = {
    "llmforge": "llmforge",
    "llmforge_compiled": "compiled",
    "llmforge_without_cache": "no cache",
    "transformers": "transformers",
    "transformers_compiled": "static cache",
    "litgpt": "litgpt",
}


def of_suite(result: Mapping[str, Any]) -> str:
    """All tables of one result of run.py, as Markdown."""
    sections = [_where(result)]
    if races := result.get("training"):
        sections += _training(races)
    if found := result.get("largest_micro_batch"):
        sections.append(_largest(found))
    if races := result.get("generation"):
        sections.append(_generation(races))
    if found := result.get("qlora"):
        sections.append(_qlora(found))
    if found := result.get("data_preparation"):
        sections.append(_data_preparation(found))
    if left_out := list(_left_out(result)):
        sections.append("Not in the tables:\n\n" + "\n".join(left_out))
    return "\n\n".join(sections)


def _where(result: Mapping[str, Any]) -> str:
    hardware = result.get("hardware", {})
    device = hardware.get("gpu") or hardware.get("cpu") or result["device"]
    packages = [f"{name} {v}" for name, v in result.get("packages", {}).items() if v != "not installed"]
    return (
        f"{device}, {hardware.get('cpu_cores')} CPU cores; {', '.join(packages)}; commit {result['commit']}; "
        f"{result.get('minutes')} minutes. Load average at the end: {result['load_average']}."
    )


def _training(races: Mapping[str, Any]) -> Iterable[str]:
    measured = {name: race for name, race in races.items() if race.get("tokens_per_second")}
    others = [who for who in TRAINING if not who.startswith("llmforge")]
    rows = [
        [name + added, *(_spread(race[ratios].get(who), " x") for who in others)]
        for name, race in measured.items()
        for added, ratios in (("", "times_as_fast_as"), (", only llmforge compiled", "compiled_times_as_fast_as"))
        if race.get(ratios)
    ]
    yield (
        "**Training: how many times as fast llmforge is** (median of the ratios within a turn, p10 to p90)\n\n"
        + _table(["", *(TRAINING[who] for who in others)], rows)
    )
    rows = [
        [name, *(_number(race["tokens_per_second"].get(who)) for who in TRAINING)] for name, race in measured.items()
    ]
    yield "**Training: tokens per second**\n\n" + _table(["", *TRAINING.values()], rows)
    rows = [
        [name, *(_bytes(race["peak_memory_bytes"].get(who)) for who in TRAINING)] for name, race in measured.items()
    ]
    yield "**Training: peak memory** (of the model, its training and its data)\n\n" + _table(
        ["", *TRAINING.values()], rows
    )
    rows = [
        [
            name, f"{race['parameters'] / 1e6:.1f} M", race["dtype"], "yes" if race["compile"] else "no",
            f"{race['tokens_per_step']:,}", _percent(race["mfu_of_measured_matmul"].get("llmforge")),
            _percent(race["mfu_of_published_peak"].get("llmforge")),
            max((f"{value:.0e}" for value in race["largest_loss_difference"].values()), default="", key=float),
            f"{race['load_average']}", race.get("note", ""),
        ]
        for name, race in measured.items()
    ]  # fmt: skip
    headings = ["", "weights", "dtype", "compiled", "tokens a step", "MFU, of a matrix product", "MFU, of the published peak",
                "largest loss difference", "load", ""]  # fmt: skip
    yield "**The races**\n\n" + _table(headings, rows)
    profiles = [
        f"- {name}: " + ", ".join(f"`{row['operator']}` {row['fraction']:.0%}" for row in race["time_by_operator"])
        for name, race in measured.items()
        if race.get("time_by_operator")
    ]
    if profiles:
        yield "**Where llmforge's step spends its time** (operators, by themselves)\n\n" + "\n".join(profiles)


def _largest(found: Mapping[str, Any]) -> str:
    rows = [
        [
            name, TRAINING[who], f"{part['limit_gb']:g} GiB", str(one.get("micro_batch_size", "")),
            _bytes(one.get("peak_memory_bytes")), _number(one.get("tokens_per_second")),
        ]
        for name, part in found.items()
        for who, one in part.get("contestants", {}).items()
        if "failed" not in one
    ]  # fmt: skip
    headings = ["", "", "limit", "rows", "peak memory", "tokens/s"]
    return "**The largest micro-batch that fits**\n\n" + _table(headings, rows)


def _generation(races: Mapping[str, Any]) -> str:
    rows = [
        [
            name, f"{race['prompt_tokens']} + {race['new_tokens']}",
            *(_number((race["tokens_per_second"].get(who) or {}).get("median")) for who in GENERATION),
            _spread(race["times_as_fast_as"].get("transformers"), " x"),
            _yes(all(race["same_tokens_as_llmforge"].values())),
        ]
        for name, race in races.items()
        if race.get("tokens_per_second")
    ]  # fmt: skip
    headings = ["", "tokens", *GENERATION.values(), "llmforge / transformers", "the same text"]
    return "**Generation: tokens per second**, one text\n\n" + _table(headings, rows)


def _qlora(found: Mapping[str, Any]) -> str:
    kinds = ["nf4", "dense", "peft"]
    rows = [
        [
            name, f"{part['tokens']:,}", str(part["layers"]), *(_number(part["tokens_per_second"].get(kind)) for kind in kinds),
            *(_bytes(part["peak_bytes"].get(kind)) for kind in kinds),
        ]
        for name, part in found.items()
        if "tokens_per_second" in part
    ]  # fmt: skip
    headings = ["", "tokens", "layers", "QLoRA tokens/s", "16-bit base", "peft + bitsandbytes", "QLoRA memory", "16-bit base", "peft + bitsandbytes"]  # fmt: skip
    return "**QLoRA: a step**\n\n" + _table(headings, rows)


def _data_preparation(found: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{name}: {way}", _number(measured["megabytes_per_second"]["median"]),
            _number(measured["megabytes_per_cpu_second"]["median"]), f"{measured['peak_mebibytes']:.0f} MiB",
            _number(measured.get("ratio_to_the_faster_library_call")), measured["what"],
        ]
        for name, part in found.items()
        for way, measured in part.get("ways", {}).items()
    ]  # fmt: skip
    headings = ["", "MB/s", "MB per CPU second", "peak memory", "speed, of the library's", ""]
    return "**Data preparation**\n\n" + _table(headings, rows)


def _left_out(result: Mapping[str, Any]) -> Iterable[str]:
    for kind in ("training", "largest_micro_batch", "generation", "qlora", "data_preparation"):
        for name, part in result.get(kind, {}).items():
            for why in ("skipped", "failed"):
                for who, reason in part.get(why, {}).items():
                    yield f"- {kind}, {name}: {who} {why} ({reason})"
            for who, one in part.get("contestants", {}).items():
                if "failed" in one:
                    yield f"- {kind}, {name}: {who} failed ({one['failed']})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Without columns that are empty in all rows."""
    if not rows:
        return "Nothing was measured."
    kept = [i for i, _ in enumerate(headings) if i == 0 or any(row[i] for row in rows)]
    lines = [[headings[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(spread: Mapping[str, float] | None, unit: str) -> str:
    return f"{spread['median']:.2f}{unit} ({spread['p10']:.2f} to {spread['p90']:.2f})" if spread else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: float | None) -> str:
    return "" if not value else f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def filled(page: str, results: Path = machine.RESULTS) -> str:
    """The page with each place filled from the JSON file of its name."""

    def fill(match: "re.Match[str]") -> str:
        name = match.group(1)
        path = results / f"{name}.json"
        if path.exists():
            text = of_suite(json.loads(path.read_text(encoding="utf-8")))
        else:
            text = f"Not measured yet: `python benchmarks/run.py --suite {name.removeprefix('suite-')}` writes it."
        return f"<!-- {name} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- (suite-[\w-]+) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    if filled(page) == page:
        return
    if args.check:
        sys.exit(f"{PAGE.name} is not what benchmarks/results gives: run python benchmarks/tables.py")
    PAGE.write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()
