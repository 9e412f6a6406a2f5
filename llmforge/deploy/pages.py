"""A comparison to be read: in a terminal, as Markdown, as one HTML file."""

import html
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmforge.deploy.compare import ComparedPrompt, Comparison

MIN_COLUMNS = 72  # of a terminal: narrower ones get the answers one below the other


def terminal_text(comparison: "Comparison", width: int, *, references: bool) -> str:
    """See `Comparison.to_text`."""
    width = max(20, width)
    lines: list[str] = []
    for i, row in enumerate(comparison.rows, start=1):
        mark = "" if row.changed else "  (same answer)"
        lines += [_rule(f"{i}/{len(comparison.rows)}{mark}", width), *_wrapped(row.prompt, width), ""]
        if width >= MIN_COLUMNS:
            lines += _beside(comparison, row, width)
        else:
            for name, answer in ((comparison.base, row.base), (comparison.tuned, row.tuned)):
                lines += [_cut(f"[{name}]", width), *_wrapped(answer, width), ""]
        if references and row.reference is not None:
            lines += [_cut("[reference]", width), *_wrapped(row.reference, width), ""]
    lines.append(_rule("all prompts", width))
    lines += _figures(comparison, width)
    for fact in comparison.facts():
        lines += _wrapped(fact, width)
    return "\n".join(lines)


def _beside(comparison: "Comparison", row: "ComparedPrompt", width: int) -> list[str]:
    half = (width - 3) // 2
    left = [_cut(f"[{comparison.base}]", half), *_wrapped(row.base, half)]
    right = [_cut(f"[{comparison.tuned}]", half), *_wrapped(row.tuned, half)]
    lines = []
    for i in range(max(len(left), len(right))):
        a, b = (column[i] if i < len(column) else "" for column in (left, right))
        lines.append(f"{a}{' ' * (half - _cells(a))} | {b}".rstrip())
    return [*lines, ""]


def _figures(comparison: "Comparison", width: int) -> list[str]:
    """The summary as a table; with short names where paths are long, and without columns where those are too wide."""
    table = comparison.summary()
    for names in ((comparison.base, comparison.tuned), ("base", "tuned")):
        lines = [("", *map(_shown, names)), *table]
        columns = [max(_cells(line[column]) for line in lines) for column in range(3)]
        if table and sum(columns) + 4 <= width:
            return [
                "  ".join([_padded(line[0], -columns[0]), *map(_padded, line[1:], columns[1:])]).rstrip()
                for line in lines
            ]
    return [line for what, base, tuned in table for line in _wrapped(f"{what}: {base}, {tuned}", width)]


def _padded(text: str, cells: int) -> str:
    """Filled with blanks at the left, or for a negative width at the right."""
    blanks = " " * (abs(cells) - _cells(text))
    return blanks + text if cells > 0 else text + blanks


def _rule(title: str, width: int) -> str:
    return _cut(f"--- {title} " + "-" * width, width, "")


def _cut(text: str, width: int, end: str = "...") -> str:
    """At most `width` cells; of a longer name the beginning is left out, since paths differ at their end."""
    text = _shown(text)
    if _cells(text) <= width:
        return text
    if not end:
        return _split(text, width)[0]
    while _cells(text) > max(1, width - len(end)):
        text = text[1:]
    return end + text


def _shown(text: str) -> str:
    """Without characters that move the cursor or change colours: what a model writes is not trusted."""
    return "".join(c if c.isprintable() else " " if c in "\t\n" else c.encode("unicode_escape").decode() for c in text)


def _cells(text: str) -> int:
    """Columns that a terminal needs for the text."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _split(text: str, width: int) -> tuple[str, str]:
    """As many characters as fit, and the rest; at least one, or it would never end."""
    used = 0
    for i, c in enumerate(text):
        used += _cells(c)
        if used > width and i > 0:
            return text[:i], text[i:]
    return text, ""


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells; line breaks and indentation stay, as code needs them."""
    lines = []
    for given in text.replace("\r\n", "\n").expandtabs(4).strip("\n").split("\n"):
        line = ""
        for word in re.findall(r"\s*\S+|\s+$", _shown(given)):
            if line and _cells(line) + _cells(word.rstrip()) > width:
                lines.append(line.rstrip())
                line, word = "", word.lstrip()
            line += word
            while _cells(line.rstrip()) > width:
                first, line = _split(line, width)
                lines.append(first)
        lines.append(line.rstrip())
    return lines


