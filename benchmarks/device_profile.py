"""Kernels, copies and host syncs of EAP-IG, one circuit and a mask step, and where in the package the syncs are.

`python -m benchmarks.gpu profile` prints short tables.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device_timings import TINY_GPT2
from benchmarks.engines import small_gpt2, work_of

SYNCS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpyAsync",
    "cudaLaunchKernel",
    "Memcpy DtoH",
    "Memcpy HtoD",
    "Memcpy DtoD",
)
TOP = 10


def profiles(device: torch.device, tiny: bool) -> Iterator[str]:
    """One text for each job: counts, the top operations by device and CPU time, and the lines that sync."""
    bare, model, pairs = small_gpt2(device, 8, 20, **(TINY_GPT2 if tiny else {}))
    work = work_of(bare, model, pairs)
    for name in ("forward", "eap_ig", "circuit", "gates"):
        work[name]()  # the first run also compiles and allocates
        yield f"\n### {name}\n\n{table_of(work[name], device)}"
        if device.type == "cuda":
            lines = [f"| {n} | {where} |" for where, n in syncing_lines(work[name]).most_common(TOP)]
            yield "\n".join(["\n| syncs | line |", "|---|---|", *lines])


def table_of(run: Callable[[], object], device: torch.device) -> str:
    """What one run launches, by the profiler, as Markdown."""
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as trace:
        run()
        if cuda:
            torch.cuda.synchronize()
    events: list[Any] = list(trace.key_averages())
    kernels = [e for e in events if "cuda" in str(e.device_type).lower()]
    counts = {name: sum(e.count for e in events if e.key.startswith(name)) for name in SYNCS}
    text = ["| counted | |", "|---|---|", f"| kernels and copies on the device | {sum(e.count for e in kernels)} |"]
    text += [f"| {name} | {n} |" for name, n in counts.items() if n]
    device_time = sum(e.self_device_time_total for e in kernels) / 1e3
    text.append(f"| ms on the device, ms on the CPU | {device_time:.2f}, {_cpu(events):.2f} |")
    for what, chosen, of in (
        ("device", kernels, lambda e: e.self_device_time_total),
        ("CPU", events, lambda e: e.self_cpu_time_total),
    ):
        ordered = sorted(chosen, key=of, reverse=True)[:TOP]
        text += ["", f"| {what} ms | calls | operation |", "|---|---|---|"]
        text += [f"| {of(e) / 1e3:.2f} | {e.count} | {e.key[:90].replace('|', '/')} |" for e in ordered]
    return "\n".join(text)


def _cpu(events: list[Any]) -> float:
    return sum(e.self_cpu_time_total for e in events) / 1e3


def syncing_lines(run: Callable[[], object]) -> Counter[str]:
    """How often each line of Python makes the host wait for the device, by CUDA's own sync warnings."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    syncs = [one for one in said if "synchronizing" in str(one.message)]
    return Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in syncs)
