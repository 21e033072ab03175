"""Writes the methods table of docs/index.md and README.md from the registry: `python -m docs.make_index`.

With `--check` nothing is written; the exit code is 1 when a table is stale.
"""

import sys
from pathlib import Path

from hf_ext.registry import METHODS


ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
FILES = {"docs/index.md": "methods/{}.md", "README.md": "docs/methods/{}.md"}


def methods_table(link: str) -> str:
    """The registry as a Markdown table; `link` is the page of a built method, with `{}` for its id."""
    lines = ["| id | what | paper | plugs into | status |", "| --- | --- | --- | --- | --- |"]
    for card in METHODS.values():
        name = f"[`{card.id}`]({link.format(card.id)})" if card.status == "available" else f"`{card.id}`"
        paper = f"[{card.arxiv}]({card.paper_url})" if card.arxiv else "-"
        lines.append(f"| {name} | {card.title} | {paper} | `{card.plugs_into}` | {card.status} |")
    return "\n".join(lines)


def with_table(text: str, link: str) -> str:
    """The page with the part between the two markers replaced."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{methods_table(link)}\n{END}{tail}"


def stale() -> list[str]:
    """Names of the files whose table differs from the registry."""
    return [
        name
        for name, link in FILES.items()
        if (text := (ROOT / name).read_text(encoding="utf-8")) != with_table(text, link)
    ]


def main(arguments: list[str]) -> int:
    names = stale()
    if "--check" in arguments:
        for name in names:
            print(f"{name} is stale; run python -m docs.make_index")
        return 1 if names else 0
    for name in names:
        path = ROOT / name
        path.write_text(with_table(path.read_text(encoding="utf-8"), FILES[name]), encoding="utf-8")
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