def markdown_page(comparison: "Comparison") -> str:
    """See `Comparison.to_markdown`."""
    parts = [f"# {_md(comparison.base)} and {_md(comparison.tuned)}"]
    table = comparison.summary()
    if table:
        head = f"|  | {_md(comparison.base)} | {_md(comparison.tuned)} |\n|---|---:|---:|\n"
        parts.append(head + "\n".join(f"| {what} | {base} | {tuned} |" for what, base, tuned in table))
    parts.append("\n".join(f"- {_md(fact)}" for fact in comparison.facts()))
    for i, row in enumerate(comparison.rows, start=1):
        parts += [f"## {i}{'' if row.changed else ' (same answer)'}", _fenced(row.prompt)]
        parts += [f"**{_md(comparison.base)}**{_loss(row.base_loss)}", _fenced(row.base)]
        parts += [f"**{_md(comparison.tuned)}**{_loss(row.tuned_loss)}", _fenced(row.tuned)]
        if row.reference is not None:
            parts += ["**reference**", _fenced(row.reference)]
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|&~])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """The text as it is: in a fence longer than any that it has."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{_plain(text)}\n{fence}"


def _plain(text: str) -> str:
    """Line breaks and tabs stay; other control characters become escapes, in files as in a terminal."""
    return "\n".join("\t".join(map(_shown, line.split("\t"))) for line in text.replace("\r\n", "\n").split("\n"))


def _loss(loss: object) -> str:
    value = getattr(loss, "loss", None)
    return "" if value is None else f" (reference: {value:.3f} nats per token)"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 2rem 0 .5rem; color: #555 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 14px/1.5 ui-monospace, monospace }
.prompt { background: #f1f1f1; border-radius: 6px; padding: .75rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .75rem }
.pair > div, .reference { border: 1px solid #ddd; border-radius: 6px; padding: .75rem; min-width: 0 }
.reference { margin-top: .75rem; border-style: dashed }
.name { font-size: .8rem; color: #555; margin-bottom: .4rem; overflow-wrap: anywhere }
@media (max-width: 45rem) { .pair { grid-template-columns: 1fr } }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #161616 } h2, .name { color: #aaa } .prompt { background: #242424 }
  th, td, .pair > div, .reference { border-color: #444 }
}
"""


def html_page(comparison: "Comparison") -> str:
    """See `Comparison.to_html`."""
    base, tuned = map(html.escape, (comparison.base, comparison.tuned))
    title = f"{base} and {tuned}"
    parts = [f"<h1>{title}</h1>"]
    table = comparison.summary()
    if table:
        rows = "".join(f"<tr><td>{what}</td><td>{a}</td><td>{b}</td></tr>\n" for what, a, b in table)
        parts.append(f"<table>\n<tr><th></th><th>{base}</th><th>{tuned}</th></tr>\n{rows}</table>")
    parts += [f"<p>{html.escape(_plain(fact))}</p>" for fact in comparison.facts()]
    for i, row in enumerate(comparison.rows, start=1):
        parts.append(
            f"<h2>{i}{'' if row.changed else ' (same answer)'}</h2>\n<div class='prompt'>{_pre(row.prompt)}</div>"
        )
        pair = "".join(
            f"<div><div class='name'>{name}{_loss(loss)}</div>{_pre(text)}</div>\n"
            for name, loss, text in ((base, row.base_loss, row.base), (tuned, row.tuned_loss, row.tuned))
        )
        parts.append(f"<div class='pair'>\n{pair}</div>")
        if row.reference is not None:
            parts.append(f"<div class='reference'><div class='name'>reference</div>{_pre(row.reference)}</div>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _pre(text: str) -> str:
    # dir="auto": answers in Arabic or Hebrew run from the right.
    return f'<pre dir="auto">{html.escape(_plain(text))}</pre>'
