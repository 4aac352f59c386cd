"""Circuit files on the Hugging Face hub: `push_circuit` and `pull_circuit`, always with the commit.

Names and bytes from a repository are a stranger's: names are checked, sizes bounded before and while they are read, and
nothing is kept before the whole pair has proved to be a circuit file with the hashes that it states.

What goes wrong when the Hugging Face hub is asked, as this package's errors: one line, nothing secret.
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
from mechinterp.circuit_file.store import (
    MAX_JSON_BYTES,
    SUFFIX,
    check_hashes,
    open_circuit_file,
    parse_circuit_file,
    place_pair,
    read_sidecar,
    sidecar_name,
)

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


MAX_SIDECAR_BYTES = 8 * MAX_GRAPH_CELLS + 2**17
"""Of the largest graph that a file may describe, in float64, with its header."""
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 30
"""How long the hub may be silent."""
SECONDS_IN_ALL = 600
"""How long one answer may take."""
MAX_INDEX_BYTES = 16 * 2**20
"""Of the list of a repository's files: some 100,000 of them."""
SHOWN = 10
_REPO = re.compile(r"(?:(?P<kind>datasets|models)/)?(?P<id>[\w.-]{1,96}/[\w.-]{1,96})(?:/(?P<path>.+))?", re.ASCII)


@dataclass(frozen=True)
class Place:
    """A repository of the hub, and a file in it ("" for none): `org/name`, or `datasets/org/name` for a data set."""

    repo: str
    kind: str
    path: str

    @staticmethod
    def parse(text: str) -> Place:
        """The place written as `[datasets/]org/name[/path]`. Raises InputError for anything else."""
        found = _REPO.fullmatch(text)
        if found is None:
            raise InputError(f"{clip(text, 200)!r} is no repository of the hub; give org/name, or datasets/org/name.")
        path = found["path"] or ""
        if path:
            check_path(path)
        return Place(found["id"], "dataset" if found["kind"] == "datasets" else "model", path)

    def __str__(self) -> str:
        return ("datasets/" if self.kind == "dataset" else "") + "/".join(filter(None, (self.repo, self.path)))


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, and the commit that holds it: `place` and `commit` are what to pull.

    `new` is False when the repository had the same files already; `commit` is then its latest one.
    """

    place: Place
    commit: str
    files: tuple[str, ...]
    new: bool


@dataclass(frozen=True)
class Pulled:
    """The files that a pull left, the circuit file first; `new` says whether any was written."""

    place: Place
    commit: str
    files: tuple[Path, ...]
    new: bool


def push_circuit(
    file: str | Path, repo: str, *, revision: str = "main", message: str | None = None, endpoint: str | None = None
) -> Pushed:
    """Upload a circuit file and its sidecar to the top of a repository, in one commit on the branch `revision`.

    The file is validated first; afterwards the hub is asked whether the commit holds both files. The repository must
    exist. Credentials and endpoint are those of `huggingface_hub` (HF_TOKEN, HF_ENDPOINT).

    Raises FormatError for a file whose hashes do not hold, InputError for an unknown repository or branch and where
    writing is not allowed, HubNotReached when the hub cannot be asked.
    """
    path, place = Path(file), Place.parse(repo)
    if place.path:
        raise InputError(f"A file is pushed to the top of a repository; give {place.repo!r}, without {place.path!r}.")
    sidecar_name(path)
    contents = {path.name: read_bounded(path, MAX_JSON_BYTES)}
    opened = parse_circuit_file(contents[path.name], path)  # what is checked is what is uploaded
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
    """Download a circuit file and the sidecar that it states into the folder `out`, both or none.

    `repo` is `[datasets/]org/name[/path]`. Nothing is kept that is not a circuit file with the hashes that it states. A
    file that is there already stays unless it is the same or `force` is given. `revision` is a commit; of a branch or
    tag, the commit that it is now is taken and returned. None is refused, with the commit to give.

    Raises InputError for what the hub does not have and for files that would be overwritten, FormatError for a file
    that is too large or not what it states, HubNotReached when the hub cannot be asked.
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
            f"Say which --revision of {place}: a commit is what can be had again. `main` is now {commit}: "
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
        with _told_as(place, temporary):
            opened = open_circuit_file(kept)
            check_hashes(opened)
        stated, pair = opened.document.integrity.sidecar, None
        if stated is not None:
            beside = str(PurePosixPath(place.path).with_name(stated.file))
            with asking(place.repo, place.kind, revision):
                pair = (stated.file, _download(api, place, beside, commit, MAX_SIDECAR_BYTES))
            kept.with_name(stated.file).write_bytes(pair[1])
        with _told_as(place, temporary):
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
    """Return None for the path of a file inside a repository. Raises InputError for one that could lead elsewhere."""
    parts = path.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or not path.isprintable() or not set(path).isdisjoint("\\:"):
        raise InputError(f"{clip(path, 200)!r} is no path of a file in a repository.")


