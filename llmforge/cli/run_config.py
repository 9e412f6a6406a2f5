"""RunConfig: everything that `llmforge train` needs to know, from a preset, a YAML file and --set; saved with the run."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmforge.cli.bar import Bar
from llmforge.config import Config, did_you_mean
from llmforge.data import TokenDataset
from llmforge.errors import ConfigError, some
from llmforge.models import FAMILIES, GPTConfig, LanguageModel, ModelConfig
from llmforge.tokenizers import (
    PRE_TOKENIZERS,
    BPETokenizer,
    CharTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    load_tokenizer,
)
from llmforge.tokenizers.sources import Source, TextSource, text_sources
from llmforge.training import TrainConfig, mup_init_

if TYPE_CHECKING:
    from typing_extensions import Self

_OWN_FIELDS = ("text", "val_fraction", "drop_near_duplicates", "family")  # of no section
_BAR_BYTES = 2**23  # a text of fewer bytes is done at once


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Config):
    """Which tokenizer a run makes."""

    # Characters; BPE or WordPiece trained on the text; GPT-2's vocabulary; one that is there. WordPiece cannot be exported as GGUF.
    kind: Literal["char", "bpe", "wordpiece", "gpt2", "file"] = "char"
    path: str | None = None  # file only: a folder with a tokenizer.json, as a run, export --hf or transformers write it
    vocab_size: int = 4_096  # bpe and wordpiece only
    pre_tokenizer: str = "qwen2"  # bpe only: how text is cut into words before merging

    def __post_init__(self) -> None:
        if self.kind not in ("char", "bpe", "wordpiece", "gpt2", "file"):
            raise ConfigError(f"tokenizer kind ({self.kind!r}) must be 'char', 'bpe', 'wordpiece', 'gpt2' or 'file'")
        if (self.kind == "file") != (self.path is not None):
            raise ConfigError(
                f"tokenizer kind {self.kind!r} and path {self.path!r} do not fit: 'file' needs the path, the others have none"
            )
        if self.pre_tokenizer not in PRE_TOKENIZERS:
            raise ConfigError(
                f"unknown pre_tokenizer {self.pre_tokenizer!r}; {did_you_mean(self.pre_tokenizer, list(PRE_TOKENIZERS))}"
            )

    def build(self, text: Source | Sequence[TextSource]) -> Tokenizer:
        """Train the tokenizer on the text, or read its vocabulary."""
        if self.kind == "char":
            return CharTokenizer.from_text_file(text)
        if self.kind == "bpe":
            return BPETokenizer.from_text_file(text, vocab_size=self.vocab_size, pre_tokenizer=self.pre_tokenizer)
        if self.kind == "wordpiece":
            return WordPieceTokenizer.from_text_file(text, vocab_size=self.vocab_size)
        if self.path is not None:
            tokenizer = load_tokenizer(self.path)
            if tokenizer is None:
                raise ConfigError(f"{self.path} has no tokenizer.json; name a folder that has one")
            return tokenizer
        return TiktokenTokenizer("gpt2")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """One training run from texts. As YAML:

    text: quijote.txt                 # or several: [a.txt, {path: b.jsonl, field: body}, books/]; with weights: {path: a.txt, weight: 2}
    val_fraction: 0.1
    drop_near_duplicates: false
    tokenizer: {kind: bpe, vocab_size: 8000}
    family: gpt
    model: {n_layer: 6, n_head: 6, n_embd: 384, block_size: 256}
    train: {max_steps: 5000, lr: 0.001, out_dir: runs/quijote}
    """

    # What a preset's model is trained with if nothing else is asked for; else gpt2.
    TOKENIZERS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "char-gpt": {"kind": "char"},
        "char-gpt-cpu": {"kind": "char"},
        "modern": {"kind": "char"},
        **{
            name: {"kind": "bpe", "vocab_size": values["vocab_size"]}
            for family in ("llama", "bitnet")
            for name, values in FAMILIES[family][0].PRESETS.items()
            if "vocab_size" in values
        },
        "bit-gpt": {"kind": "bpe", "vocab_size": 8192},
    }

    text: str | tuple[TextSource, ...]  # what `TextSource.path` may be; or several, with their fields and weights
    val_fraction: float = 0.1  # of the text, kept for validation: see `TokenDataset.split`
    drop_near_duplicates: bool = False  # leave out lines that are nearly the same as an earlier one
    tokenizer: TokenizerConfig
    family: str = GPTConfig.FAMILY  # of the model: "gpt", "llama" or "bitnet"
    model: ModelConfig
    train: TrainConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """As for every Config; `family` says which fields `model` has."""
        values = dict(values)
        family = values.get("family", GPTConfig.FAMILY)
        if family not in FAMILIES:
            raise ConfigError(f"unknown family {family!r}; {did_you_mean(family, list(FAMILIES))}")
        if not isinstance(values.get("text", ""), str):
            values["text"] = text_sources(values["text"])
        if isinstance(values.get("model"), Mapping):
            values["model"] = FAMILIES[family][0].from_dict(values["model"])
        return super().from_dict(values)

    @classmethod
    def resolve(cls, preset: str, layers: Sequence[Mapping[str, Any]]) -> "Self":
        """The preset's values, overlaid with each of `layers` in turn.

        Raises:
            ConfigError: an unknown preset or field, or a value that cannot be.
        """
        family = next((name for name, (config, _) in FAMILIES.items() if preset in config.PRESETS), None)
        if family is None:
            raise ConfigError(f"unknown preset {preset!r}; {did_you_mean(preset, presets())}")
        # The vocabulary is the tokenizer's, known only when it is built; 1 stands for "not yet".
        values: dict[str, Any] = {
            "tokenizer": cls.TOKENIZERS.get(preset, {"kind": "gpt2"}),
            "family": family,
            "model": {"vocab_size": 1, **FAMILIES[family][0].PRESETS[preset]},
            "train": dict(TrainConfig.PRESETS[preset]),
        }
        if any(layer.get("family", family) != family for layer in layers):
            values["model"] = {"vocab_size": 1}  # the preset's fields are another family's
        for layer in layers:
            for key, value in layer.items():
                if key in ("tokenizer", "model", "train"):
                    if not isinstance(value, Mapping):
                        raise ConfigError(f"{key} needs a mapping of field to value, not {value!r}")
                    values[key] = {**values[key], **value}
                else:
                    values[key] = value
        return cls.from_dict(values)

    def with_vocabulary(self, tokenizer: Tokenizer) -> "Self":
        """The same run with the model's vocab_size taken from the tokenizer."""
        return dataclasses.replace(self, model=self.model.replace(vocab_size=tokenizer.vocab_size))

    def data(self, tokenizer: Tokenizer) -> tuple[TokenDataset, TokenDataset | None]:
        """Training and validation tokens; no validation with val_fraction 0."""
        size = sum(file.size for source in text_sources(self.text) for file in source.files())
        dataset = TokenDataset.from_sources(
            self.text,
            tokenizer,
            drop_near_duplicates=self.drop_near_duplicates,
            progress=Bar("B") if size >= _BAR_BYTES else None,
        )
        return dataset.split(val_fraction=self.val_fraction) if self.val_fraction else (dataset, None)

    @property
    def text_names(self) -> str:
        """The texts, for the screen."""
        return some([source.path for source in text_sources(self.text)])

    def new_model(self) -> LanguageModel:
        """A freshly initialised model, the same one for the same seed."""
        import torch

        torch.manual_seed(self.train.seed)
        model = FAMILIES[self.family][1](self.model)
        if self.train.mup_base_width is not None:
            mup_init_(model, self.train.mup_base_width)
        return model


