"""`python -m benchmarks [PART ...] [--device cpu|cuda] [--threads N] [--repeats N]`: prints tables as Markdown."""

from __future__ import annotations

import argparse
import importlib
import platform
from collections.abc import Callable

import torch

from benchmarks.engines import BATCH, LENGTH, Row

PARTS = {
    "engines": ("engines", "engines"),
    "smollm2": ("engines", "engines_smollm2"),
    "patching": ("patching", "patching"),
    "paths": ("paths", "paths"),
    "attribution": ("attribution", "attribution"),
    "lens": ("lens", "lens"),
    "direct": ("attribution_direct", "direct"),
    "decomposition": ("decomposition", "decomposition"),
    "acdc": ("acdc", "acdc"),
    "information-flow": ("information_flow", "information_flow"),
    "neurons": ("neurons", "neurons"),
    "features": ("features", "features"),
    "directions": ("directions", "directions"),
}
"""For each part, its module and the function that measures it."""


def main() -> None:
    """Prints one Markdown table per device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: the CPU, then CUDA if any")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if wrong := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(wrong)[0]!r}; known: {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for name in [arguments.device] if arguments.device else found:
        device = torch.device(name)
        cpu = f"CPU ({platform.machine()}, {arguments.threads} thread)"
        label = torch.cuda.get_device_name() if name == "cuda" else cpu
        shape = f"GPT-2-small shape unless stated, random weights, batch {BATCH} x {LENGTH}, float32"
        print(f"\n{shape}, {label}, torch {torch.__version__}\n")
        print("| task | measured | floor | target |\n|---|---|---|---|")
        for part in arguments.parts or PARTS:
            for row in rows_of(part)(device, arguments.repeats):
                print(
                    f"| {row.name} | {row.value:.2f} {row.unit} {row.note} | {row.floor} | {row.target} |", flush=True
                )


def rows_of(part: str) -> Callable[[torch.device, int], list[Row]]:
    """The function that measures a part."""
    module, function = PARTS[part]
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)


if __name__ == "__main__":
    main()
