import json
from dataclasses import replace

import pytest
import yaml

from hf_ext.artifact import Artifact, Measured
from hf_ext.hub_tools.card import TEMPLATE, fenced, render_card, runnable
from hf_ext.registry import METHODS


ARTIFACT = Artifact(
    method="osd",
    library_name="peft",
    base_model="org/base",
    base_revision="abc123",
    tags=("text-generation", "osd"),
    config={"rank": 8, "budget": "5MB"},
    measured=(
        Measured("bytes before", 538090408, "bytes"),
        Measured("bytes after", 5000000, "bytes"),
        Measured("relative error, q_proj", 0.8125),
        Measured("a|b", 2, "x|y"),
    ),
    snippet="\nfrom hf_ext import load\n\nmodel = load(REPO)\n\n\nprint(model)",
)


def front_matter(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_front_matter_is_what_the_hub_filters_by():
    head, _ = front_matter(render_card(ARTIFACT, "user/delta", license="mit"))
    assert head == {
        "license": "mit",
        "library_name": "peft",
        "tags": ["hf-ext", "osd", f"arxiv:{METHODS['osd'].arxiv}", "text-generation"],
        "base_model": "org/base",
        "base_model_relation": "adapter",
    }


def test_what_is_not_known_is_left_out():
    head, body = front_matter(render_card(Artifact("osd")))
    assert set(head) == {"library_name", "tags"}
    assert "None" not in body
    assert "null" not in body
    assert "$" not in body
    assert "## Measured" not in body
    assert "## Loading" not in body


def test_the_licence_of_the_manifest_is_the_default():
    assert front_matter(render_card(replace(ARTIFACT, license="cc-by-4.0")))[0]["license"] == "cc-by-4.0"
    assert front_matter(render_card(replace(ARTIFACT, license="cc-by-4.0"), license="mit"))[0]["license"] == "mit"


def test_the_body_names_method_paper_base_and_package():
    _, body = front_matter(render_card(ARTIFACT, "user/delta"))
    assert body.startswith("\n# delta\n")
    assert f"https://arxiv.org/abs/{METHODS['osd'].arxiv}" in body
    assert METHODS["osd"].title in body
    assert "[org/base](https://huggingface.co/org/base) at revision `abc123`" in body
    assert "pip install hf-ext" in body
    assert "hf-ext restore user/delta --to DIR" in body


def test_every_measured_number_is_in_the_table():
    _, body = front_matter(render_card(ARTIFACT, "user/delta"))
    assert "| bytes before | 538,090,408 | bytes |\n| bytes after | 5,000,000 | bytes |\n" in body
    assert "| relative error, q_proj | 0.8125 |  |" in body
    assert r"| a\|b | 2 | x\|y |" in body


def test_the_settings_are_exact():
    _, body = front_matter(render_card(ARTIFACT))
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == ARTIFACT.config


def test_the_snippet_is_what_is_executed():
    _, body = front_matter(render_card(ARTIFACT, "user/delta"))
    shown = body.split("```python\n")[1].split("```")[0]
    assert shown == runnable(ARTIFACT.snippet, "user/delta")
    assert shown == 'REPO = "user/delta"\n\nfrom hf_ext import load\n\nmodel = load(REPO)\n\n\nprint(model)\n'


@pytest.mark.parametrize("where", ["a/b", "C:\\some\\folder", 'quote"d', "één"])
def test_repo_is_bound_to_exactly_the_place(where):
    space = {}
    exec(runnable("found = REPO", where), space)
    assert space["found"] == where


def test_the_lora_folder_is_mentioned_only_where_it_is(tmp_path):
    artifact = replace(ARTIFACT, folder=tmp_path)
    assert "lora" not in render_card(artifact, "user/delta")
    (tmp_path / "lora").mkdir()
    assert 'from_pretrained(model, "user/delta", subfolder="lora")' in render_card(artifact, "user/delta")


def test_a_method_outside_the_table_gets_a_card_without_paper():
    head, body = front_matter(render_card(Artifact("mine"), "user/x"))
    assert head["tags"] == ["hf-ext", "mine"]
    assert "arxiv" not in body.lower()
    assert "the method `mine`" in body


def test_the_local_folder_is_never_named(tmp_path):
    assert str(tmp_path) not in render_card(replace(ARTIFACT, folder=tmp_path))


def test_backticks_inside_a_block_do_not_end_it():
    assert fenced("a\n```\nb", "text") == "````text\na\n```\nb\n````"
    card = render_card(replace(ARTIFACT, snippet='x = """\n```\n# not a heading\n"""'))
    assert card.count("````") == 2


def test_dollar_signs_of_the_manifest_are_text():
    assert "$title ${x}" in render_card(replace(ARTIFACT, snippet="# $title ${x}"))


def test_the_template_is_installed_with_the_code():
    from importlib.resources import files

    assert (files("hf_ext.hub_tools") / "templates" / "card.md").read_text() == TEMPLATE.read_text()
