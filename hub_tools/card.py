"""The model card of an artifact: front matter the Hub understands, and a body filled from the manifest alone.

Nothing is said that the manifest does not hold: a table of what was measured, the exact settings, the loading snippet.
Whether the snippet was run before the push is not known here and not said. The text around it is `templates/card.md`.
"""

import json
import re
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from hf_ext.artifact import LORA_FOLDER, Artifact
from hf_ext.registry import METHODS
from hf_ext.table import Row, format_value


TEMPLATE = Path(__file__).parent / "templates" / "card.md"


def render_card(artifact: Artifact, repo_id: str | None = None, license: str | None = None) -> str:
    """The text of `README.md`.

    Args:
        artifact (`Artifact`): What is described. Its folder, if it has one, is only looked at for a `lora` subfolder.
        repo_id (`str`, *optional*): Where it will lie on the Hub; without it the card speaks of a local folder.
        license (`str`, *optional*): Licence id. Defaults to the one in the manifest; left out where both are missing.

    Returns:
        `str`: front matter and Markdown, ending in a newline.
    """
    where = repo_id or "path/to/this/folder"
    sections = {
        "title": where.split("/")[-1] if repo_id else artifact.method,
        "summary": _summary(artifact),
        "opening": _opening(artifact),
        "measured": _measured(artifact),
        "config": fenced(json.dumps(artifact.config, indent=2, ensure_ascii=False), "json"),
        "loading": _loading(artifact, where),
        "restoring": _restoring(artifact, where),
        "plain": _plain(artifact, where),
    }
    body = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(sections)
    return f"---\n{_front_matter(artifact, license)}\n---\n\n{body.rstrip()}\n"


def runnable(snippet: str, where: str) -> str:
    """The loading snippet with `REPO` bound to a folder or a repository: what the card shows and what is executed."""
    return f"REPO = {json.dumps(where, ensure_ascii=False)}\n\n{snippet.strip()}\n"


def fenced(text: str, language: str) -> str:
    """A Markdown code block that no run of backticks inside `text` can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _front_matter(artifact: Artifact, license: str | None) -> str:
    card = METHODS.get(artifact.method)
    tags = ["hf-ext", artifact.method, *([f"arxiv:{card.arxiv}"] if card and card.arxiv else []), *artifact.tags]
    fields: dict[str, Any] = {
        "license": license or artifact.license,
        "library_name": artifact.library_name,
        "tags": list(dict.fromkeys(tags)),
        "base_model": artifact.base_model,
        "base_model_relation": "adapter" if artifact.base_model else None,
    }
    return ModelCardData(**{key: value for key, value in fields.items() if value is not None}).to_yaml()


def _summary(artifact: Artifact) -> str:
    base = ""
    if artifact.base_model:
        base = f" for [{artifact.base_model}](https://huggingface.co/{artifact.base_model})"
        base += f" at revision `{artifact.base_revision}`" if artifact.base_revision else ""
    card = METHODS.get(artifact.method)
    if card is None:
        return f"An artifact of the method `{artifact.method}`{base}."
    paper = f" ([arXiv:{card.arxiv}]({card.paper_url}))" if card.paper_url else ""
    return f"{card.title}: an artifact of the method `{card.id}`{paper}{base}."


def _opening(artifact: Artifact) -> str:
    return (
        "Opening it needs the package that made it: `pip install hf-ext`."
        if artifact.library_name == "hf-ext"
        else f"Opening it needs {artifact.library_name} and the package that made it: `pip install hf-ext`."
    )


def _measured(artifact: Artifact) -> str:
    if not artifact.measured:
        return ""
    lines = ["## Measured", "", "| what | value | unit |", "| --- | ---: | --- |"]
    for item in artifact.measured:
        value = format_value(Row(artifact.method, "", "", item.what, item.value, item.unit))
        lines.append(f"| {_cell(item.what)} | {value} | {_cell(item.unit)} |")
    return "\n".join(lines) + "\n\n"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _loading(artifact: Artifact, where: str) -> str:
    if artifact.snippet is None or not artifact.snippet.strip():
        return ""
    return f"## Loading\n\n{fenced(runnable(artifact.snippet, where), 'python')}\n\n"


def _restoring(artifact: Artifact, where: str) -> str:
    base = " It fetches the base model where it is not on this machine yet." if artifact.base_model else ""
    return f"{fenced(f'hf-ext restore {where} --to DIR', 'bash')}\n\nwrites one to `DIR`.{base}"


def _plain(artifact: Artifact, where: str) -> str:
    if artifact.folder is None or not (artifact.folder / LORA_FOLDER).is_dir():
        return ""
    return (
        f"\n## Without hf-ext\n\nThe subfolder `{LORA_FOLDER}/` holds an approximation of its matrices as a plain LoRA adapter, not measured. Any "
        f'PEFT client opens it: `PeftModel.from_pretrained(model, "{where}", subfolder="{LORA_FOLDER}")`.\n'
    )
