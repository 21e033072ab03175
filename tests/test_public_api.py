"""What a user sees first: names, import cost, the command line's start-up, and the README's code."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ext


ROOT = Path(__file__).resolve().parent.parent


def _python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", hf_ext.__all__)
def test_every_export_imports(name):
    value = getattr(hf_ext, name)
    assert value.__name__ == name
    assert name in dir(hf_ext)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hf_ext.nonsense  # noqa: B018


def test_register_is_the_function_whatever_was_imported_before():
    assert _python("import hf_ext.registration, hf_ext; print(hf_ext.register.__class__.__name__)") == "function"


@pytest.mark.parametrize("module", ["hf_ext", "hf_ext.cli", "hf_ext.registry", "hf_ext.config", "hf_ext.table"])
def test_light_modules_import_no_heavy_library(module):
    heavy = ("torch", "transformers", "numpy", "peft", "accelerate", "datasets", "huggingface_hub", "rich")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    assert _python(code) == "[]"


def test_import_takes_under_a_tenth_of_a_second():
    code = "import time; t = time.process_time(); import hf_ext; print(time.process_time() - t)"
    seconds = min(float(_python(code)) for _ in range(3))
    assert seconds < 0.1


def test_help_takes_under_a_fifth_of_a_second():
    def cost() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "hf_ext", "--help"], cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cost() for _ in range(3)) < 0.2


def test_import_patches_nothing():
    # The exceptions of a public name are ours; everything else stays as the host libraries made it.
    code = """
import transformers
from transformers.generation import configuration_utils, utils
before = (configuration_utils.ALL_CACHE_IMPLEMENTATIONS, utils.GenerationMixin._prepare_cache_for_generation)
import hf_ext, hf_ext.cache_impls.ojakv, hf_ext.cache_impls.packed, hf_ext.registration
after = (configuration_utils.ALL_CACHE_IMPLEMENTATIONS, utils.GenerationMixin._prepare_cache_for_generation)
print(all(a is b for a, b in zip(before, after)))
"""
    assert _python(code) == "True"


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of transformers to PEFT
def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    blocks = _blocks((ROOT / "README.md").read_text())
    assert blocks, "the README shows no code"
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "readme"}
    try:
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"README.md, block {number}", "exec"), names)
    finally:
        hf_ext.unregister()


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_python_blocks_of_the_docs_compile(page):
    blocks = _blocks(page.read_text())
    assert blocks, "a method page shows its snippet"
    for number, block in enumerate(blocks, 1):
        compile(block, f"{page.name}, block {number}", "exec")


def test_the_embedded_version_is_the_one_of_the_changelog():
    assert re.search(r"^## \[?Unreleased", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert hf_ext.__version__ in (ROOT / "CITATION.cff").read_text()
    assert os.path.exists(ROOT / "LICENSE")
