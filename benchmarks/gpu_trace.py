"""What a profiled step spent its time on: the top kernels, the GPU's busy share, the host's waits.

    packhorse train RECIPE run.profile_steps=[10,10]
    python benchmarks/gpu_trace.py RUN_FOLDER/profile

Reads the newest trace of torch.profiler there. Without a GPU in it, operations on the CPU take the
place of kernels.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from common import table

TOP = 12
# what makes the host wait for the GPU; a copy to the host waits by itself
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


def main() -> None:
    print(newest(Path(sys.argv[1])))


def newest(folder: Path) -> str:
    """Return what the newest trace in a folder tells."""
    traces = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not traces:
        return f"{folder} has no trace; set run.profile_steps"
    return report(json.loads(traces[-1].read_text(encoding="utf-8"))["traceEvents"])


def report(events: list[dict[str, Any]]) -> str:
    timed = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in timed if event.get("cat") == "kernel"]
    work = kernels or [event for event in timed if event.get("cat") == "cpu_op"]
    if not work:
        return "the trace has neither kernels nor operations"
    ms: Counter[str] = Counter()
    calls = Counter(event["name"] for event in work)
    for event in work:
        ms[event["name"]] += event["dur"] / 1000
    span_ms = (max(map(end, work)) - min(event["ts"] for event in work)) / 1000
    busy_ms = covered(work) / 1000
    waits = {name: sum(name in event["name"] for event in timed) for name in WAITS}
    rows = [
        [name[:80], str(calls[name]), f"{total:.2f}", f"{100 * total / span_ms:.1f}%"]
        for name, total in ms.most_common(TOP)
    ]
    lines = [
        f"{span_ms:.1f} ms, of which {'kernels' if kernels else 'operations'} run "
        f"{100 * busy_ms / span_ms:.1f}%",
        "waits of the host: " + ", ".join(f"{name} {count}" for name, count in waits.items()),
        table(["", "calls", "ms", "of the span"], rows),
    ]
    return "\n\n".join(lines)


def end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def covered(events: list[dict[str, Any]]) -> float:
    """Return the time in which at least one event runs: streams and nested calls overlap."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        total += max(0.0, end(event) - max(event["ts"], until))
        until = max(until, end(event))
    return total


if __name__ == "__main__":
    main()
