import json
import logging
from dataclasses import dataclass, field
from typing import Literal

import pytest

from hf_ext import config as config_module
from hf_ext import log
from hf_ext.config import MethodConfig, write_text_atomic
from hf_ext.errors import ConfigError, HfExtError


@dataclass
class ToyConfig(MethodConfig):
    rank: int = 4
    rate: float = 0.5
    name: str = "exact"
    fast: bool = True
    limit: int | None = None
    size: int | str | None = None
    mode: Literal["a", "b"] = "a"
    layers: list[int] = field(default_factory=list)

    def validate(self):
        self.check(self.rank >= 1, "rank", "must be at least 1")


@pytest.fixture(autouse=True)
def _forget_warnings():
    log._seen.clear()


def test_json_round_trip_gives_an_equal_config():
    config = ToyConfig(rank=7, rate=1, limit=3, size="5MB", layers=[0, 2])
    assert ToyConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_dict_shares_no_list_with_the_config():
    config = ToyConfig(layers=[1])
    config.to_dict()["layers"].append(2)
    assert config.layers == [1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", "8"),
        ("rank", 8.0),
        ("rank", True),
        ("rank", None),
        ("rate", "0.5"),
        ("rate", True),
        ("rate", float("nan")),
        ("rate", float("inf")),
        ("name", 3),
        ("fast", 1),
        ("limit", 0.5),
        ("limit", "3"),
        ("size", 1.5),
        ("mode", "c"),
        ("layers", (1, 2)),
        ("layers", [1, "2"]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name, value):
    with pytest.raises(ConfigError) as caught:
        ToyConfig(**{name: value})
    assert f"ToyConfig.{name}={value!r}" in str(caught.value)


def test_a_rule_that_fails_names_class_field_value_and_expectation():
    with pytest.raises(ConfigError, match=r"^ToyConfig\.rank=0 must be at least 1\.$"):
        ToyConfig(rank=0)


def test_config_errors_can_be_caught_as_the_builtin():
    with pytest.raises(ValueError, match="rank"):
        ToyConfig(rank=-1)
    assert issubclass(ConfigError, HfExtError)


def test_an_int_is_accepted_where_a_float_is_expected():
    assert ToyConfig(rate=1).rate == 1


def test_unknown_keys_are_dropped_with_one_warning_that_names_them(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_ext"):
        first = ToyConfig.from_dict({"rank": 2, "colour": 1, "shape": 2})
        ToyConfig.from_dict({"rank": 2, "colour": 1, "shape": 2})
    assert first == ToyConfig(rank=2)
    assert len(caplog.records) == 1
    assert "colour, shape" in caplog.text


def test_strict_refuses_unknown_keys_and_suggests_the_closest():
    with pytest.raises(ConfigError) as caught:
        ToyConfig.from_dict({"rnak": 2, "zzz": 0}, strict=True)
    message = str(caught.value)
    assert "'rnak' (did you mean 'rank'?)" in message
    assert "'zzz'" in message
    assert "Known settings: rank, rate" in message


def test_from_dict_refuses_anything_but_a_dict():
    with pytest.raises(ConfigError, match="not from \\[1\\]"):
        ToyConfig.from_dict([1])


def test_saved_and_loaded_configs_are_equal_and_no_other_file_is_left(tmp_path):
    config = ToyConfig(rank=9, limit=2)
    config.save_pretrained(tmp_path / "new" / "folder")
    assert ToyConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["config.json"]


def test_a_config_made_invalid_later_is_not_saved(tmp_path):
    ToyConfig(rank=3).save_pretrained(tmp_path)
    config = ToyConfig()
    config.rank = -5
    with pytest.raises(ConfigError, match="rank=-5"):
        config.save_pretrained(tmp_path)
    assert ToyConfig.from_pretrained(tmp_path).rank == 3


def test_loading_says_what_is_wrong_with_the_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ToyConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ToyConfig.from_pretrained(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_text_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(config_module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_follow_the_umask(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert write_text_atomic(tmp_path / "atomic", "x").stat().st_mode == plain.stat().st_mode
