"""`python -m benchmarks [--device cpu|cuda] [--threads N] [--repeats N]`: prints the table as Markdown."""

from __future__ import annotations

import argparse
import platform

import torch

from benchmarks.engines import BATCH, LENGTH, engines


def main() -> None:
    """Prints one Markdown table per device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: the CPU, then CUDA if any")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for name in [arguments.device] if arguments.device else found:
        device = torch.device(name)
        cpu = f"CPU ({platform.machine()}, {arguments.threads} thread)"
        label = torch.cuda.get_device_name() if name == "cuda" else cpu
        shape = f"GPT-2-small shape, random weights, batch {BATCH} x {LENGTH}, float32"
        print(f"\n{shape}, {label}, torch {torch.__version__}\n")
        print("| task | measured | floor | target |\n|---|---|---|---|")
        for row in engines(device, arguments.repeats):
            print(f"| {row.name} | {row.value:.2f} {row.unit} {row.note} | {row.floor} | {row.target} |")


if __name__ == "__main__":
    main()
