"""How the relation loss is laid over a GPU: tile configurations, panels, tile tables, and launches kept ready per shape.

A ``Plan`` holds whatever a call needs that follows from shapes, precisions and options alone. It is made once for each
and kept, so that a warm call allocates, launches and nothing else: on a GPU, work below a millisecond is otherwise
bound by the host. ``FrameOrder`` does the same for the frames, by the identity and version of their tensor.

Shapes: B clips, N tokens, D student and E teacher features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from ldo.kernels import relation_finish, relation_pairs, relation_prepare
from ldo.kernels.support import EPS, HUBER, INTERPRET, Launch, architecture, written

PREPARE_REGISTERS = 96  # two blocks a multiprocessor; left alone, one of Triton 3.6's compilers aims at three and spills
GROUP = 8  # rows of squares that are walked together, so that their operands stay in L2
SCAN = 2048  # tokens that the class sums take at a time, at most


@dataclass(frozen=True)
class Config:
    """The pair kernel's tile for one kind of GPU; ``tests/kernels/test_relation_aot.py`` holds each to its limits."""

    rows: int
    cols: int
    depth: int
    slices: int  # of the epilogue: 1, 2 or 4
    warps: int
    stages: int
    use_tma: bool
    registers: int | None = None  # most a thread may have, for more blocks a multiprocessor; None: the compiler's choice
    truncation: float = 0.0  # the share of its accumulator that a matrix instruction of depth 16 loses; see ``gains``

    @property
    def square(self) -> int:
        """Side of the squares that are either above the diagonal, and mirrored, or on it, and computed whole."""
        return max(self.rows, self.cols)

    @property
    def skip(self) -> int:
        """Tokens of the blocks that are looked through for weights that are all 0."""
        return min(self.rows, self.cols)


HOPPER = 3.05e-8  # truncation, as measured on an H200 in bf16 (docs/kernels.md): about half a unit in fp32's last place

# By compute capability and whether operands are half precision. sm_86, 89 and 120 have less shared memory and take sm_80's.
CONFIGS = {
    (80, True): Config(128, 128, 32, 1, 8, 4, False),
    (80, False): Config(128, 64, 32, 1, 8, 3, False),
    (90, True): Config(128, 256, 64, 2, 8, 4, True, truncation=HOPPER),
    (90, False): Config(128, 128, 32, 2, 8, 3, True),
    (100, True): Config(128, 256, 64, 4, 8, 3, True),
    (100, False): Config(64, 64, 32, 1, 4, 3, True),
}
# Where A is written too, two blocks a multiprocessor: one multiplies while the other writes.
WITH_GRADIENT = CONFIGS | {(90, True): Config(128, 128, 64, 2, 8, 3, True, registers=128, truncation=HOPPER)}
ON_CPU = Config(32, 64, 32, 4, 4, 1, True)  # for the interpreter: several tiles at small N


def choose_config(device: torch.device, dtype: torch.dtype, gradient: bool) -> Config:
    """The configuration for a device: a fixed one, so that all ranks of a run take the same."""
    if device.type != "cuda":
        return ON_CPU
    return (WITH_GRADIENT if gradient else CONFIGS)[architecture(device), dtype != torch.float32]


