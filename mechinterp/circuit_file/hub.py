"""`push_circuit` and `pull_circuit`: circuit files on the Hugging Face hub, always at a known commit.

Names and bytes from a repository are untrusted: names are checked, sizes are bounded before and during reading, and
nothing is kept until both files are known to be a circuit file with the hashes that it states. Errors of the hub's
client become errors of this package: one line, without tokens or addresses.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from mechinterp.base.canonical_json import parse_json
from mechinterp.base.errors import FormatError, HubNotReached, InputError, clip
from mechinterp.base.plain_files import exists, is_file, read_bounded
from mechinterp.base.registry import unknown
from mechinterp.circuit_file.circuit_file import circuit_of
from mechinterp.circuit_file.limits import MAX_GRAPH_CELLS
from mechinterp.circuit_file.read_document import MAX_JSON_BYTES
from mechinterp.circuit_file.store import (
    SUFFIX,
    check_hashes,
    open_circuit_file,
    parse_circuit_file,
    place_pair,
    read_sidecar,
    sidecar_name,
)

NOT_A_HUB = (ValueError, TypeError, AttributeError, KeyError)
"""What the client raises if the answer does not come from a hub."""


@contextmanager
def asking(repo: str, kind: str, revision: str) -> Iterator[None]:
    """Turn any error of the hub's client into one of this package: one line, without headers, tokens or addresses."""
    from huggingface_hub.errors import HfHubHTTPError

    transport: Any = HfHubHTTPError.__bases__[0]  # of httpx, or of its successor in later versions of huggingface_hub
    try:
        yield
    except (transport, OSError, RuntimeError, *NOT_A_HUB) as error:
        raise _converted(error, repo, kind, revision) from error


