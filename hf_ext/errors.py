"""Everything this library raises on purpose. Each class also derives from the builtin a caller would expect."""


class HfExtError(Exception):
    """Base of every error raised on purpose by hf_ext."""


class ConfigError(HfExtError, ValueError):
    """A setting holds a value that cannot work; the message names the field, the value and what was expected."""


class CacheStateError(HfExtError, RuntimeError):
    """A cache was asked for something it no longer holds, or was used for another batch than it was filled with."""


class AdapterStateError(HfExtError, RuntimeError):
    """An adapter was used in a state it has no answer for: put into a model but not loaded, or merged."""


class UnsupportedModelError(HfExtError, ValueError):
    """The model has a structure the method cannot serve."""


class DeltaError(HfExtError, ValueError):
    """Two checkpoints have no usable difference, or one cannot be read; the message names the tensors or the file."""


class BlobError(HfExtError, ValueError):
    """Bytes are not a delta this version can read: foreign, truncated, damaged or of a later format."""


class DataError(HfExtError, ValueError):
    """Rows, columns or features a method cannot work on; the message names them."""


class MissingPackageError(HfExtError, ImportError):
    """An optional package is not installed; the message says which and how to install it."""


class ArtifactError(HfExtError, OSError):
    """A folder is not an artifact, or holds something an artifact may not hold."""


class HubError(HfExtError, OSError):
    """The Hub could not do what was asked; the message says why and what to do.

    Args:
        message (`str`): What happened and what to do.
        status (`int`, *optional*): HTTP status of the answer, `None` where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class CheckpointError(HfExtError, ValueError):
    """A saved state does not fit what it is loaded into; the message names the setting that differs."""


class NonFiniteGradientError(HfExtError, FloatingPointError):
    """A gradient holds NaN or infinity; nothing was changed by the step that met it."""