def presets() -> list[str]:
    """Names of all presets of all families."""
    return [name for config, _ in FAMILIES.values() for name in config.PRESETS]


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`--set lr=3e-4 model.n_layer=8` as a layer for `RunConfig.resolve`; a bare field is looked up in all sections.

    Raises:
        ConfigError: no `=`, or an unknown field.
    """
    sections: dict[str, list[type[Config]]] = {
        "train": [TrainConfig],
        "model": [config for config, _ in FAMILIES.values()],  # `from_dict` says if it is a field of the other family
        "tokenizer": [TokenizerConfig],
    }
    fields = {
        name: list(dict.fromkeys(f.name for config in configs for f in dataclasses.fields(config)))
        for name, configs in sections.items()
    }
    fields["model"].remove("vocab_size")  # follows from the tokenizer
    layer: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set needs key=value, got {setting!r}; for example --set lr=3e-4")
        value = None if text.lower() in ("null", "none") else text
        section, dot, name = key.partition(".")
        if not dot:
            name = key
            if name in _OWN_FIELDS:
                layer[name] = value
                continue
            known = [field for names in fields.values() for field in names] + [*_OWN_FIELDS]
            section = next((section for section, names in fields.items() if name in names), "")
            if not section:
                raise ConfigError(f"unknown setting {name!r}; {did_you_mean(name, known)}")
        elif section not in sections or name not in fields[section]:
            known = [f"{section}.{field}" for section, names in fields.items() for field in names]
            raise ConfigError(f"unknown setting {key!r}; {did_you_mean(key, known)}")
        layer.setdefault(section, {})[name] = value
    return layer
