"""Run a program that nobody has read: in a process of its own, with limits on time and memory.

The process is Python in isolated mode with an empty environment and an empty folder. It gets no
more than its share of processor time, wall time, memory, open files and output, writes no file
beyond a small size, starts no other process (unless it is root's), and where the kernel lets it
(Linux) it has no network. This keeps mistakes and endless loops in; it is no wall against an
attacker, for whom a virtual machine is the tool.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from isthmus.errors import InvalidInputError, UnsupportedModelError

_LIMITS = """
import ctypes, os, resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
try:  # a network of its own: not even the loopback device is up
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(0x10000000 | 0x40000000)
except (OSError, AttributeError):
    pass
for kind, limit in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NPROC, 0),
):
    try:
        resource.setrlimit(kind, (limit, limit))
    except (ValueError, OSError):
        pass
source = sys.stdin.buffer.read().decode()
sys.stdin = open(os.devnull)
exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        ok: Whether it ended by itself with exit code 0.
        output: What it printed, cut at the limit.
        reason: Why not ok: ``"timeout"``, ``"output"``, or the last line of its error.
    """

    ok: bool
    output: str
    reason: str = ""


def run_python(
    source: str, *, cpu_s: int = 2, wall_s: float = 5.0, memory_mb: int = 512, output: int = 65536
) -> Outcome:
    r"""Run Python source under limits.

    Args:
        source: The program.
        cpu_s: Seconds of processor time, whole.
        wall_s: Seconds on the clock.
        memory_mb: Address space in MiB.
        output: Characters of output that are kept; more is a failure.

    Raises:
        InvalidInputError: A limit is not positive.
        UnsupportedModelError: There are no such limits on this platform.

    Example:
        >>> run_python("print(6 * 7)").output
        '42\n'
    """
    if min(cpu_s, wall_s, memory_mb, output) <= 0:
        raise InvalidInputError("limits of a sandbox must be positive")
    if os.name != "posix":
        raise UnsupportedModelError("programs can only be run under limits on Linux and macOS")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LIMITS, str(cpu_s), str(memory_mb << 20)],
            stdin=subprocess.PIPE,
            stdout=told,  # a file: its size is limited, a pipe would have to be drained
            stderr=subprocess.PIPE,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(source.encode("utf-8", "replace"), timeout=wall_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome(False, "", "timeout")
        told.seek(0)
        text = told.read(4 * output + 1).decode("utf-8", "replace")
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome(False, text[:output], "timeout")
    if len(text) > output or process.returncode == -signal.SIGXFSZ:
        return Outcome(False, text[:output], "output")
    if process.returncode:
        lines = errors.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        return Outcome(False, text, lines[-1])
    return Outcome(True, text)
