"""Which type each tensor of a GGUF file gets: a file type like Q4_K_M is a mixture, chosen as llama.cpp's quantize chooses it.

The tensors that hurt most when they are rounded (the output, the values of attention, the second half of the feed-forward) get
more bits, in some layers or in all. Rows that a type's blocks do not divide fall back to another type.

Source: src/llama-quant.cpp of llama.cpp.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmforge.errors import ConvertError, some
from llmforge.quant.ggml import ENCODABLE, block_shape

# Name -> general.file_type (llama.cpp's llama_ftype) and the type of most matrices.
FILE_TYPES = {
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
    "Q4_0": (2, "Q4_0"),
    "Q4_1": (3, "Q4_1"),
    "Q5_0": (8, "Q5_0"),
    "Q5_1": (9, "Q5_1"),
    "Q8_0": (7, "Q8_0"),
    "Q2_K": (10, "Q2_K"),
    "Q2_K_S": (21, "Q2_K"),
    "Q3_K_S": (11, "Q3_K"),
    "Q3_K_M": (12, "Q3_K"),
    "Q3_K_L": (13, "Q3_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_K_M": (15, "Q4_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q6_K": (18, "Q6_K"),
    "IQ4_NL": (25, "IQ4_NL"),
    "IQ4_XS": (30, "IQ4_XS"),
    "TQ1_0": (36, "TQ1_0"),
    "TQ2_0": (37, "TQ2_0"),
}

# What rows get that a type's blocks of 256 do not divide; F16 where they are no multiple of 32 either.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "IQ4_XS": "IQ4_NL"}
FALLBACKS |= {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Matrices that stay as they are: what their names contain, or are.
_NEVER = tuple(
    """_norm.weight ffn_gate_inp.weight ffn_gate_tid2eid.weight altup laurel per_layer_model_proj ssm_conv1d
    shortconv.conv.weight indexer.k_proj.weight indexer.q_proj.weight attn_rel_b.weight .position_embd sam.pos_embd sam.neck.
    sam.net_ .rel_pos .patch_embd .patch_merger a.rvq.codebook mm.a.code_embd time_mix_lerp_fused.weight time_mix_first.weight
    time_mix_w0.weight time_mix_w1.weight time_mix_w2.weight time_mix_v0.weight time_mix_v1.weight time_mix_v2.weight
    time_mix_a0.weight time_mix_a1.weight time_mix_a2.weight time_mix_g1.weight time_mix_g2.weight
    time_mix_decay_w1.weight time_mix_decay_w2.weight""".split()  # noqa: SIM905
)
_NEVER_EXACTLY = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows did not fit."""

    name: str
    width: int  # of a row
    wanted: str
    given: str


