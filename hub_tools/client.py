"""Calls to the Hub: one way to make the client, bounded repeats where it has none, errors that say what to do.

huggingface_hub repeats listings, preuploads and downloads by itself, honours `Retry-After` there, and gives up after a
few tries. It does not repeat the creation of a repository, the look at its state or the commit; `attempt` does.
"""

import email.utils
import errno
import re
import time
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, whichever the client uses
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

import hf_ext
from hf_ext.errors import HfExtError, HubError
from hf_ext.log import get_logger


ATTEMPTS = 5
FIRST_WAIT = 1.0
# A server that asks for more patience than this is not waited for; the error names the time.
LONGEST_WAIT = 300.0
PASSING = (408, 429, 500, 502, 503, 504)
CHANGED_IN_BETWEEN = (409, 412)
NO_SPACE = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name))

T = TypeVar("T")
_logger = get_logger(__name__)


def hub_api(token: str | bool | None = None, endpoint: str | None = None) -> HfApi:
    """The client, which names this library in its user agent.

    Args:
        token (`str` or `bool`, *optional*): `None` takes the stored one, `False` sends none.
        endpoint (`str`, *optional*): Another Hub than the one of `HF_ENDPOINT`.
    """
    return HfApi(endpoint=endpoint, token=token, library_name="hf-ext", library_version=hf_ext.__version__)


def attempt(doing: str, call: Callable[[], T], repeat_when_unsure: bool = True) -> T:
    """Make a call to the Hub, repeat it while what went wrong may pass, and raise what stays wrong as `HubError`.

    Args:
        doing (`str`): Starts the message, for example `"pushing to user/name"`.
        call (`Callable`): Is called up to `ATTEMPTS` times, so it must be safe to repeat.
        repeat_when_unsure (`bool`, defaults to `True`):
            `False` repeats only what the Hub refused with 429, not what may have been done without our hearing of it.

    Returns:
        What `call` returns.

    Raises:
        HubError: with the reason and what to do. Errors that are not the Hub's pass through unchanged.
    """
    wait = FIRST_WAIT
    for left in reversed(range(ATTEMPTS)):
        try:
            return call()
        except HfExtError:
            raise
        except Exception as error:
            problem = _cause(error)
            if problem is None:
                raise
            delay = _retry_after(problem)
            pause = wait if delay is None else delay
            if not left or pause > LONGEST_WAIT or not _may_pass(problem, repeat_when_unsure):
                raise _explained(doing, error, problem, delay, repeat_when_unsure) from error
            _logger.warning("%s: %s; next try in %.0f s, %d left.", doing, _in_short(problem), pause, left)
            time.sleep(pause)
            wait *= 2
    raise HubError(f"{doing}: no attempt was made.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> BaseException | None:
    # snapshot_download wraps what happened into an error about missing local files.
    known = (HTTPError, OfflineModeIsEnabled)
    for item in _chain(error):
        if isinstance(item, known) or (isinstance(item, OSError) and item.errno in NO_SPACE):
            return item
    own = (isinstance(error, OSError) and error.errno is None) or isinstance(error, JSONDecodeError)
    return error if own else None


def _status(problem: BaseException) -> int | None:
    return problem.response.status_code if isinstance(problem, HfHubHTTPError) else None


def _may_pass(problem: BaseException, unsure: bool) -> bool:
    if not isinstance(problem, HTTPError | JSONDecodeError):
        return False
    status, path = _status(problem), _path(problem)
    # The client has already repeated these, with the same patience.
    if "/preupload/" in path or "/tree/" in path or ("/resolve/" in path and status in (408, 429)):
        return False
    return status == 429 or (unsure and (status is None or status in PASSING))


def _path(problem: BaseException) -> str:
    # The error's own `request` is emptied when it is built; its response keeps one.
    source = problem.response if isinstance(problem, HfHubHTTPError) else problem
    try:
        return source.request.url.path  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return ""


def _retry_after(problem: BaseException) -> float | None:
    """Seconds the server asked to wait: a number, or a date."""
    if not isinstance(problem, HfHubHTTPError):
        return None
    value = problem.response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        reset = re.search(r";\s*t\s*=\s*(\d+)", problem.response.headers.get("RateLimit", ""))
        return float(reset[1]) if reset and _status(problem) == 429 else None


def _in_short(problem: BaseException) -> str:
    status = _status(problem)
    return f"the Hub answered {status}" if status else f"the connection failed ({type(problem).__name__})"


def _explained(
    doing: str, error: BaseException, problem: BaseException, delay: float | None, repeatable: bool
) -> HubError:
    status = _status(problem)
    if isinstance(problem, OfflineModeIsEnabled):
        text = "offline mode is on; unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) to reach the Hub."
    elif isinstance(problem, OSError) and problem.errno in NO_SPACE:
        text = "the disk is full; nothing was kept. Free some space or choose another disk, and repeat."
    elif isinstance(problem, GatedRepoError):
        text = "the repository is gated; ask for access on its page, then repeat with the token of that account."
    elif status == 401:
        text = (
            "the Hub does not accept the token, or shows this repository only to those it knows. Log in with "
            "`hf auth login`, or set HF_TOKEN, or pass token=; and check the name."
        )
    elif status == 403:
        text = (
            "the token has no right to do this. Use a token with write access to this namespace, or another "
            "repository name."
        )
    elif isinstance(problem, RevisionNotFoundError):
        text = "the repository has no such revision. Check its name, or create the branch with HfApi().create_branch."
    elif status == 404:
        text = "there is no such repository, or this token may not see it. Check the name and the token."
    elif status in CHANGED_IN_BETWEEN:
        text = "someone changed the repository in between; nothing was written. Pull what is there now, then repeat."
    elif status == 429:
        text = f"too many requests. Wait {f'{delay:.0f} s' if delay else 'some minutes'} and repeat."
    elif status is not None and status >= 500:
        text = (
            "the Hub has a fault of its own, also after repeats. See https://status.huggingface.co and repeat later."
        )
    elif status is not None:
        text = f"the Hub refuses the request: {_one_line(error)}"
    elif isinstance(problem, HTTPError) and repeatable:
        text = "the connection failed, also after repeats. Check the network and repeat; repeating is safe."
    elif isinstance(problem, HTTPError):
        text = "the connection failed and the outcome is unknown. Look at the repository before you repeat."
    elif isinstance(problem, JSONDecodeError):
        text = "the answer is not what a Hub sends. Check HF_ENDPOINT, a proxy or a firewall, and repeat."
    else:
        text = f"{_one_line(problem)} Repeat it."
    return HubError(f"{doing}: {text}" + (f" (HTTP {status})" if status else ""), status=status)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
