"""Everything this library raises on purpose. Each class also derives from the builtin a caller would expect."""


class HfExtError(Exception):
    """Base of every error raised on purpose by hf_ext."""


class ConfigError(HfExtError, ValueError):
    """A setting holds a value that cannot work; the message names the field, the value and what was expected."""


class CacheStateError(HfExtError, RuntimeError):
    """A cache was asked for something it no longer holds, or was used for another batch than it was filled with."""


class UnsupportedModelError(HfExtError, ValueError):
    """The model has a structure the method cannot serve."""


class MissingPackageError(HfExtError, ImportError):
    """An optional package is not installed; the message says which and how to install it."""
