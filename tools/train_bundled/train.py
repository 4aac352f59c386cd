"""Train the bundled model: `python -m tools.train_bundled.train [--seed N] [--out DIRECTORY] [--minutes M]`."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mechinterp.models.load import BUNDLED
from tools.train_bundled.corpus import FIRST_MIXTURE, MIXTURE
from tools.train_bundled.exam import Grade
from tools.train_bundled.loop import Step, Trained, train
from tools.train_bundled.recipe import Recipe
from tools.train_bundled.store import save_model

log = logging.getLogger("tools.train_bundled.train")


def card(recipe: Recipe, trained: Trained) -> dict[str, Any]:
    """Return the content of card.json without the digests, which `save_model` adds."""
    return {
        "name": "mechinterp bundled model",
        "license": "MIT",
        "command": f"python -m tools.train_bundled.train --seed {recipe.seed}",
        "recipe": {field.name: _plain(getattr(recipe, field.name)) for field in fields(recipe)},
        "mixtures": {"first mixture": dict(FIRST_MIXTURE), "full mixture": dict(MIXTURE)},
        "parameters": trained.model.num_parameters(),
        "steps": trained.steps,
        "phases": dict(trained.phases),
        "reproducible": trained.reproducible,
        "torch": torch.__version__,
        "bos": "the tokenizer puts one <bos> in front of every text",
        "tasks": {name: asdict(grade) for name, grade in trained.grades.items()},
    }


def _plain(value: Any) -> Any:
    return dict(cast("Mapping[str, float]", value)) if isinstance(value, Mapping) else value


def report_grades(grades: Mapping[str, Grade]) -> None:
    """Log one line for each task."""
    for name, grade in grades.items():
        log.info(
            "%-24s accuracy %.3f  right over wrong %.3f  probability of a right answer %.3f  (%d held-out prompts)",
            name, grade.accuracy, grade.preference, grade.probability, grade.prompts,
        )  # fmt: skip


def train_with_bar(recipe: Recipe, max_minutes: float) -> Trained:
    """Return a trained model, showing a bar whose end is the most steps the run can take."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("at most"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns) as progress:
        bar = progress.add_task("first mixture", total=recipe.max_steps, note="")
        phase = "first mixture"

        def on_step(step: Step) -> None:
            nonlocal phase
            if step.phase == "cool-down" != phase:
                progress.update(bar, total=step.number + recipe.cooldown_steps)
            phase = step.phase
            progress.update(bar, completed=step.number, description=phase)
            if step.grades is not None:
                note = " ".join(f"{name[:9]} {grade.accuracy:.2f}" for name, grade in step.grades.items())
                progress.update(bar, note=f"loss {step.loss:.2f} {note}")
                log.info("step %d, %s, loss %.3f, %s", step.number, phase, step.loss, note)

        return train(recipe, max_minutes, on_step)


def main(arguments: list[str] | None = None) -> None:
    """Train, save, and log the accuracy on each task."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_bundled.train", description=__doc__)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--out", type=Path, default=BUNDLED, help="default: the bundled model itself")
    parser.add_argument("--minutes", type=float, default=60.0, help="start the cool-down no later than this")
    parser.add_argument("--max-steps", type=int, default=Recipe.max_steps)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(1)  # sums in another order give other weights
    recipe = Recipe(seed=given.seed, max_steps=given.max_steps)
    started = time.monotonic()
    trained = train_with_bar(recipe, given.minutes)
    digest = save_model(given.out, trained.model, trained.tokenizer, card(recipe, trained))
    report_grades(trained.grades)
    log.info(
        "%d steps in %.1f minutes; %s; sha256 %s", trained.steps, (time.monotonic() - started) / 60, given.out, digest
    )
    if not trained.reproducible:
        log.warning("The time limit started the cool-down, so another run can end with other weights.")
    missed = [name for name, target in recipe.targets.items() if trained.grades[name].accuracy < target]
    if missed:
        log.warning("Below target: %s.", ", ".join(missed))


if __name__ == "__main__":
    main()