@dataclass(frozen=True)
class Mixture:
    """The type of each tensor; those that are not in `types` keep theirs."""

    types: dict[str, str]
    fallbacks: list[Fallback] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What a user should know: which tensors fell back, and which widths would not."""
        lines = []
        for wanted, width in dict.fromkeys((fallback.wanted, fallback.width) for fallback in self.fallbacks):
            those = [f for f in self.fallbacks if (f.wanted, f.width) == (wanted, width)]
            block = block_shape(wanted)[0]
            near = [near for near in (width // block * block, -(-width // block) * block) if near]
            lines.append(
                f"{len(those)} tensors with rows of {width} are {those[0].given} instead of {wanted}, whose blocks have {block} "
                f"weights; widths of {' or '.join(map(str, near))} would fit: {some([f.name for f in those])}"
            )
        return lines


def choose_types(
    file_type: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    *,
    tensor_types: Mapping[str, str] | None = None,
    has_importance: bool = False,
) -> Mixture:
    """Types for a file's tensors.

    Args:
        file_type: a key of `FILE_TYPES`.
        metadata: of the file: the architecture, its layers and heads.
        shapes: name -> shape of every tensor of the file, names as in GGUF.
        tensor_types: pattern -> type: tensors whose name contains the regular expression get that type; the first that matches counts.
        has_importance: whether an importance matrix goes with it, which changes some choices.
    Raises:
        ConvertError: an unknown type, one that needs an importance matrix, a pattern that is none or fits no tensor, or a model that the rules are not known for.
    """
    if file_type not in FILE_TYPES:
        raise ConvertError(f"file_type ({file_type!r}) must be one of {', '.join(FILE_TYPES)}")
    default = FILE_TYPES[file_type][1]
    patterns = _patterns(tensor_types or {}, shapes)
    if patterns and default in ("F32", "F16", "BF16"):
        raise ConvertError(f"tensor types are for a quantized file type, not {file_type}; take Q8_0, for example")
    rules = _Rules(file_type, metadata, shapes, has_importance)
    types: dict[str, str] = {}
    fallbacks = []
    for name in sorted(shapes, key=lambda name: (_layer(name), name)):
        if not _may_be_quantized(name, shapes[name]):
            continue
        if default in ("F32", "F16", "BF16"):
            types[name] = default
            continue
        forced = next((given for pattern, given in patterns if pattern.search(name)), None)
        types[name] = wanted = forced or rules.choose(name, shapes[name], default)
        if shapes[name][-1] % block_shape(wanted)[0]:
            given = FALLBACKS.get(wanted, wanted)
            if shapes[name][-1] % block_shape(given)[0]:
                given = "F16"
            types[name] = given
            fallbacks.append(Fallback(name, shapes[name][-1], wanted, given))
    if (
        file_type == "Q2_K_S"
        and not has_importance
        and (
            needy := [
                name for name, given in types.items() if given == "Q2_K" and name not in (*_EMBEDDINGS, "output.weight")
            ]
        )
    ):
        raise ConvertError(
            f"Q2_K_S needs an importance matrix, for {some(needy)}; pass one (--imatrix FILE), or take Q2_K"
        )
    return Mixture(types, fallbacks)


class _Rules:
    """The choices for one file; tensors must come in the order of their layers, since some are counted."""

    def __init__(
        self, file_type: str, metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], has_importance: bool
    ) -> None:
        self.file_type, self.has_importance = file_type, has_importance
        arch = metadata.get("general.architecture")
        self.n_layer = _count(metadata, f"{arch}.block_count")
        n_head = _count(metadata, f"{arch}.attention.head_count", 1)
        n_head_kv = _count(metadata, f"{arch}.attention.head_count_kv", n_head)
        unknown = arch in ("falcon", "glm5-next") or _count(metadata, f"{arch}.expert_count", 0) > 1
        if unknown and file_type not in ("F32", "F16", "BF16", "Q8_0"):
            raise ConvertError(
                f"the mixtures of {arch} models with these parts are not known here; take F16, BF16 or Q8_0"
            )
        self.group = n_head // n_head_kv if n_head_kv else 0  # query heads per key/value head
        grouped_llama = arch == "llama" and n_head != n_head_kv
        self.is_70b = (self.n_layer == 80 and (arch in ("qwen2", "deci", "olmo") or grouped_llama)) or (
            self.n_layer == 68 and arch == "jais2"
        )
        self.tied = "output.weight" not in shapes
        self.n_value = sum(_is_value(name) for name in shapes)
        self.values_seen = self.downs_seen = 0

    def choose(self, name: str, shape: Sequence[int], default: str) -> str:
        if name == "output.weight" or (self.tied and name in _EMBEDDINGS):
            if shape[-1] % block_shape(default)[0]:
                return "Q8_0"
            return "Q8_0" if default == "Q8_0" else "Q6_K"
        if name in _EMBEDDINGS:
            return "Q4_K" if default in ("TQ1_0", "TQ2_0") else default
        if _is_value(name):
            self.values_seen += 1
            return self._value(self.values_seen - 1, default)
        if "ffn_down" in name:
            self.downs_seen += 1
            return self._down(self.downs_seen - 1, default)
        if "attn_output.weight" in name:
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.file_type, default)
        return default

    def _value(self, i: int, default: str) -> str:
        match self.file_type:
            case "Q2_K":
                chosen = "Q4_K" if self.group >= 4 else "Q3_K"
            case "Q2_K_S" if self.group >= 4:
                chosen = "Q4_K"
            case "Q3_K_M":
                chosen = "Q5_K" if i < 2 else "Q4_K"
            case "Q3_K_L":
                chosen = "Q5_K"
            case "IQ4_NL" | "IQ4_XS" if self.group >= 4:
                chosen = "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _more_bits(i, self.n_value):
                chosen = "Q6_K"
            case "Q4_K_S" if i < 4:
                chosen = "Q5_K"
            case _:
                chosen = default
        # 80 layers with grouped queries: this matrix is an eighth of the others, so more bits cost little.
        return "Q5_K" if self.is_70b and chosen in ("Q3_K", "Q4_K") else chosen

    def _down(self, i: int, default: str) -> str:
        early = i < self.n_layer // 8
        match self.file_type:
            case "Q2_K":
                return "Q3_K"
            case "Q2_K_S" if early:
                return "Q4_K"
            case "Q3_K_M":
                return "Q5_K" if i < self.n_layer // 16 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _more_bits(i, self.n_layer):
                return "Q6_K"
            case "Q4_K_S" if early:
                return "Q5_K"
            case "IQ4_NL" | "IQ4_XS" if early and not self.has_importance:
                return "Q5_K"
            case "Q4_0" | "Q5_0" if early and self.has_importance:
                return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[self.file_type]
        return default


_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


def _is_value(name: str) -> bool:
    return any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _more_bits(i: int, n: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _may_be_quantized(name: str, shape: Sequence[int]) -> bool:
    n_dims = next((len(shape) - i for i, size in enumerate(shape) if size != 1), 1)
    if n_dims < 2 or not name.endswith("weight") or name in _NEVER_EXACTLY:
        return False
    return not any(part in name for part in _NEVER)


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _count(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, list) and value:  # one for each layer; llama.cpp looks at the first
        value = value[0]
    if type(value) is not int or value < 0:
        raise ConvertError(f"{key} is {value!r} in the file's metadata, but must be a number to choose types by")
    return value


def _patterns(
    tensor_types: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> list[tuple[re.Pattern[str], str]]:
    patterns = []
    for text, given in tensor_types.items():
        if given not in ENCODABLE:
            raise ConvertError(f"tensor type {given!r} (of {text!r}) must be one of {', '.join(ENCODABLE)}")
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ConvertError(f"tensor name pattern {text!r} is no regular expression: {error}") from error
        if not any(pattern.search(name) for name in shapes):
            raise ConvertError(f"no tensor's name contains {text!r}; names are like {some(list(shapes))}")
        patterns.append((pattern, given))
    return patterns
