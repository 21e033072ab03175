"""The house rules that a reader of one file cannot see: what is packaged, who imports whom, what is not used."""

import ast
import re
from pathlib import Path

import pytest


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parent.parent
AREAS = ("cache_impls", "trainers", "merging", "hub_tools")
# Run by people, not imported by other code: these may print, and may import everything.
FRONT = ("hf_ext/cli.py", "hf_ext/cli_delta.py", "hf_ext/cli_detect.py", "hf_ext/demo.py", "hf_ext/demo_delta.py")
SKIPPED_FOLDERS = {"build", "dist", "site", "demo"}
HOSTS = {"transformers", "peft", "accelerate", "datasets"}
# Core files whose job is another library's objects, so that they import it at the top.
HOST_FILES = ("hf_ext/tiny.py", "hf_ext/registration.py")
# Binds the areas' classes to other libraries' names, so it may reach them, but only when it is called.
BINDING_FILES = ("hf_ext/registration.py",)


def _files(*suffixes: str) -> list[Path]:
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if any(part in SKIPPED_FOLDERS or (part.startswith(".") and part != ".ci") for part in parts[:-1]):
            continue
        if path.is_file() and (path.suffix in suffixes or path.name in suffixes):
            found.append(path)
    return found


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


LIBRARY = [path for path in _files(".py") if _name(path).split("/")[0] in ("hf_ext", *AREAS)]


def _module(name: str) -> str:
    """Where a file of the checkout is imported from: `cache_impls/x.py` is `hf_ext.cache_impls.x`."""
    dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return dotted if dotted.split(".")[0] == "hf_ext" else f"hf_ext.{dotted}"


def _imports(tree: ast.AST, module: str, is_package: bool) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def _without(tree: ast.Module, *, type_checking: bool = True, functions: bool = False) -> ast.Module:
    """A copy of the tree without `if TYPE_CHECKING:` blocks and, if asked, without function bodies."""

    class Cut(ast.NodeTransformer):
        def visit_If(self, node):
            if type_checking and "TYPE_CHECKING" in ast.unparse(node.test):
                return [self.visit(item) for item in node.orelse] or ast.Pass()
            return self.generic_visit(node)

        def visit_FunctionDef(self, node):
            return ast.Pass() if functions else self.generic_visit(node)

        visit_AsyncFunctionDef = visit_FunctionDef

    return Cut().visit(tree)


def _area(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "hf_ext" and parts[1] in (*AREAS, "pipelines") else None


def forbidden_imports(name: str, source: str) -> list[str]:
    """Imports of a library file that go against the direction core <- areas <- benches and command line."""
    module = _module(name)
    tree = _without(ast.parse(source))
    imports = _imports(tree, module, name.endswith("__init__.py"))
    bad = [f"{found}: import it as hf_ext.{found}" for found in imports if found.split(".")[0] in AREAS]
    top = _imports(_without(ast.parse(source), functions=True), module, name.endswith("__init__.py"))
    own = _area(module)
    if own:
        bad += [f"{found}: areas do not import each other" for found in imports if _area(found) not in (None, own)]
        bad += [
            f"{found}: areas do not import the front"
            for found in imports
            if found.startswith(("hf_ext.cli", "hf_ext.benches", "hf_ext.demo"))
        ]
        if own == "cache_impls":
            # Importing it takes eleven seconds, and no cache needs it.
            bad += [found for found in imports if found.startswith("transformers") and "Trainer" in found]
    elif name not in FRONT and not name.startswith("hf_ext/benches/"):
        reached = top if name in BINDING_FILES else imports
        bad += [f"{found}: core imports no area" for found in reached if _area(found)]
        if name not in HOST_FILES:
            bad += [f"{found}: only inside a function" for found in top if found.split(".")[0] in HOSTS]
    return bad


def banned_code(name: str, source: str) -> list[str]:
    """Statements library code does not use: `assert` for errors, `print` for results, absolute paths."""
    bad = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Assert):
            bad.append(f"line {line}: assert; raise an error of hf_ext.errors")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            if name not in FRONT:
                bad.append(f"line {line}: print; return the text, the command line prints")
    return bad


ABSOLUTE = re.compile(r"(?<![\w.~}$)/:*-])/(?:home|root|opt|tmp|usr|var|mnt|srv|data|work|content)(?:/|\b)")


def absolute_paths(text: str) -> list[str]:
    lines = text.splitlines()
    return [
        line
        for number, line in enumerate(lines)
        if not (number == 0 and line.startswith("#!")) and ABSOLUTE.search(line)
    ]


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_the_wheel_lists_every_package_on_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        _module(_name(path)) for path in LIBRARY if path.name == "__init__.py" and "custom_generate" not in path.parts
    }
    assert set(settings["packages"]) == on_disk
    assert set(settings["package-dir"]) == {"hf_ext", *(f"hf_ext.{area}" for area in AREAS)}


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_every_python_file_of_an_area_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data = settings["package-data"]
    for path in LIBRARY:
        package = _module(_name(path.parent / "__init__.py"))
        if package in settings["packages"]:
            continue
        owner = f"hf_ext.{_name(path).split('/')[0]}"
        inside = path.relative_to(ROOT / _name(path).split("/")[0])
        assert any(inside.match(pattern) for pattern in data.get(owner, [])), f"{_name(path)} is not in the wheel"


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_imports_point_from_areas_to_core(path):
    assert forbidden_imports(_name(path), path.read_text()) == []


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_library_code_raises_and_returns_instead_of_asserting_and_printing(path):
    assert banned_code(_name(path), path.read_text()) == []


@pytest.mark.parametrize("path", _files(".py"), ids=_name)
def test_no_file_outgrows_a_reader(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 600, f"{_name(path)} has {lines} lines; split it"


def test_no_file_names_a_path_of_one_machine():
    texts = _files(".py", ".md", ".toml", ".yml", ".cff", ".json", "Makefile", "run")
    found = {_name(path): absolute_paths(path.read_text()) for path in texts}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_rules_catch_what_they_are_for():
    assert forbidden_imports("hf_ext/log.py", "from hf_ext.cache_impls import ojakv")
    assert forbidden_imports("hf_ext/log.py", "def f():\n    import hf_ext.merging.osd")
    assert forbidden_imports("hf_ext/registration.py", "import hf_ext.merging.osd")
    assert forbidden_imports("hf_ext/registration.py", "def f():\n    import hf_ext.merging.osd") == []
    assert forbidden_imports("hf_ext/log.py", "import transformers")
    assert forbidden_imports("hf_ext/log.py", "def f():\n    import transformers") == []
    assert forbidden_imports("trainers/sgc.py", "from hf_ext.merging.osd import x")
    assert forbidden_imports("trainers/sgc.py", "from ..merging import osd")
    assert forbidden_imports("trainers/sgc.py", "from . import ofmu\nfrom hf_ext.errors import HfExtError") == []
    assert forbidden_imports("trainers/sgc.py", "import merging.osd")
    assert forbidden_imports("cache_impls/ojakv.py", "from transformers import Trainer")
    assert forbidden_imports("hf_ext/cli.py", "def f():\n    from hf_ext.cache_impls import ojakv") == []
    assert banned_code("hf_ext/log.py", "assert x")
    assert banned_code("hf_ext/log.py", "print(x)")
    assert banned_code("hf_ext/cli.py", "print(x)") == []
    assert absolute_paths('cache = "/' + 'home/someone/cache"')
    assert absolute_paths("see ./demo and ~/.cache/hf_ext and a/data/b") == []