def gains(config: Config, student: int, teacher: int) -> tuple[float, float]:
    """What ``inverse`` and ``ratio`` are multiplied with, so that truncation does not shrink differences of similarities.

    Tensor cores add into an fp32 accumulator and cut off what does not fit: each step of depth 16 moves it towards zero by
    ``truncation`` of its value, on average. Pairs near the margin then fall below it, and a hinge's gradient is wrong where
    they do. Of the teacher's part y, which grows over its own K_t steps and is then carried through the student's K_s,
    K_t / 2 + K_s steps are lost; of the student's s, K_s / 2. Both are given back: y when it is scaled, all at the end.
    """
    student_steps, teacher_steps = -(-student // 16), -(-teacher // 16)
    at_the_end = 1 + config.truncation * student_steps / 2
    between = 1 + config.truncation * (teacher_steps + student_steps) / 2
    return at_the_end**0.5, between**0.5  # each twice a pair


# ----------------------------------------------------------------------------------------------------------- frames


class FrameOrder(NamedTuple):
    """Tokens by frame, for the sums of W, and the frames themselves; all int32, on the tokens' device."""

    order: Tensor  # [N] tokens sorted by frame
    run_start: Tensor  # [N + 1] where in that order the frame of each begins; N at the end
    frame: Tensor  # [padded] frames in the tokens' own order, 0 past N


_frame_orders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def frame_order(frame_N: Tensor, padded: int) -> FrameOrder:
    """The order of ``frame_N``'s tokens. Nothing here waits for the GPU.

    It is kept while that very tensor lives and has not been written to (its version tells), so hand the same tensor over
    at every call. Inference tensors have no version, and tensors made in a CUDA graph's memory may be overwritten by its
    replays: for those it is made anew.
    """
    keep = not (frame_N.is_inference() or (frame_N.is_cuda and torch.cuda.is_current_stream_capturing()))
    known = _frame_orders.get(frame_N)
    if known is not None and known[0] == (frame_N._version, padded):
        return known[1]
    frame, n = frame_N.int(), len(frame_N)
    ordered, order = frame.sort(stable=True)
    places = torch.arange(n, dtype=torch.int32, device=frame.device)
    run_start = torch.full((n + 1,), n, dtype=torch.int32, device=frame.device)
    run_start[0] = 0
    run_start[1:n] = torch.where(ordered[1:] != ordered[:-1], places[1:], 0).cummax(0).values
    made = FrameOrder(order.int(), run_start, F.pad(frame, (0, padded - n)))
    if keep:
        _frame_orders[frame_N] = (frame_N._version, padded), made
    return made


# ----------------------------------------------------------------------------------------------------------- panels


def panels(clips: int, n: int, elements: int, step: int) -> tuple[list[tuple[int, int]], int]:
    """Row panels [(first, end)] whose part of A is at most ``elements``, and how many clips go into one launch.

    A panel starts at a multiple of ``step`` and has at least ``step`` rows, whatever it takes.
    """
    if n * aligned(n) <= elements:
        return [(0, n)], min(clips, elements // (n * aligned(n)))
    found, start = [], 0
    while start < n:
        rows = max(elements // aligned(n - start) // step, 1) * step
        found.append((start, min(start + rows, n)))
        start += rows
    return found, 1


@lru_cache(maxsize=64)
def tile_table(n: int, p0: int, p1: int, rows: int, cols: int, device: torch.device) -> Tensor:
    """First row and column of every tile of a panel [tiles, 2], int32: squares on or above the diagonal, grouped for L2."""
    side = max(rows, cols)
    low, high, last = p0 // side, -(-p1 // side), -(-n // side)
    tiles = []
    for group in range(low, high, GROUP):
        for c in range(group, last):
            for r in range(group, min(group + GROUP, high, c + 1)):
                row_range = range(r * side, min((r + 1) * side, n), rows)
                tiles += [(row, col) for row in row_range for col in range(c * side, min((c + 1) * side, n), cols)]
    return torch.tensor(tiles, dtype=torch.int32).to(device)


def aligned(columns: int) -> int:
    """Row lengths of A: descriptors and cuBLAS want multiples of 16 bytes."""
    return -(-columns // 64) * 64


# ------------------------------------------------------------------------------------------------------------ plans


class Key(NamedTuple):
    """All that a plan depends on."""

    clips: int
    tokens: int
    student: int  # features
    teacher: int
    dtype: torch.dtype
    device: torch.device
    framed: bool
    weight: torch.dtype | None
    margin: float
    penalty: str
    spatial: float
    temporal: float
    gradient: bool
    workspace: int  # bytes
    precision: str  # of fp32 products: "tf32" or "tf32x3"


class Panel(NamedTuple):
    """Rows ``first`` to ``end`` of A for some clips; ``launch`` is the pair kernel's on their tiles."""

    clips: slice
    first: int
    end: int
    tiles: Tensor
    launch: Launch
    fixed: tuple[Any, ...]  # arguments from partial_stride to the last one


class Plan:
    """Launches and sizes for one ``Key``; ``plan`` keeps the latest ones."""

    def __init__(self, key: Key):
        self.key = key
        self.config = config = choose_config(key.device, key.dtype, key.gradient)
        b, n = key.clips, key.tokens
        self.padded = -(-n // config.square) * config.square
        self.blocks = self.padded // config.skip
        self.unit = key.gradient and key.dtype == torch.float16
        self.skips = (key.weight is not None) and config.use_tma  # elsewhere the registers that it takes spill
        rows, clips = [(0, n)], b
        if key.gradient:
            rows, clips = panels(b, n, key.workspace // key.dtype.itemsize, config.square)
        tables = [tile_table(n, p0, p1, config.rows, config.cols, key.device) for p0, p1 in rows]
        self.tiles = sum(map(len, tables))
        self.space = clips * max((p1 - p0) * aligned(n - p0) for p0, p1 in rows) if key.gradient else 0
        self.panels = []
        for clip in range(0, b, clips):
            done = 0
            for (p0, p1), table in zip(rows, tables, strict=True):
                self.panels.append(self._panel(slice(clip, min(clip + clips, b)), p0, p1, table, done))
                done += len(table)
        self.scratch = self._scratch()
        self._prepare()
        self._finish()
        self.descriptors: dict[tuple, dict[str, Any]] = {}

    def _scratch(self) -> list[int]:
        """Sizes of the fp32 scratch: inverse, ratio, weight, factor, scale, partial sums, observed blocks (as int32)."""
        b, key = self.key.clips, self.key
        weight = b * self.padded if (key.weight is not None) else 0
        # each begins at a multiple of 16 bytes, as the kernels were promised
        sizes = (b * self.padded, b * self.padded, weight, 2 * b, b, b * self.tiles, b * self.blocks if self.skips else 0)
        return [-(-size // 4) * 4 for size in sizes]

    def _prepare(self) -> None:
        key = self.key
        tokens = 32 if INTERPRET else 16
        scan = min(SCAN, 1 << (key.tokens - 1).bit_length())
        spatial, temporal = (key.spatial, key.temporal) if key.framed else (1.0, 0.0)
        programs = key.clips + key.clips * self.padded // tokens
        self.prepare = Launch(relation_prepare.prepare_kernel, programs, num_warps=8, maxnreg=PREPARE_REGISTERS)
        numbers = (key.tokens, self.padded, key.clips, self.blocks, spatial, temporal)
        numbers += gains(self.config, key.student, key.teacher)
        self.prepare_fixed = (*numbers, key.student, key.teacher, tokens, 512, max(scan, self.config.skip), self.config.skip, EPS)

    def _finish(self) -> None:
        self.loss = Launch(relation_finish.loss_kernel, 1, num_warps=4)
        self.loss_fixed = (self.tiles, self.key.clips, 1024)

    def _panel(self, clips: slice, p0: int, p1: int, table: Tensor, done: int) -> Panel:
        key, c = self.key, self.config
        count = clips.stop - clips.start
        options = {"num_warps": c.warps, "num_stages": c.stages, **({"maxnreg": c.registers} if c.registers else {})}
        out_rows, out_cols = (p1 - p0, aligned(key.tokens - p0)) if key.gradient else (0, 0)
        numbers = (self.tiles, done, key.tokens, self.padded, self.blocks, out_rows, out_cols, clips.start, p0, p1, key.margin)
        tile = (c.rows, c.cols, c.depth, c.slices, c.square, c.skip)
        kinds = (key.penalty, HUBER, key.framed, (key.weight is not None), key.gradient, self.unit, c.use_tma, key.precision, INTERPRET)
        launch = Launch(relation_pairs.pair_kernel, len(table), count, **options)
        return Panel(clips, p0, p1, table, launch, (*numbers, key.student, key.teacher, *tile, *kinds))

    # ------------------------------------------------------------------------------------------------- operands

    def operands(self, student: Tensor, teacher: Tensor) -> tuple[Any, ...]:
        """Student for rows and for columns, teacher for rows and for columns, as the pair kernel takes them."""
        c = self.config
        if not c.use_tma:
            return student, student, teacher, teacher
        student, teacher = _loadable(student), _loadable(teacher)
        blocks = ([1, c.rows, c.depth], [1, c.cols, c.depth])
        return tuple(self.describe(x, block) for x in (student, teacher) for block in blocks)

    def outputs(self, a: Tensor | None) -> tuple[Any, Any]:
        """A panel of A for its tiles and for their mirror images."""
        c, width = self.config, self.config.cols // self.config.slices
        if a is None or not c.use_tma:
            return a, a
        return self.describe(a, [1, c.rows, width]), self.describe(a, [1, width, c.rows])

    def describe(self, x: Tensor, block: list[int]) -> TensorDescriptor:
        """A tensor descriptor, whose checks are made once for each shape: every call makes six of them."""
        key = (x.shape, x.dtype, *block)
        known = self.descriptors.get(key)
        if known is None:
            self.descriptors[key] = known = dict(TensorDescriptor(x, list(x.shape), list(x.stride()), block).__dict__)
            known["base"] = None
        made = TensorDescriptor.__new__(TensorDescriptor)
        made.__dict__.update(known)
        made.base = x
        return made

    def space_of(self, panel: Panel, space: Tensor) -> Tensor:
        """The panel's part of A [clips, rows, columns], in the workspace."""
        count, rows, columns = panel.clips.stop - panel.clips.start, panel.end - panel.first, aligned(self.key.tokens - panel.first)
        return space.as_strided((count, rows, self.key.tokens - panel.first), (rows * columns, columns, 1))


def _loadable(x: Tensor) -> Tensor:
    """Rows that are no multiples of 16 bytes are padded with zeros, for tensor descriptors."""
    missing = -x.shape[2] % (16 // x.element_size())
    return F.pad(x, (0, missing)) if missing else x


@lru_cache(maxsize=64)
def plan(key: Key) -> Plan:
    """The plan for ``key``, made once; it copies its tile tables to the device."""
    return Plan(key)


def new_space(the: Plan) -> Tensor:
    """The workspace for A, in the student's precision."""
    return torch.empty(the.space, dtype=written(the.key.dtype), device=the.key.device)


@lru_cache(maxsize=64)
def projection(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Launch, tuple[Any, ...]]:
    """The launch that projects gradients of this shape, and its arguments from the number of rows on."""
    clips, tokens, features = shape
    columns = 1 << (features - 1).bit_length()
    rows, warps = (32 if INTERPRET else max(1024 // columns, 1)), min(max(columns // 1024, 1), 16)
    launch = Launch(relation_finish.project_kernel, -(-clips * tokens // rows), num_warps=warps)
    return launch, (clips * tokens, tokens, features, rows, columns, dtype == torch.float16, EPS)