def _api(endpoint: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint)


def _file_of(place: Place, names: Sequence[str]) -> Place:
    """The place of a circuit file that the repository has: the one that is named, or its only one."""
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
    """The sizes in bytes that the hub states, of those of the files that are there."""
    url = f"{api.endpoint}/api/{place.kind}s/{place.repo}/paths-info/{quote(commit, safe='')}"
    asked = {"paths": list(names), "expand": False}
    found = _json(_read("POST", url, MAX_INDEX_BYTES, f"the sizes of {place.repo}", data=asked))
    return {str(entry["path"]): int(entry["size"]) for entry in found if entry.get("type") == "file"}


def _json(content: bytes) -> Any:
    """The value; ValueError, which `asking` tells, for what no hub answers."""
    try:
        return parse_json(content, "The answer")
    except FormatError as error:
        raise ValueError(str(error)) from error


def _download(api: Any, place: Place, path: str, commit: str, most: int) -> bytes:
    """The bytes of one file at a commit; never more than `most` are read, whatever the hub says its size is."""
    from huggingface_hub import hf_hub_url

    size = _sizes(api, place, [path], commit).get(path)
    if size is None:
        raise InputError(f"{place.repo} has no file {path!r} at commit {commit}.")
    if size > most:
        raise FormatError(f"{path} of {place.repo} has {size:,} bytes; it can have {most:,} at most.")
    url = hf_hub_url(place.repo, path, repo_type=place.kind, revision=commit, endpoint=api.endpoint)
    wrong = f"{path} of {place.repo} is not the {size:,} bytes that the hub states; nothing was kept."
    content = _read("GET", url, size, f"{path} of {place.repo}", wrong)
    if len(content) != size:
        raise FormatError(wrong)
    return content


def _read(method: Literal["GET", "POST"], url: str, most: int, what: str, wrong: str = "", **sent: Any) -> bytes:
    """What the hub answers, at most so many bytes, within `SECONDS_IN_ALL`, however slowly they come."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    content, end = bytearray(), time.monotonic() + SECONDS_IN_ALL
    with http_stream_backoff(
        method, url, headers=build_hf_headers(), timeout=SECONDS, max_retries=2, retry_on_exceptions=(), **sent
    ) as response:
        hf_raise_for_status(response)
        for block in response.iter_bytes():
            content += block
            if len(content) > most:
                raise FormatError(wrong or f"{what} has more than the {most:,} bytes that it can have.")
            if time.monotonic() > end:
                raise HubNotReached(f"The hub takes more than {SECONDS_IN_ALL} seconds for {what}; try again later.")
    return bytes(content)


def _same(path: Path, data: bytes) -> bool:
    """Whether a plain file at `path` holds these bytes."""
    if path.is_symlink() or not is_file(path) or path.stat().st_size != len(data):
        return False
    return path.read_bytes() == data


@contextmanager
def _told_as(place: Place, folder: str) -> Iterator[None]:
    """Name the place instead of the temporary folder in what is wrong with a file."""
    try:
        yield
    except FormatError as error:
        told = str(error).replace(f"{folder}/", "").replace(f"{folder}\\", "")
        raise FormatError(f"{place}: {told} Nothing was kept.") from error
