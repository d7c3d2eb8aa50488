"""One process at a time, measured: its wall seconds, peak memory and last line of JSON; medians; what this machine is.

Only the standard library, and small on purpose: a child's peak memory counts its parent's at the fork.
"""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Numbers = dict[str, float | str]
LEFT_OUT = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "HEADSTART_CACHE_DIR", "HEADSTART_CACHE_MAX_BYTES")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_OFFLINE": "1"}


class BenchError(Exception):
    """A measurement that could not be made, and why."""


@dataclass(frozen=True)
class Finished:
    """A process that ended well: wall seconds, peak resident bytes, stdout, and the JSON object on its last line."""

    seconds: float
    peak_bytes: int
    output: str
    said: Numbers

    def numbers(self) -> Numbers:
        """What it measured of itself, and what was measured of it."""
        return {**self.said, "seconds": self.seconds, "peak_bytes": float(self.peak_bytes)}


def run_child(command: Sequence[str | Path], *, limit: float, env: Mapping[str, str] | None = None) -> Finished:
    """Run a command to its end in a process group of its own, which is killed after `limit` seconds.

    Raises:
        BenchError: it failed or took too long; the message has the end of what it said.
    """
    words = [str(word) for word in command]
    variables = {name: value for name, value in os.environ.items() if name not in LEFT_OUT} | OFFLINE | dict(env or {})
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=variables, start_new_session=True
        )
        timer = threading.Timer(limit, os.killpg, (child.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.perf_counter() - began
        except BaseException:  # Ctrl-C, above all
            os.killpg(child.pid, signal.SIGKILL)
            os.wait4(child.pid, 0)
            raise
        finally:
            timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)  # so that subprocess does not wait for it again
        output.seek(0)
        errors.seek(0)
        said, complaints = (file.read().decode("utf-8", "replace") for file in (output, errors))
    if child.returncode:
        why = f"took over {limit:.0f} s" if seconds >= limit else f"ended with code {child.returncode}"
        raise BenchError(f"{' '.join(words)}\n{why}:\n{(said + complaints)[-3000:]}")
    return Finished(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), said, last_json(said))


def last_json(output: str) -> Numbers:
    """The JSON object on the last line; empty where there is none."""
    lines = output.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return {}
    found: Numbers = json.loads(lines[-1])
    return found


@dataclass
class Samples:
    """What was measured, by contender, a list entry a run."""

    of: dict[str, list[Numbers]] = field(default_factory=dict)

    def add(self, name: str, numbers: Numbers) -> None:
        """Keep one run's numbers."""
        self.of.setdefault(name, []).append(numbers)

    def median(self, name: str, number: str = "seconds") -> float:
        """The median of a number over a contender's runs."""
        return statistics.median(float(run[number]) for run in self.of[name])

    def summary(self) -> dict[str, dict[str, object]]:
        """Of each contender: runs, then each number's median, lowest and highest; words as the last run said them."""
        return {name: {"runs": len(runs), **_summary(runs)} for name, runs in self.of.items()}


def _summary(runs: Sequence[Numbers]) -> dict[str, object]:
    found: dict[str, object] = {}
    for number, last in runs[-1].items():
        if isinstance(last, str):
            found[number] = last
        else:
            values = [float(run[number]) for run in runs]
            found[number] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return found


Contender = tuple[str, int, Callable[[], object]]
"""A name, in how many rounds it runs, and what runs and records it."""


def alternate(contenders: Sequence[Contender]) -> None:
    """Run contenders in rounds, every other round backwards; one with fewer runs sits out the later rounds."""
    for number in range(max(runs for _, runs, _ in contenders)):
        for name, runs, measure in contenders if number % 2 == 0 else reversed(contenders):
            if number < runs:
                note(f"  {name}, run {number + 1} of {runs}")
                measure()


def note(message: str) -> None:
    """Progress, on stderr."""
    print(message, file=sys.stderr, flush=True)


def cpu_flags() -> set[str]:
    """What this CPU can do, as Linux names it; empty elsewhere."""
    return set(_cpu_line("flags").split())


def _cpu_line(field_name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field_name)), "")


def describe_machine(pythons: Mapping[str, Path]) -> dict[str, object]:
    """CPU, cores, memory, load and the library versions of each environment in `pythons`."""
    flags = cpu_flags()
    wanted = ("torch", "transformers", "sentence-transformers", "setfit", "onnxruntime", "openvino", "scikit-learn")
    code = (
        "import importlib.metadata as m, json\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{name: have[name] for name in {wanted!r} if name in have}}))"
    )
    return {
        "cpu": _cpu_line("model name") or platform.processor(),
        "vendor": _cpu_line("vendor_id"),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "amx_int8": "amx_int8" in flags,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: run_child([python, "-c", code], limit=60).said for name, python in pythons.items()},
    }
