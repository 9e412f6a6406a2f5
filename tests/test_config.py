"""Config: strict names, checked types, and a round trip through dict, JSON and YAML."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmforge import ConfigError, GPTConfig, TrainConfig
from llmforge.config import Config, read_json_object, read_yaml_mapping


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    inner: Inner = Inner()
    rate: float = 0.5
    limit: float | None = None
    name: str = "x"
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)


def test_unknown_field_suggests_the_nearest():
    with pytest.raises(ConfigError, match="unknown TrainConfig field 'learning_rate'; did you mean 'lr'?"):
        TrainConfig.from_dict({"max_steps": 1, "learning_rate": 1e-3})
    with pytest.raises(ConfigError, match="unknown GPTConfig field 'n_layers'; did you mean 'n_layer'?"):
        GPTConfig.from_dict({"vocab_size": 1, "n_layers": 2})


def test_unknown_field_without_a_near_one_lists_all():
    with pytest.raises(ConfigError, match="unknown Inner field 'qqq'; known: size"):
        Inner.from_dict({"qqq": 1})


def test_missing_field_is_named():
    with pytest.raises(ConfigError, match="TrainConfig needs a value for 'max_steps'"):
        TrainConfig.from_dict({})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rate", "fast", "Outer.rate must be a number, got 'fast'"),
        ("rate", True, "Outer.rate must be a number, got True"),
        ("flag", "yes", "Outer.flag must be true or false, got 'yes'"),
        ("name", 3, "Outer.name must be text, got 3"),
        ("kind", "c", "Outer.kind must be one of 'a', 'b', got 'c'"),
        ("pair", [1], "Outer.pair must be"),
        ("inner", 3, "Inner needs a mapping"),
        ("inner", {"size": 1.5}, "Inner.size must be a whole number, got 1.5"),
    ],
)
def test_wrong_type_is_refused_with_the_value(field, value, message):
    with pytest.raises(ConfigError, match=message):
        Outer.from_dict({field: value})


def test_strings_become_numbers_where_numbers_are_due():
    config = Outer.from_dict(
        {"rate": "1e-3", "limit": "2", "pair": "0.9,0.95", "flag": "true", "inner": {"size": "1e3"}}
    )
    assert config == Outer(rate=1e-3, limit=2.0, pair=(0.9, 0.95), flag=True, inner=Inner(size=1000))
    assert Outer.from_dict({"limit": None}).limit is None


numbers = st.floats(allow_nan=False, allow_infinity=False)
outers = st.builds(
    Outer,
    inner=st.builds(Inner, size=st.integers()),
    rate=numbers,
    limit=st.none() | numbers,
    name=st.text(),
    flag=st.booleans(),
    kind=st.sampled_from(["a", "b"]),
    pair=st.tuples(numbers, numbers),
)


@given(outers)
@example(Outer(name="\x85"))  # line breaks that YAML folds away when they stand unquoted
@example(Outer(name="a\u2028\u2029b: #"))
def test_round_trip_through_dict_json_and_yaml(tmp_path_factory, config):
    assert Outer.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert Outer.from_yaml_file(path) == config


def test_preset_and_overrides():
    config = GPTConfig.preset("gpt2", dropout=0.1)
    assert (config.n_layer, config.n_embd, config.dropout) == (12, 768, 0.1)
    with pytest.raises(ConfigError, match="unknown GPTConfig preset 'gtp2'; did you mean 'gpt2'?"):
        GPTConfig.preset("gtp2")


def test_a_bad_file_is_named(tmp_path):
    bad = tmp_path / "c.yaml"
    bad.write_text("lr: [1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.yaml is not valid YAML: .*line 1"):
        read_yaml_mapping(bad)
    bad.write_text("!!python/object/apply:os.system ['true']", encoding="utf-8")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        read_yaml_mapping(bad)
    bad.write_text("- 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_yaml_mapping(bad)
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json: No such file"):
        read_json_object(tmp_path / "none.json")
    bad.write_text('{"a": ', encoding="utf-8")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_json_object(bad)
    bad.write_text("3", encoding="utf-8")
    with pytest.raises(ConfigError, match="must hold a JSON object, not int"):
        read_json_object(bad)
