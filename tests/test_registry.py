"""The table of methods, and the tests every built method has to pass."""

import dataclasses
import importlib
import inspect
import json
import re
import typing
from pathlib import Path

import pytest

import hf_ext
from hf_ext.config import MethodConfig
from hf_ext.errors import ConfigError
from hf_ext.registry import AREAS, METHODS, MethodCard, build_table, load


ROOT = Path(__file__).resolve().parent.parent
AVAILABLE = [card for card in METHODS.values() if card.status == "available"]
PLANNED = [card for card in METHODS.values() if card.status == "planned"]

# Fields whose values are free text (a path, say): no string is wrong by itself.
FREE_TEXT = {"ojakv": {"calibration"}, "sentencekv": {"offload_dir"}, "hybridkv": {"offload_dir"}}


def available(argnames="card"):
    return pytest.mark.parametrize(argnames, AVAILABLE, ids=lambda card: card.id)


def test_there_are_thirteen_methods_with_thirteen_papers():
    papers = [card.arxiv for card in METHODS.values() if card.arxiv]
    assert len(papers) == len(set(papers)) == 13
    assert [card.id for card in METHODS.values() if not card.arxiv] == ["hybridkv"]


@pytest.mark.parametrize("card", METHODS.values(), ids=lambda card: card.id)
def test_every_row_is_complete(card):
    assert METHODS[card.id] is card
    assert re.fullmatch(r"[a-z_]+", card.id)
    if card.arxiv is None:
        assert card.paper_url is None
        assert card.status == "available", "a method of our own is listed when it is built"
    else:
        assert re.fullmatch(r"\d{4}\.\d{5}", card.arxiv)
        assert card.paper_url.endswith(card.arxiv)
    assert card.area in AREAS
    assert card.title
    assert card.plugs_into


@pytest.mark.parametrize("card", PLANNED, ids=lambda card: card.id)
def test_a_planned_method_does_not_pretend(card):
    assert (card.config, card.entry, card.bench) == (None, None, None)
    folder = "hf_ext/pipelines" if card.area == "pipelines" else card.area
    assert not (ROOT / folder / f"{card.id}.py").exists(), "built: fill in its row"


def test_an_id_cannot_be_registered_twice():
    card = MethodCard("x", "X", "2001.00001", "merging", "somewhere")
    with pytest.raises(ConfigError, match="'x' is registered twice"):
        build_table(card, card)


def test_a_row_cannot_be_half_registered():
    with pytest.raises(ConfigError, match="half registered"):
        MethodCard("x", "X", "2001.00001", "merging", "somewhere", config="a:B")


def test_a_row_needs_a_known_area():
    with pytest.raises(ConfigError, match="area='nowhere'"):
        MethodCard("x", "X", "2001.00001", "nowhere", "somewhere")


@available()
def test_default_config_survives_json(card):
    config = load(card.config)()
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())), strict=True)
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()


@available()
def test_config_survives_a_folder(card, tmp_path):
    # A config that is also one of PEFT is read back by its registered type.
    with hf_ext.registered():
        config = load(card.config)()
        config.save_pretrained(tmp_path)
        again = type(config).from_pretrained(tmp_path)
        assert type(again) is type(config)
        # transformers fills in where a config was read from; that is no setting of ours.
        assert again.to_dict() | {"architectures": None} == config.to_dict() | {"architectures": None}


def _fields():
    return [pytest.param(card, field, id=f"{card.id}-{field}") for card in AVAILABLE for field in _field_names(card)]


def _field_names(card):
    try:
        return own_fields(load(card.config))
    except ImportError:
        return ["config_cannot_be_imported"]


def own_fields(cls):
    """Names of the fields that we declare, not those inherited from a host library's config."""
    ours = [base for base in cls.__mro__ if issubclass(base, MethodConfig)]
    declared = {name for base in ours for name in inspect.get_annotations(base)}
    return [field.name for field in dataclasses.fields(cls) if field.name in declared]


@pytest.mark.parametrize(("card", "field"), _fields())
def test_a_bad_value_is_refused_and_the_field_named(card, field):
    cls = load(card.config)
    hint = cls.field_types()[field]
    options = set(typing.get_args(hint)) or {hint}
    bad = [["not", "a mapping"] if dict in map(typing.get_origin, options) else {"not": "a plain value"}]
    if options & {int, float}:
        bad += [-(10**9), True]
    if str in options and field not in FREE_TEXT.get(card.id, ()):
        bad.append("no such choice")
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            cls(**{field: value})
        assert f"{cls.__name__}.{field}=" in str(caught.value), f"{value!r} was refused for another field"


@available()
def test_every_field_is_documented_in_the_docstring_and_on_the_docs_page(card):
    cls = load(card.config)
    page = (ROOT / "docs" / "methods" / f"{card.id}.md").read_text()
    for field in own_fields(cls):
        named = re.search(rf"^\s*(?:.*\), )?{field} \(", inspect.getdoc(cls), re.MULTILINE)
        assert named, f"docstring lacks {field}"
        assert f"`{field}`" in page, f"the page lacks {field}"


@available()
def test_the_module_cites_its_paper_and_says_where_it_differs(card):
    text = importlib.import_module(card.entry.partition(":")[0]).__doc__
    if card.arxiv is None:
        assert "From no paper" in text
    else:
        assert card.arxiv in text
        assert re.search(r"^Differs from the paper\b[^.]*:", text, re.MULTILINE)


@available()
def test_the_bench_can_be_run_and_says_what_it_compares(card):
    module = importlib.import_module(card.bench)
    assert list(inspect.signature(module.run).parameters) == ["seeds"]
    assert module.__doc__


@available()
def test_every_method_has_a_page_in_the_navigation(card):
    assert f"methods/{card.id}.md" in (ROOT / "mkdocs.yml").read_text()
