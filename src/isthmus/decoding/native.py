"""The kernel of :mod:`isthmus.decoding.fast`: ``native.c``, compiled for this machine on first use.

The library is kept in the user's cache folder, one for each source, compiler and processor. A
machine without a C compiler has none, and everything works without it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.decoding.program import LOGITS, NORMED, PANEL, SPREADS, Op, Program
from isthmus.errors import UnsupportedModelError
from isthmus.folders import kept

SOURCE = Path(__file__).with_suffix(".c")

FLOAT = torch.float32
"""Always named: the default dtype belongs to the whole process, and a model that is being loaded in
another thread changes it for that time."""

TRUST = 16
"""Screenings that may leave too much to sum before no more are tried."""

SHARE = 128
"""A screening leaves too much when it leaves more than one in so many sums."""

PARTS = (1, 2, 4)
"""Weights in 32 bits, by dtype."""


class Store(ctypes.Structure):
    """Keys and values, in the layout of ``native.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("capacity", "layer_stride", "used")),
        *((name, ctypes.c_void_p) for name in ("live", "lengths")),
    )


class Call(ctypes.Structure):
    """Arguments of one forward, in the layout of ``native.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "nodes")),
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "ancestors")),
        ("ancestor_stride", ctypes.c_int64),
        ("stores", Store * 2),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "rotary_dim")),
        ("threads", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "buckets")),
        *((name, ctypes.c_int64) for name in ("span", "reach")),
        ("buffers", ctypes.c_void_p * 8),
        *((name, ctypes.c_void_p) for name in ("taps", "tapped", "scratch")),
        ("scratch_size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("pieces", "dealt")),
    )


BOUNDS = ("weights", "starts", "steps", "errors", "norms", "slack", "bias")


class Bounds(ctypes.Structure):
    """A program's screen and room to work with it, in the layout of ``native.c``."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in (*BOUNDS, "codes", "nodes", "lows", "upper", "peaks")
    )


@dataclass(frozen=True)
class Stored:
    """Keys and values that nodes see besides each other.

    Attributes:
        keys: Of all layers [L, B, H_kv, capacity, D], float32.
        values: Likewise.
        used: Slots in use in every row.
        lengths: Slots of each row that are seen, int64 [B].
        live: These slots in the order of their positions, int32 [B, used], or None when they are
            the first ones of every row.
    """

    keys: torch.Tensor
    values: torch.Tensor
    used: int
    lengths: torch.Tensor
    live: torch.Tensor | None = None


@functools.cache
def library() -> Any:
    """The compiled kernel.

    Raises:
        UnsupportedModelError: There is no compiler, or it cannot compile the kernel.
    """
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or shutil.which("gcc")
    compiler = compiler or shutil.which("clang")
    if compiler is None:
        raise UnsupportedModelError("there is no C compiler; install gcc or clang")
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = ["-O3", tune, "-ffp-contract=off", "-fPIC", "-shared"]
    version = _output([compiler, "--version"])
    with kept("native", "decoder", [SOURCE.read_text(), version, flags, _processor()]) as place:
        path = place.with_suffix(".so")
        if not path.exists():
            part = path.with_suffix(".part")
            command = [compiler, *flags, str(SOURCE), "-o", str(part), "-lm"]
            if _output([*command, "-fopenmp"], check=False) is None:
                _output(command)  # one thread, where the compiler has no OpenMP
            part.replace(path)
    found = ctypes.CDLL(str(path))
    made = (Op, Call, Bounds)
    sizes = [getattr(found, f"isthmus_{name}_size")() for name in ("op", "call", "screen")]
    if sizes != [ctypes.sizeof(each) for each in made] or found.isthmus_panel() != PANEL:
        raise UnsupportedModelError("the compiled kernel has another layout than its caller")
    found.isthmus_forward.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    found.isthmus_forward.restype = None
    found.isthmus_scratch.argtypes = [ctypes.c_int64] * 4
    found.isthmus_scratch.restype = ctypes.c_int64
    found.isthmus_choose.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_void_p]
    found.isthmus_choose.restype = ctypes.c_int64
    return found


def _output(command: list[str], *, check: bool = True) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedModelError(f"the C compiler {command[0]!r} does not run") from error
    if done.returncode == 0:
        return done.stdout
    if not check:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
    raise UnsupportedModelError(f"the C compiler {command[0]!r} failed: {lines[0].strip()}")


