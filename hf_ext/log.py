"""Loggers below `hf_ext`: silent by default, on stderr when `HF_EXT_VERBOSITY` asks for it. Root is never touched."""

import logging
import os
import warnings


_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
_seen: set[tuple[str, str]] = set()


def _top() -> logging.Logger:
    top = logging.getLogger("hf_ext")
    if not top.handlers:
        wanted = os.environ.get("HF_EXT_VERBOSITY", "").strip().upper()
        top.setLevel(int(wanted) if wanted.isdigit() else _LEVELS.get(wanted, logging.WARNING))
        handler = logging.StreamHandler() if wanted else logging.NullHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        top.addHandler(handler)
    return top


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, below `hf_ext`.

    Args:
        name (`str`):
            Usually `__name__`. The environment variable `HF_EXT_VERBOSITY` (`debug`, `info`, `warning`, `error`,
            `critical`, or a number) sets the level, and sends the messages to stderr.
    """
    top = _top()
    return logging.getLogger(name) if name.split(".")[0] == "hf_ext" else top.getChild(name)


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log `message` as a warning, the first time it comes up in this process.

    Where no one has attached a handler the message goes to `warnings.warn` instead: a dropped setting must not
    disappear because an application never configured logging.
    """
    if (logger.name, message) in _seen:
        return
    _seen.add((logger.name, message))
    if _has_listener(logger):
        logger.warning(message)
    elif logger.isEnabledFor(logging.WARNING):
        warnings.warn(message, UserWarning, stacklevel=3)


def _has_listener(logger: logging.Logger | None) -> bool:
    while logger is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False
