"""`python -m benchmarks.gpu [check|small|8b|profile ...] [--device cuda] [--budget SECONDS]`: all that needs a GPU.

check    every method, analysis and evaluation on tiny models: the device against the CPU, one line each
small    the GPT-2-small shape in float32: ms, ratios to the bare model, peak memory
8b       a random Llama-3.1-8B shape in bfloat16 (needs about 40 GB on the device)
profile  kernels, copies and host syncs of three jobs on the GPT-2-small shape

Every line is printed when it is known. A part that fails prints its traceback, and the next one goes on; nothing new
starts after the budget. `--tiny --device cpu` runs all of it in a minute or two on any machine, and `check --device
stand-in` finds tensors on the wrong device without a GPU (`stand_in_device.py`). `check --device cuda:1 --other cuda:0`
(or `--device stand-in --other cpu`) splits each model over two devices.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch

from benchmarks.device_check import compare
from benchmarks.device_profile import profiles
from benchmarks.device_timings import HEADER, Shape, llama_shapes, small_shapes, timings
from benchmarks.stand_in_device import DEVICE, StandIn


def main() -> int:
    """Runs the parts; 1 if a comparison fails or a part raises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="nothing new starts after this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--other", help="of `check`, a second device: the first half of each model is there")
    parser.add_argument("--only", default="", help="of `check`, the items whose name contains this")
    parser.add_argument("--all-lines", action="store_true", help="of `check`, print what is equal, too")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes instead of GPT-2 small and Llama-3.1-8B")
    arguments = parser.parse_args()
    if wrong := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(wrong)[0]!r}; known: {', '.join(PARTS)}")
    stand_in = StandIn() if arguments.device == "stand-in" else nullcontext()
    if arguments.device == "stand-in" and arguments.parts != ["check"]:
        parser.error("the stand-in computes on the CPU: give it the part `check` alone")
    arguments.device = DEVICE if arguments.device == "stand-in" else torch.device(arguments.device)
    arguments.end = time.monotonic() + arguments.budget
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; try --device cpu --tiny")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    _exact_float32()
    torch.set_num_threads(min(4, torch.get_num_threads()))  # the models that run on the CPU are tiny
    card = torch.cuda.get_device_name() if arguments.device.type == "cuda" else "CPU"
    say(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}, float32 without TF32")
    failed = False
    for name in arguments.parts or PARTS:
        say(f"\n## {name}\n")
        start = time.monotonic()
        try:
            with stand_in:
                failed |= not PARTS[name](arguments)
        except Exception:  # the next part shall run
            traceback.print_exc(file=sys.stdout)
            failed = True
        say(f"\n({name}: {time.monotonic() - start:.0f} s)")
        gc.collect()
        if arguments.device.type == "cuda":
            torch.cuda.empty_cache()
    return int(failed)


def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def say(text: object) -> None:
    """Prints at once, so that what was measured is kept when the time is over."""
    print(text, flush=True)


def check(arguments: argparse.Namespace) -> bool:
    """One line for each item that differs or fails, and a count; True if none does."""
    results = []
    other = None if arguments.other is None else torch.device(arguments.other)
    for result in compare(arguments.device, arguments.only, arguments.end - time.monotonic(), other):
        results.append(result)
        if arguments.all_lines or not result.ok:
            say(result)
    good = sum(result.ok for result in results)
    refused = sum(bool(result.refused) for result in results)
    slowest = sorted(results, key=lambda result: -result.seconds)[:5]
    say(f"{good} of {len(results)} agree with the CPU ({refused} of them refused on both)")
    say("slowest: " + "; ".join(f"{result.model}, {result.name}: {result.seconds:.1f} s" for result in slowest))
    if arguments.end < time.monotonic():
        say("The time was over before the last item.")
        return False
    return bool(results) and good == len(results)


def small(arguments: argparse.Namespace) -> bool:
    """The table of the GPT-2-small shape."""
    return _tables([*small_shapes(arguments.device, arguments.tiny)], arguments, analyses=True)


def llama_8b(arguments: argparse.Namespace) -> bool:
    """The table of the Llama-3.1-8B shape."""
    return _tables([*llama_shapes(arguments.device, arguments.tiny)], arguments, analyses=False)


def _tables(shapes: list[Shape], arguments: argparse.Namespace, *, analyses: bool) -> bool:
    good = True
    for what, build in shapes:
        bare, model, pairs = build()
        held = torch.cuda.memory_allocated() / 2**30 if arguments.device.type == "cuda" else float("nan")
        say(f"\n{what}; allocated before: {held:.1f} GiB (the bare model and ours)\n\n{HEADER}")
        rows = timings(bare, model, pairs, arguments.device, arguments.repeats, arguments.end, analyses=analyses)
        for row in rows:
            say(row)
            good &= not row.error
        del bare, model, pairs, rows
    return good


def profiled(arguments: argparse.Namespace) -> bool:
    """The tables of the profiler."""
    for text in profiles(arguments.device, arguments.tiny):
        say(text)
    return True


PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "check": check,
    "small": small,
    "8b": llama_8b,
    "profile": profiled,
}

if __name__ == "__main__":
    sys.exit(main())
