"""What goes wrong when the Hugging Face hub is asked, as this package's errors: one line, nothing secret."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mechinterp.errors import HubNotReached, InputError

STRANGE = (ValueError, TypeError, AttributeError, KeyError)
"""What the client raises over an answer that is none of a hub's."""


@contextmanager
def asking(repo: str, kind: str, revision: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line. No header, token or address is told."""
    from huggingface_hub.errors import HfHubHTTPError

    transport: Any = HfHubHTTPError.__bases__[0]  # of httpx, or of its successor in later versions of huggingface_hub
    try:
        yield
    except (transport, OSError, RuntimeError, *STRANGE) as error:
        raise _told(error, repo, kind, revision) from error


def _told(error: BaseException, repo: str, kind: str, revision: str) -> InputError:
    from huggingface_hub import errors

    cause: BaseException | None = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # an upload wraps what happened
        cause = cause.__cause__
    where = f"{'data set' if kind == 'dataset' else 'model'} repository {repo!r}"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return HubNotReached("The hub cannot be asked: offline mode is on (HF_HUB_OFFLINE).")
    if isinstance(cause, errors.GatedRepoError):
        return InputError(f"The {where} is gated: ask for access on its page, and log in (HF_TOKEN, `hf auth login`).")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return InputError(
            f"There is no {where}, or you may not see it: create it (`hf repos create`), or log in (HF_TOKEN, "
            "`hf auth login`)."
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return InputError(f"The {where} has no revision {revision!r}.")
    if isinstance(cause, errors.EntryNotFoundError):
        return InputError(f"The {where} does not have the file at {revision!r}.")
    if isinstance(cause, errors.LocalTokenNotFoundError):
        return InputError("The hub wants to know who you are: set HF_TOKEN, or `hf auth login`.")
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return InputError(f"The hub does not let you do that in the {where} (HTTP {status}); see HF_TOKEN.")
        if status == 429 or status >= 500:
            return HubNotReached(f"The hub cannot answer now (HTTP {status}); try again later.")
        said = " ".join((cause.server_message or "").split())[:200]
        return InputError(f"The hub refused (HTTP {status}){': ' if said else '.'}{said}")
    if isinstance(cause, errors.HFValidationError):
        return InputError(f"{repo!r} is no name of a repository.")
    if isinstance(cause, STRANGE):
        return HubNotReached(
            "What answered is no hub, or not as this version knows it; check the network and HF_ENDPOINT."
        )
    return HubNotReached(f"The hub cannot be reached: {type(cause).__name__}. Check the network and HF_ENDPOINT.")
