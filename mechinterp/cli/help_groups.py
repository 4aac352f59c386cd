"""`--help` with options, and commands, in groups."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "Find": ("run", "merge", "compare", "direct", "graph"),
    "Check and look": ("list", "show", "view", "verify", "eval", "diff", "validate"),
    "Share": ("cite", "export", "import", "push", "pull"),
}
"""The groups of commands."""


class Command(TyperCommand):
    """A command whose options are shown in their groups (`rich_help_panel`), the others first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the groups of options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                group = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Options"
                groups.setdefault(group, []).append(record)
        order = sorted(groups, key=lambda group: ("Arguments", "Model", "Method").index(group) if group in FIRST else 9)
        for group in order:
            with formatter.section(group):
                formatter.write_dl(groups[group])


FIRST = ("Arguments", "Model", "Method")


class Commands(TyperGroup):
    """All commands, in their groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the name and the short help of every command."""
        width = formatter.width - 6 - max(map(len, self.list_commands(ctx)))
        named = {name for names in COMMANDS.values() for name in names}
        groups = {**COMMANDS, "Others": tuple(name for name in self.list_commands(ctx) if name not in named)}
        for group, names in groups.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            rows = [(name, one.get_short_help_str(width)) for name, one in found if one is not None and not one.hidden]
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)