def _converted(error: BaseException, repo: str, kind: str, revision: str) -> InputError:
    from huggingface_hub import errors

    cause: BaseException | None = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # an upload wraps the real error
        cause = cause.__cause__
    where = f"{'data set' if kind == 'dataset' else 'model'} repository {repo!r}"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return HubNotReached("The hub cannot be reached: offline mode is on (HF_HUB_OFFLINE).")
    if isinstance(cause, errors.GatedRepoError):
        return InputError(f"The {where} is gated: ask for access on its page, and log in (HF_TOKEN, `hf auth login`).")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return InputError(
            f"The {where} does not exist, or you may not see it: create it (`hf repos create`), or log in (HF_TOKEN, "
            "`hf auth login`)."
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return InputError(f"The {where} has no revision {revision!r}.")
    if isinstance(cause, errors.EntryNotFoundError):
        return InputError(f"The {where} does not have the file at {revision!r}.")
    if isinstance(cause, errors.LocalTokenNotFoundError):
        return InputError("The hub needs a login: set HF_TOKEN, or run `hf auth login`.")
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return InputError(f"You have no permission for this in the {where} (HTTP {status}); check HF_TOKEN.")
        if status == 429 or status >= 500:
            return HubNotReached(f"The hub cannot answer at the moment (HTTP {status}); try again later.")
        said = " ".join((cause.server_message or "").split())[:200]
        return InputError(f"The hub refused the request (HTTP {status}){': ' if said else '.'}{said}")
    if isinstance(cause, errors.HFValidationError):
        return InputError(f"{repo!r} is not the name of a repository.")
    if isinstance(cause, NOT_A_HUB):
        return HubNotReached("The answer is not that of a Hugging Face hub; check the network and HF_ENDPOINT.")
    return HubNotReached(f"The hub cannot be reached: {type(cause).__name__}. Check the network and HF_ENDPOINT.")


MAX_SIDECAR_BYTES = 8 * MAX_GRAPH_CELLS + 2**17
"""The size of the scores of the largest graph that a file may describe, in float64, with the header."""
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 30
"""Timeout for each read from the hub."""
SECONDS_IN_ALL = 600
"""Timeout for a whole answer."""
MAX_INDEX_BYTES = 16 * 2**20
"""The largest list of the files in a repository that is read, about 100,000 files."""
SHOWN = 10
_REPO = re.compile(r"(?:(?P<kind>datasets|models)/)?(?P<id>[\w.-]{1,96}/[\w.-]{1,96})(?:/(?P<path>.+))?", re.ASCII)


@dataclass(frozen=True)
class Place:
    """A repository of the hub, `org/name` or (a data set) `datasets/org/name`, and a file in it ("": none)."""

    repo: str
    kind: str
    path: str

    @staticmethod
    def parse(text: str) -> Place:
        """The place written as `[datasets/]org/name[/path]`. Raises InputError for anything else."""
        found = _REPO.fullmatch(text)
        if found is None:
            raise InputError(f"{clip(text, 200)!r} is not a repository of the hub; give org/name or datasets/org/name.")
        path = found["path"] or ""
        if path:
            check_path(path)
        return Place(found["id"], "dataset" if found["kind"] == "datasets" else "model", path)

    def __str__(self) -> str:
        return ("datasets/" if self.kind == "dataset" else "") + "/".join(filter(None, (self.repo, self.path)))


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, and the commit that holds it: pull `place` at revision `commit`.

    `new` is False if the repository already had these files; `commit` is then its latest one.
    """

    place: Place
    commit: str
    files: tuple[str, ...]
    new: bool


@dataclass(frozen=True)
class Pulled:
    """The downloaded files, the circuit file first; `new` says whether any of them was written."""

    place: Place
    commit: str
    files: tuple[Path, ...]
    new: bool


def push_circuit(
    file: str | Path, repo: str, *, revision: str = "main", message: str | None = None, endpoint: str | None = None
) -> Pushed:
    """Upload a circuit file and its sidecar to the top folder of a repository, in one commit; return that commit.

    The file is validated before the upload, and afterwards the hub is asked whether the commit holds both files.
    Credentials come from `huggingface_hub` (HF_TOKEN or `hf auth login`).

    Args:
        file: the circuit file; its sidecar is uploaded with it.
        repo: `org/name`, or `datasets/org/name`; the repository must exist.
        revision: the branch to commit to.
        message: the commit message. None: "Add circuit NAME".
        endpoint: the address of the hub. None: HF_ENDPOINT, or the public one.

    Raises:
        FormatError: if the file is not a valid circuit file or its hashes do not match.
        InputError: if the repository or branch does not exist, or you may not write to it.
        HubNotReached: if the hub cannot be reached.
    """
    path, place = Path(file), Place.parse(repo)
    if place.path:
        raise InputError(f"Files go to the top folder of a repository; give {place.repo!r} without {place.path!r}.")
    sidecar_name(path)
    contents = {path.name: read_bounded(path, MAX_JSON_BYTES)}
    opened = parse_circuit_file(contents[path.name], path)  # check the bytes that are uploaded
    circuit_of(opened)
    sidecar = opened.document.integrity.sidecar
    if sidecar is not None:
        contents[sidecar.file] = read_sidecar(path, sidecar, MAX_SIDECAR_BYTES)
    summary = message or f"Add circuit {path.name.removesuffix(SUFFIX)}"
    with asking(place.repo, place.kind, revision):
        from huggingface_hub import CommitOperationAdd

        api = _api(endpoint)
        before = _index(api, place, revision)[0]
        done = api.create_commit(
            place.repo,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in contents.items()],
            commit_message=summary,
            repo_type=place.kind,
            revision=revision,
        )
        sizes = _sizes(api, place, list(contents), done.oid)
    wrong = [name for name, data in contents.items() if sizes.get(name) != len(data)]
    if wrong:
        raise InputError(
            f"Commit {done.oid} of {place} does not hold {', '.join(wrong)} as it was uploaded; look at the "
            "repository's .gitignore."
        )
    return Pushed(Place(place.repo, place.kind, path.name), done.oid, tuple(contents), done.oid != before)


def pull_circuit(
    repo: str, *, revision: str | None, out: str | Path = ".", force: bool = False, endpoint: str | None = None
) -> Pulled:
    """Download a circuit file and its sidecar, both or neither; return where they are and the commit.

    Files are kept only if they are a circuit file with the hashes that it states.

    Args:
        repo: `[datasets/]org/name[/path]`; without a path, the only circuit file in the repository.
        revision: a commit, or a branch or tag, whose present commit is returned. None is refused, and the error says
            which commit to give.
        out: the folder to write to.
        force: overwrite other files of the same names.
        endpoint: the address of the hub. None: HF_ENDPOINT, or the public one.

    Raises:
        InputError: if the repository, revision or file does not exist, or a file would be overwritten.
        FormatError: if a file is too large or does not have the hashes that it states.
        HubNotReached: if the hub cannot be reached.
    """
    place, folder = Place.parse(repo), Path(out)
    with asking(place.repo, place.kind, revision or "main"):
        api = _api(endpoint)
        commit, names = _index(api, place, revision or "main")
        place = _file_of(place, names)
    if not COMMIT.fullmatch(commit) or (revision and COMMIT.fullmatch(revision) and commit != revision):
        raise InputError(f"The hub answered {commit[:60]!r} when asked for {revision or 'main'!r} of {place}.")
    if not revision:
        raise InputError(
            f"Give a --revision of {place}, because a branch can change but a commit cannot. `main` is now {commit}: "
            f"discover-circuit pull {place} --revision {commit}"
        )
    name = PurePosixPath(place.path).name
    target = folder / name
    sidecar_name(target)
    with tempfile.TemporaryDirectory(prefix="mechinterp-pull-") as temporary:
        kept = Path(temporary) / name
        with asking(place.repo, place.kind, revision):
            content = _download(api, place, place.path, commit, MAX_JSON_BYTES)
        kept.write_bytes(content)
        with _errors_about(place, temporary):
            opened = open_circuit_file(kept)
            check_hashes(opened)
        stated, pair = opened.document.integrity.sidecar, None
        if stated is not None:
            beside = str(PurePosixPath(place.path).with_name(stated.file))
            with asking(place.repo, place.kind, revision):
                pair = (stated.file, _download(api, place, beside, commit, MAX_SIDECAR_BYTES))
            kept.with_name(stated.file).write_bytes(pair[1])
        with _errors_about(place, temporary):
            circuit_of(opened)
    wanted = {target: content} | ({folder / pair[0]: pair[1]} if pair else {})
    new = {path: data for path, data in wanted.items() if not _same(path, data)}
    taken = [str(path) for path in new if exists(path) or path.is_symlink()]
    if taken and not force:
        raise InputError(f"{' and '.join(taken)} would be overwritten; give another --out, or --force.")
    if new:
        place_pair(target, content, pair)
    return Pulled(place, commit, tuple(wanted), bool(new))


def check_path(path: str) -> None:
    """Return None for a path inside a repository. Raises InputError for a path that could lead out of it."""
    parts = path.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or not path.isprintable() or not set(path).isdisjoint("\\:"):
        raise InputError(f"{clip(path, 200)!r} is not the path of a file in a repository.")


def _api(endpoint: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint)


def _file_of(place: Place, names: Sequence[str]) -> Place:
    """The place of the circuit file that was asked for: the named one, or the only one in the repository."""
    known = [name for name in names if name.endswith(SUFFIX)]
    for name in (place.path, place.path + SUFFIX):
        if name in known:
            return Place(place.repo, place.kind, name)
    if place.path:
        raise unknown(f"circuit file of {place.repo}", place.path, known[:SHOWN])
    if len(known) != 1:
        some = ", ".join(clip(name, 60) for name in sorted(known)[:SHOWN]) + (", ..." if len(known) > SHOWN else "")
        raise InputError(f"{place} has {len(known)} circuit files; name one: {place}/NAME. Known: {some or 'none'}.")
    check_path(known[0])
    return Place(place.repo, place.kind, known[0])


def _index(api: Any, place: Place, revision: str) -> tuple[str, list[str]]:
    """(The commit, the names of all its files) of a repository at a revision."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(place.repo)
    url = f"{api.endpoint}/api/{place.kind}s/{place.repo}/revision/{quote(revision, safe='')}"
    content = _read("GET", url, MAX_INDEX_BYTES, f"the index of {place.repo}")
    found = _json(content)
    return str(found["sha"]), [str(entry["rfilename"]) for entry in found.get("siblings") or ()]


def _sizes(api: Any, place: Place, names: Sequence[str], commit: str) -> dict[str, int]:
    """The sizes in bytes, as the hub states them, of those files that exist."""
    url = f"{api.endpoint}/api/{place.kind}s/{place.repo}/paths-info/{quote(commit, safe='')}"
    request = {"paths": list(names), "expand": False}
    found = _json(_read("POST", url, MAX_INDEX_BYTES, f"the sizes of {place.repo}", data=request))
    return {str(entry["path"]): int(entry["size"]) for entry in found if entry.get("type") == "file"}


def _json(content: bytes) -> Any:
    """The parsed answer. Raises ValueError, which `asking` converts, if it is not valid JSON."""
    try:
        return parse_json(content, "The answer")
    except FormatError as error:
        raise ValueError(str(error)) from error


def _download(api: Any, place: Place, path: str, commit: str, most: int) -> bytes:
    """The bytes of one file at a commit; at most `most` bytes are read, whatever size the hub states."""
    from huggingface_hub import hf_hub_url

    size = _sizes(api, place, [path], commit).get(path)
    if size is None:
        raise InputError(f"{place.repo} has no file {path!r} at commit {commit}.")
    if size > most:
        raise FormatError(f"{path} of {place.repo} has {size:,} bytes; at most {most:,} are allowed.")
    url = hf_hub_url(place.repo, path, repo_type=place.kind, revision=commit, endpoint=api.endpoint)
    wrong = f"{path} of {place.repo} does not have the {size:,} bytes that the hub states; nothing was kept."
    content = _read("GET", url, size, f"{path} of {place.repo}", wrong)
    if len(content) != size:
        raise FormatError(wrong)
    return content


def _read(method: Literal["GET", "POST"], url: str, most: int, what: str, wrong: str = "", **sent: Any) -> bytes:
    """The answer of the hub: at most `most` bytes, within `SECONDS_IN_ALL`."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    content, end = bytearray(), time.monotonic() + SECONDS_IN_ALL
    with http_stream_backoff(
        method, url, headers=build_hf_headers(), timeout=SECONDS, max_retries=2, retry_on_exceptions=(), **sent
    ) as response:
        hf_raise_for_status(response)
        for block in response.iter_bytes():
            content += block
            if len(content) > most:
                raise FormatError(wrong or f"{what} has more than the {most:,} bytes allowed.")
            if time.monotonic() > end:
                raise HubNotReached(f"The hub took more than {SECONDS_IN_ALL} seconds for {what}; try again later.")
    return bytes(content)


def _same(path: Path, data: bytes) -> bool:
    """Whether a plain file at `path` holds these bytes."""
    if path.is_symlink() or not is_file(path) or path.stat().st_size != len(data):
        return False
    return path.read_bytes() == data


@contextmanager
def _errors_about(place: Place, folder: str) -> Iterator[None]:
    """Name the place on the hub, not the temporary folder, in errors about a file."""
    try:
        yield
    except FormatError as error:
        message = str(error).replace(f"{folder}/", "").replace(f"{folder}\\", "")
        raise FormatError(f"{place}: {message} Nothing was kept.") from error
