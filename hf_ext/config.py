"""`MethodConfig`: the dataclass every method's settings derive from. Checked when built, stored as JSON."""

import dataclasses
import difflib
import inspect
import json
import math
import os
import tempfile
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union

from hf_ext.errors import ConfigError
from hf_ext.log import get_logger, warn_once


CONFIG_NAME = "config.json"

ConfigT = TypeVar("ConfigT", bound="MethodConfig")

_logger = get_logger(__name__)


@dataclass
class MethodConfig:
    """Base of every method's settings.

    A subclass is a dataclass whose fields are plain JSON types with working defaults. Types are checked when the
    object is built; what a type cannot say goes into `validate`, one `check` per rule.

    Example:
        ```python
        @dataclass
        class ToyConfig(MethodConfig):
            rank: int = 8

            def validate(self):
                self.check(self.rank >= 1, "rank", "must be at least 1")
        ```
    """

    _hints: ClassVar[dict[type, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        self._check_types()
        self.validate()

    def validate(self) -> None:
        """Rules a type cannot express. Subclasses override this; it runs after the types were checked."""

    def check(self, condition: bool, field: str, expectation: str) -> None:
        """Raise `ConfigError` naming `field`, its value and `expectation`, unless `condition` holds.

        Args:
            condition (`bool`): What must be true.
            field (`str`): Name of the field at fault.
            expectation (`str`): Completes the sentence "X.field=value ...", for example `"must be at least 1"`.
        """
        if not condition:
            value = getattr(self, field)
            raise ConfigError(f"{type(self).__name__}.{field}={value!r} {expectation.rstrip('.')}.")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types; `from_dict` gives back an equal object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[ConfigT], data: dict[str, Any], strict: bool = False) -> ConfigT:
        """Build the config from a mapping.

        Args:
            data (`dict`): Field names and values.
            strict (`bool`, defaults to `False`):
                `False` drops unknown keys with one warning, so that a file written by a newer version still loads.
                `True` raises `ConfigError` and names the closest known field: for settings typed by a person.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.__name__} is built from a dict of settings, not from {data!r}.")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [str(key) for key in data if key not in known]
        if unknown and strict:
            raise ConfigError(
                f"{cls.__name__} has no {_plural('setting', unknown)} {'; '.join(_guess(key, known) for key in unknown)}. "
                f"Known settings: {', '.join(known)}."
            )
        if unknown:
            warn_once(_logger, f"{cls.__name__} ignores unknown {_plural('setting', unknown)} {', '.join(unknown)}.")
        return cls(**{key: value for key, value in data.items() if key in known})

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Check the fields again, then write `config.json`. The file is replaced in one step or left alone."""
        self.__post_init__()
        return write_text_atomic(Path(save_directory) / CONFIG_NAME, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls: type[ConfigT], folder: str | os.PathLike) -> ConfigT:
        """Read `config.json` from a local folder. Unknown keys are dropped with a warning."""
        path = Path(folder) / CONFIG_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; write it with {cls.__name__}.save_pretrained.") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}.") from None
        return cls.from_dict(data)

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Types by name of the fields we declare: those a host library's class declares are checked by that library."""
        if cls not in cls._hints:
            ours = [base for base in reversed(cls.__mro__) if issubclass(base, MethodConfig)]
            cls._hints[cls] = {
                name: hint for base in ours for name, hint in inspect.get_annotations(base, eval_str=True).items()
            }
        return cls._hints[cls]

    def _check_types(self) -> None:
        hints = self.field_types()
        for field in dataclasses.fields(self):
            if field.name not in hints:
                continue
            hint = hints[field.name]
            value = getattr(self, field.name)
            self.check(_fits(value, hint), field.name, f"must be {_describe(hint)}")
            if isinstance(value, float):
                self.check(math.isfinite(value), field.name, "must be a finite number")


def write_text_atomic(path: str | os.PathLike, text: str) -> Path:
    """`write_bytes_atomic` of text in UTF-8."""
    return write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | os.PathLike, content: bytes) -> Path:
    """Write through a temporary file in the same folder and `os.replace`, so that readers never see half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # mkstemp makes the file private; a plain open would have followed the umask.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in args)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in args)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in args)
    if hint is None or hint is type(None):
        return "None"
    if origin is not None:
        return str(hint)
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "True or False",
        list: "a list",
        dict: "a dict",
    }
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _guess(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"{key!r} (did you mean {close[0]!r}?)" if close else repr(key)


def _plural(noun: str, items: list[str]) -> str:
    return noun if len(items) == 1 else noun + "s"
