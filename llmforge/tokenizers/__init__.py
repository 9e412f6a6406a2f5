"""Text to ids and back: characters, byte-level BPE, GPT-2's vocabulary."""

import os
from pathlib import Path

from llmforge.errors import DataError
from llmforge.tokenizers.base import GGUFVocabulary, Tokenizer, read_tokenizer_file
from llmforge.tokenizers.bpe import PRE_TOKENIZERS, BPETokenizer
from llmforge.tokenizers.char import CharTokenizer
from llmforge.tokenizers.tiktoken import TiktokenTokenizer

__all__ = [
    "PRE_TOKENIZERS",
    "BPETokenizer",
    "CharTokenizer",
    "GGUFVocabulary",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
]


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer whose tokenizer.json lies in a folder; None if there are no tokenizer files.

    Raises:
        DataError: the files are damaged, or of a kind that is not supported.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        for name in ("tokenizer.model", "merges.txt"):
            if path.with_name(name).exists():
                raise DataError(
                    f"{folder} has a {name} but no tokenizer.json, and {name} is not supported yet; transformers writes a "
                    "tokenizer.json with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
                )
        return None
    content = read_tokenizer_file(path)
    try:
        char_tokenizer = CharTokenizer.from_tokenizer_json(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return char_tokenizer or BPETokenizer.from_file(path)
