import subprocess
import sys
from pathlib import Path

import pytest

from hf_ext.registry import METHODS


ROOT = Path(__file__).resolve().parent.parent
HEADINGS = ("When to use it", "When not", "Snippet", "Parameters", "Measured", "Differences from the paper")


def _make_index(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "docs.make_index", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_methods_tables_agree_with_the_registry():
    result = _make_index("--check")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_every_method_is_in_the_table_with_its_status(name):
    block = (ROOT / name).read_text().split("<!-- methods:begin -->")[1].split("<!-- methods:end -->")[0]
    lines = block.splitlines()
    for card in METHODS.values():
        row = next(line for line in lines if line.startswith("|") and f"`{card.id}`" in line.split("|")[1])
        assert card.arxiv in row if card.arxiv else row.split("|")[3].strip() == "-"
        assert row.rstrip(" |").endswith(card.status)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_method_pages_have_the_same_sections_in_the_same_order(page):
    found = [line[3:] for line in page.read_text().splitlines() if line.startswith("## ")]
    assert [heading for heading in found if heading in HEADINGS] == list(HEADINGS)