def _processor() -> list[str]:
    """What ``native`` means here: the name of the processor and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU part")
    return sorted({line for line in lines if line.startswith(wanted)})


class Kernel:
    """Runs a program; owns the buffers between its operations.

    Args:
        program: What to run.

    Raises:
        UnsupportedModelError: No kernel here, or widths that it cannot take.
    """

    def __init__(self, program: Program) -> None:
        self.library, self.program = library(), program
        lanes = self.library.isthmus_lanes()
        narrow = {op.in_width % (lanes * PARTS[op.dtype]) for op in program.ops} | {
            program.head_dim % lanes
        }
        if narrow != {0}:
            raise UnsupportedModelError(f"its widths are not multiples of {lanes} values")
        self.ops = (Op * len(program.ops))(*program.ops)
        self.pieces = torch.zeros(len(program.ops), 16, dtype=torch.int32)
        self.widest = max(op.in_width for op in program.ops)
        self.rows = self.slots = 0
        self.lock = threading.Lock()  # the buffers are those of one forward
        self.call = Call()
        self.cosines = self.sines = self.spreads = torch.empty(0, dtype=FLOAT)
        self.buckets = torch.empty(0, dtype=torch.int32)
        self.reach = 0
        self.bounds = Bounds()
        self.room: dict[str, torch.Tensor] = {}
        self.trust = TRUST if self.library.isthmus_screens() else 0

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for ``rows`` nodes over all rows of a batch, each seeing ``slots`` keys."""
        call, program = self.call, self.program
        threads = torch.get_num_threads()
        if rows > self.rows or slots > self.slots or threads != call.threads:
            self.rows, self.slots = max(rows, self.rows), max(slots, self.slots)
            self.buffers = [torch.empty(self.rows, width, dtype=FLOAT) for width in program.widths]
            size = self.library.isthmus_scratch(
                self.rows, self.slots, self.widest, program.head_dim
            )
            self.scratch = torch.empty(threads, size, dtype=FLOAT)
            call.threads, call.scratch_size = threads, size
            call.scratch = self.scratch.data_ptr()
            self.dealt = torch.empty((self.rows + 1) * self.widest, dtype=FLOAT)
            call.dealt = self.dealt.data_ptr()
            call.heads, call.kv_heads = program.heads, program.kv_heads
            call.head_dim = program.head_dim
            call.pieces = self.pieces.data_ptr()
            for i, buffer in enumerate(self.buffers):
                call.buffers[i] = buffer.data_ptr()

    def place(self, positions: int) -> None:
        """Make room for what belongs to that many positions."""
        call, program = self.call, self.program
        if program.rotary is not None and positions > len(self.cosines):
            with torch.no_grad():
                places = torch.arange(max(512, positions * 3 // 2))[None]
                cosines, sines = program.rotary(torch.empty(1, 1, 1, dtype=FLOAT), places)
            self.cosines, self.sines = cosines[0].contiguous(), sines[0].contiguous()
            call.cosines, call.sines = self.cosines.data_ptr(), self.sines.data_ptr()
            call.rotary_dim = self.cosines.shape[1]
        if program.buckets is not None:
            if positions > self.reach:
                self.reach = max(64, positions * 3 // 2)
                distances = torch.arange(-self.reach, self.reach + 1)
                self.buckets = program.buckets(distances).to(torch.int32)
                self.spreads = torch.empty(program.heads, len(self.buckets), dtype=FLOAT)
            # the table is filled anew in each forward, as far as it is read
            call.reach = positions
            call.span = 2 * positions + 1 if program.whole else positions + 1
            call.buckets = self.buckets.data_ptr() + 4 * (self.reach - positions)
            call.buffers[SPREADS] = self.spreads.data_ptr()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [..., V] of states after the last norm [..., D]."""
        states = hidden.reshape(-1, hidden.shape[-1]).float().contiguous()
        out = torch.empty(len(states), self.program.vocab_size, dtype=FLOAT)
        source = self.ops[-1].source
        with self.lock:
            self.reserve(len(states), 0)
            self.call.batch, self.call.nodes = 1, len(states)
            self.call.buffers[source] = states.data_ptr()
            self.call.buffers[LOGITS] = out.data_ptr()
            self._run(len(self.ops) - 1, len(self.ops))
            self.call.buffers[source] = self.buffers[source].data_ptr()
        return out.reshape(*hidden.shape[:-1], -1)

    def store(self, states: torch.Tensor, stored: Stored) -> None:
        """Write keys and values of states [B, T, D] into a store, with the program for that."""
        states = states.float().contiguous()
        call = self.call
        with self.lock:
            self.reserve(states.shape[0] * states.shape[1], 0)
            call.batch, call.nodes = states.shape[:2]
            self._stand(0, stored)
            call.buffers[NORMED] = states.data_ptr()
            self._run(0, len(self.ops))
            call.buffers[NORMED] = self.buffers[NORMED].data_ptr()

    def _stand(self, index: int, stored: Stored) -> None:
        store = self.call.stores[index]
        store.keys, store.values = stored.keys.data_ptr(), stored.values.data_ptr()
        store.capacity, store.layer_stride = stored.keys.shape[3], stored.keys.stride(0)
        store.used, store.lengths = stored.used, stored.lengths.data_ptr()
        store.live = None if stored.live is None else stored.live.data_ptr()

    def _run(self, first: int, last: int) -> None:
        self.pieces.zero_()
        start = ctypes.addressof(self.ops) + first * ctypes.sizeof(Op)
        self.library.isthmus_forward(start, last - first, ctypes.addressof(self.call))

    def _choose(self, rows: int) -> torch.Tensor | None:
        """First of the largest logits of each node, int64 [rows], of states that are at hand.

        None where bounds leave too much to sum, or there are none.
        """
        screen, bounds, head = self.program.screen, self.bounds, self.ops[-1]
        if screen is None:
            self.trust = 0
            return None
        panels, width = screen.weights.shape[0] * PANEL, head.in_width
        sizes = {
            "codes": rows * width,
            "nodes": 3 * rows,
            "lows": self.call.threads * rows * 16,
            "upper": rows * panels,
            "peaks": rows * panels * 16 // PANEL,
        }
        for name, size in sizes.items():
            if name not in self.room or len(self.room[name]) < size:
                kind = torch.uint8 if name == "codes" else FLOAT
                self.room[name] = torch.empty(size, dtype=kind)
                setattr(bounds, name, self.room[name].data_ptr())
        if not bounds.weights:
            for name in BOUNDS:
                setattr(bounds, name, getattr(screen, name).data_ptr())
        chosen = torch.empty(rows, dtype=torch.int64)
        found = self.library.isthmus_choose(
            ctypes.addressof(self.ops) + (len(self.ops) - 1) * ctypes.sizeof(Op),
            ctypes.addressof(bounds),
            ctypes.addressof(self.call),
            rows * max(16, head.out_width // SHARE),
            chosen.data_ptr(),
        )
        self.trust = min(TRUST, self.trust + 1) if found else self.trust - 2
        return chosen if found else None

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        past: Stored,
        *,
        source: Stored | None = None,
        ancestors: torch.Tensor | None = None,
        tapped: tuple[int, ...] = (),
        logits: bool = True,
        choice: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Run the program on N nodes of B rows and write their keys and values.

        Args:
            tokens: int64 [B, N].
            positions: int64 [B, N].
            past: What is cached; the nodes are written behind it. An encoder writes its nodes
                into the first slots and sees those that are live.
            source: Keys and values of an encoder's output.
            ancestors: Nodes that each node sees, bool [1 or B, N, N]; None is a chain.
            tapped: States to return: layers 0 to L, and L + 1 for the state after the last norm.
            logits: Whether to compute logits.
            choice: Whether the first of the largest logits will do instead of them.

        Returns:
            Logits [B, N, V] float32, or with ``choice`` the place of the largest [B, N] int64 where
            it could be found without them, and tapped states [taps, B, N, D] float32; None where
            not wanted.
        """
        batch, nodes = tokens.shape
        with self.lock:
            call, program = self.call, self.program
            slots = past.used + nodes if source is None else max(past.used + nodes, source.used)
            self.reserve(batch * nodes, slots)
            self.place(int(positions.max()) + 1)
            tokens, positions = tokens.contiguous(), positions.contiguous()
            call.batch, call.nodes = batch, nodes
            call.tokens, call.positions = tokens.data_ptr(), positions.data_ptr()
            call.ancestors = call.taps = None
            if ancestors is not None:
                ancestors = ancestors.contiguous()
                call.ancestors = ancestors.data_ptr()
                call.ancestor_stride = nodes * nodes if len(ancestors) > 1 else 0
            self._stand(0, past)
            if source is not None:
                self._stand(1, source)
            states = out = None
            if tapped:
                places = torch.full((program.layers + 2,), -1, dtype=torch.int32)
                places[list(tapped)] = torch.arange(len(tapped), dtype=torch.int32)
                states = torch.empty(len(tapped), batch, nodes, program.hidden_size, dtype=FLOAT)
                call.taps, call.tapped = states.data_ptr(), places.data_ptr()
            done = 0
            if choice and self.trust > 0:
                done = len(self.ops) - 1
                self._run(0, done)
                chosen = self._choose(batch * nodes)
                if chosen is not None:
                    return chosen.view(batch, nodes), states
            if logits:
                out = torch.empty(batch, nodes, program.vocab_size, dtype=FLOAT)
                call.buffers[LOGITS] = out.data_ptr()
            self._run(done, len(self.ops) - (not logits and program.vocab_size > 0))
        return out, states
