"""The files that `run` and `compare` write beside their result; checked before anything slow begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mechinterp.base.atomic_write import write_whole
from mechinterp.base.errors import MechInterpError
from mechinterp.base.plain_files import is_file, read_bounded
from mechinterp.circuit_file.store import SUFFIX
from mechinterp.cli.config import config_text
from mechinterp.cli.overwriting import check_new, check_replaced, check_text
from mechinterp.run_spec import RunSpec, command_of, compare_command, comparison_path, declared, output_path, resolved
from mechinterp.tasks.schema import MAX_BYTES, parse_yaml
from mechinterp.views.report.shown_paths import shown_command


@dataclass(frozen=True)
class ConfigFile:
    """A file that repeats a command, and its text."""

    config: Path
    text: str

    def check(self, force: bool) -> None:
        """Return None if the file is not there, or says the same. Raises InputError otherwise."""
        if not self._says_the_same():
            check_new(self.config, force)

    def write_config(self) -> None:
        """Return None once the file is there. One that says the same stays as it is, with the comments in it."""
        if not self._says_the_same():
            write_whole(self.config, self.text.encode("utf-8"))

    def _says_the_same(self) -> bool:
        if not is_file(self.config):
            return False
        try:
            found = parse_yaml(read_bounded(self.config, MAX_BYTES), str(self.config))
        except MechInterpError:
            return False
        return found == parse_yaml(self.text.encode("utf-8"), str(self.config))


@dataclass(frozen=True)
class RunFiles(ConfigFile):
    """The page of a run, and the file that repeats it; `replaced`: the same command has written them before."""

    report: Path
    replaced: bool

    @classmethod
    def of(cls, spec: RunSpec, force: bool) -> RunFiles:
        """The files of a run. Raises InputError if another command has written files of these names."""
        spec = resolved(spec)
        path, command = output_path(spec), command_of(spec)
        replaced = check_replaced(path, command, force)
        report, config = (path.with_name(path.name.replace(SUFFIX, end)) for end in (".report.html", ".run.yaml"))
        text = config_text("run", config, {name: getattr(spec, name) for name in declared()}, command)
        made = cls(config, text, report, replaced)
        made.check(force)
        return made


@dataclass(frozen=True)
class ComparisonFiles(ConfigFile):
    """The file that repeats a comparison."""

    @classmethod
    def of(
        cls, spec: RunSpec, methods: Sequence[str], sizes: str, given: Mapping[str, Any], force: bool
    ) -> ComparisonFiles:
        """The files of a comparison. Raises InputError if another command has written files of these names.

        Args:
            spec: The comparison.
            methods: Names of the methods.
            sizes: As on the command line.
            given: The options of the command.
            force: Whether files of others may be replaced.
        """
        page, command = comparison_path(spec), compare_command(spec, methods, sizes)
        check_text(page, escape(shown_command(command)), force)
        config = page.with_name(page.name.replace(".html", ".compare.yaml"))
        values = {**given, "methods": ",".join(methods), "sizes": sizes}
        made = cls(config, config_text("compare", config, values, command))
        made.check(force)
        return made
