"""Text to ids and back: characters, byte-level BPE, WordPiece, SentencePiece, GPT-2's vocabulary; and conversations as text."""

import os
from pathlib import Path

from llmforge.errors import DataError
from llmforge.tokenizers.backend import read_config, template_of
from llmforge.tokenizers.base import GGUFVocabulary, Tokenizer, read_tokenizer_file
from llmforge.tokenizers.bpe import PRE_TOKENIZERS, BPETokenizer
from llmforge.tokenizers.char import CharTokenizer
from llmforge.tokenizers.chat import chat_ids, render_chat
from llmforge.tokenizers.gguf import tokenizer_from_gguf
from llmforge.tokenizers.sentencepiece import SentencePieceTokenizer, is_sentencepiece
from llmforge.tokenizers.tiktoken import TiktokenTokenizer
from llmforge.tokenizers.wordpiece import WordPieceTokenizer, is_wordpiece

__all__ = [
    "PRE_TOKENIZERS",
    "BPETokenizer",
    "CharTokenizer",
    "GGUFVocabulary",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "WordPieceTokenizer",
    "chat_ids",
    "load_tokenizer",
    "render_chat",
    "tokenizer_from_gguf",
]


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer in a folder: its tokenizer.json, or else SentencePiece's tokenizer.model; None if there are no tokenizer files.

    Raises:
        DataError: the files are damaged, or of a kind that is not supported.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        if path.with_name("tokenizer.model").exists():
            return SentencePieceTokenizer.from_model_file(path.with_name("tokenizer.model"))
        if path.with_name("merges.txt").exists():
            raise DataError(
                f"{folder} has a merges.txt but no tokenizer.json, and merges.txt is not supported yet; transformers writes a "
                "tokenizer.json with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        return None
    content = read_tokenizer_file(path)
    try:
        char_tokenizer = CharTokenizer.from_tokenizer_json(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if char_tokenizer is not None:
        return char_tokenizer.with_chat_template(template_of(read_config(folder) or {}))
    if is_wordpiece(content):
        return WordPieceTokenizer.from_file(path)
    kind = SentencePieceTokenizer if is_sentencepiece(content) else BPETokenizer
    return kind.from_file(path)
