"""How the relation loss is laid out on a GPU: tile configurations, panels, tile tables, and cached launches.

A ``Plan`` holds everything a call needs that follows only from shapes, precisions and options. It is made once for
each combination and cached, so that a warm call only allocates and launches: work of less than a millisecond on a GPU
is otherwise bound by the host.

Shapes: B clips, N tokens, D student and E teacher features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ldo.kernels import relation_finish, relation_pairs, relation_prepare
from ldo.kernels.support import EPS, HUBER, INTERPRET, Launch, architecture, written

# Two blocks a multiprocessor; without a limit, one of Triton 3.6's compilers aims at three and spills.
PREPARE_REGISTERS = 96

# Rows of squares that are walked together, so that their operands stay in L2.
GROUP = 8

# Tokens that the class sums take at a time, at most.
SCAN = 2048


@dataclass(frozen=True)
class Config:
    """The pair kernel's tile for one kind of GPU; ``tests/kernels/test_relation_aot.py`` checks each for its limits.

    ``slices``: of the epilogue; 1, 2 or 4. ``registers``: the most that a thread may have, for more blocks a
    multiprocessor; None leaves it to the compiler. ``truncation``: the share of its accumulator that a matrix
    instruction of depth 16 loses; see ``gains``.
    """

    rows: int
    cols: int
    depth: int
    slices: int
    warps: int
    stages: int
    use_tma: bool
    registers: int | None = None
    truncation: float = 0.0

    @property
    def square(self) -> int:
        """Side of the squares: one above the diagonal is computed once and mirrored, one on it is computed whole."""
        return max(self.rows, self.cols)

    @property
    def skip(self) -> int:
        """Tokens in each of the blocks that are searched for weights that are all 0."""
        return min(self.rows, self.cols)


# Truncation as measured on an H200 in bf16 (docs/kernels.md): about half a unit in the last place of fp32.
HOPPER = 3.05e-8

# By compute capability, and whether operands are half precision. sm_86, sm_89 and sm_120 have less shared memory and
# take the configurations of sm_80.
CONFIGS = {
    (80, True): Config(128, 128, 32, 1, 8, 4, False),
    (80, False): Config(128, 64, 32, 1, 8, 3, False),
    (90, True): Config(128, 256, 64, 2, 8, 4, True, truncation=HOPPER),
    (90, False): Config(128, 128, 32, 2, 8, 3, True),
    (100, True): Config(128, 256, 64, 4, 8, 3, True),
    (100, False): Config(64, 64, 32, 1, 4, 3, True),
}

# Where A is written too, sm_90 runs two blocks a multiprocessor: one multiplies while the other writes.
WITH_GRADIENT = CONFIGS | {(90, True): Config(128, 128, 64, 2, 8, 3, True, registers=128, truncation=HOPPER)}

# For the interpreter: small tiles, so that a small N already has several.
ON_CPU = Config(32, 64, 32, 4, 4, 1, True)


def choose_config(device: torch.device, dtype: torch.dtype, gradient: bool) -> Config:
    """The configuration for a device. It is fixed, not tuned at run time, so that all ranks of a run take the same."""
    if device.type != "cuda":
        return ON_CPU
    configs = WITH_GRADIENT if gradient else CONFIGS
    return configs[architecture(device), dtype != torch.float32]


def gains(config: Config, student: int, teacher: int) -> tuple[float, float]:
    """Factors for ``inverse`` and ``ratio`` that make up for what tensor cores truncate.

    Tensor cores add into an fp32 accumulator and cut off the digits that do not fit. Each step of depth 16 thus moves
    the accumulator towards zero by ``truncation`` of its value, on average. Differences of similarities shrink, pairs
    near the margin fall below it, and a hinge's gradient is wrong for them.

    The student's similarity s grows over K_s steps and loses K_s / 2 of them. The teacher's similarity y grows over its
    own K_t steps and is then carried through the student's, so it loses K_t / 2 + K_s. Both get K_s / 2 back at the
    end, and y gets the rest back when it is scaled.
    """
    student_steps, teacher_steps = -(-student // 16), -(-teacher // 16)
    at_the_end = 1 + config.truncation * student_steps / 2
    between = 1 + config.truncation * (teacher_steps + student_steps) / 2
    # square roots, since a pair multiplies by the factor of either token
    return at_the_end**0.5, between**0.5


# ----------------------------------------------------------------------------------------------------------- panels


def panels(clips: int, tokens: int, elements: int, step: int) -> tuple[list[tuple[int, int]], int]:
    """Row panels [(first, end)] whose part of A has at most ``elements``, and how many clips go into one launch.

    A panel starts at a multiple of ``step`` and has at least ``step`` rows, even if that exceeds ``elements``.
    """
    whole = tokens * aligned(tokens)
    if whole <= elements:
        return [(0, tokens)], min(clips, elements // whole)
    found = []
    start = 0
    while start < tokens:
        # later panels are narrower, so they can have more rows
        steps = elements // aligned(tokens - start) // step
        rows = max(steps, 1) * step
        found.append((start, min(start + rows, tokens)))
        start += rows
    return found, 1


@lru_cache(maxsize=64)
def tile_table(tokens: int, first: int, end: int, rows: int, cols: int, device: torch.device) -> Tensor:
    """First row and column of every tile of the panel of rows ``first`` to ``end``, int32 [tiles, 2].

    The tiles cover the squares on or above the diagonal. They are ordered for L2: GROUP rows of squares are walked
    together, column by column.
    """
    side = max(rows, cols)
    first_square = first // side
    end_square = -(-end // side)
    squares = -(-tokens // side)
    # the squares below the diagonal are mirror images
    tiles = []
    for group in range(first_square, end_square, GROUP):
        group_end = min(group + GROUP, end_square)
        for square_column in range(group, squares):
            for square_row in range(group, min(group_end, square_column + 1)):
                tiles += _tiles_of_square(square_row * side, square_column * side, side, rows, cols, tokens)
    return torch.tensor(tiles, dtype=torch.int32).to(device)


def _tiles_of_square(top: int, left: int, side: int, rows: int, cols: int, tokens: int) -> list[tuple[int, int]]:
    row_starts = range(top, min(top + side, tokens), rows)
    column_starts = range(left, min(left + side, tokens), cols)
    return [(row, column) for row in row_starts for column in column_starts]


def aligned(columns: int) -> int:
    """The length of a row of A: tensor descriptors and cuBLAS need rows that are multiples of 16 bytes."""
    return -(-columns // 64) * 64


# ------------------------------------------------------------------------------------------------------------ plans


class Key(NamedTuple):
    """All that a plan depends on."""

    clips: int
    tokens: int
    student: int  # features
    teacher: int  # features
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
    """Rows ``first`` to ``end`` of A for some clips; ``launch`` runs the pair kernel on their tiles."""

    clips: slice
    first: int
    end: int
    tiles: Tensor
    launch: Launch
    fixed: tuple[Any, ...]  # the kernel's arguments from partial_stride to the last


class Plan:
    """Launches and sizes for one ``Key``. ``plan`` caches the latest ones."""

    def __init__(self, key: Key):
        self.key = key
        self.config = config = choose_config(key.device, key.dtype, key.gradient)
        self.padded = -(-key.tokens // config.square) * config.square
        self.blocks = self.padded // config.skip
        self.unit = key.gradient and key.dtype == torch.float16
        # Only with TMA are empty blocks skipped: elsewhere the registers that it takes spill.
        self.skips = key.weight is not None and config.use_tma
        self._lay_out_panels()
        self.scratch = self._scratch()
        self.prepare, self.prepare_fixed = self._preparation()
        self.loss = Launch(relation_finish.loss_kernel, 1, num_warps=4)
        self.loss_fixed = (self.tiles, key.clips, 1024)
        self.descriptors: dict[tuple, dict[str, Any]] = {}

    def _lay_out_panels(self) -> None:
        key, config = self.key, self.config
        rows, clips = [(0, key.tokens)], key.clips
        if key.gradient:
            rows, clips = panels(key.clips, key.tokens, key.workspace // key.dtype.itemsize, config.square)
        tables = [tile_table(key.tokens, first, end, config.rows, config.cols, key.device) for first, end in rows]
        self.tiles = sum(map(len, tables))
        # elements of the workspace, which all panels share
        self.space = 0
        if key.gradient:
            self.space = clips * max((end - first) * aligned(key.tokens - first) for first, end in rows)
        self.panels = []
        for clip in range(0, key.clips, clips):
            together = slice(clip, min(clip + clips, key.clips))
            done = 0
            for (first, end), table in zip(rows, tables, strict=True):
                self.panels.append(self._panel(together, first, end, table, done))
                done += len(table)

    def _scratch(self) -> list[int]:
        """Sizes of the parts of the fp32 scratch buffer: inverse, ratio, weight, factor, scale, partial sums, observed.

        The observed blocks are int32.
        """
        clips = self.key.clips
        places = clips * self.padded
        sizes = (
            places,
            places,
            places if self.key.weight is not None else 0,
            2 * clips,
            clips,
            clips * self.tiles,
            clips * self.blocks if self.skips else 0,
        )
        # each part begins at a multiple of 16 bytes, as Launch promises the kernels
        return [-(-size // 4) * 4 for size in sizes]

    def _preparation(self) -> tuple[Launch, tuple[Any, ...]]:
        """The launch of the prepare kernel, and its arguments from N to the last."""
        key, skip = self.key, self.config.skip
        tokens = 32 if INTERPRET else 16
        scan = min(SCAN, 1 << (key.tokens - 1).bit_length())
        # without frames all pairs are of the first class
        spatial, temporal = (key.spatial, key.temporal) if key.framed else (1.0, 0.0)
        programs = key.clips + key.clips * self.padded // tokens
        launch = Launch(relation_prepare.prepare_kernel, programs, num_warps=8, maxnreg=PREPARE_REGISTERS)
        sizes = (key.tokens, self.padded, key.clips, self.blocks)
        factors = (spatial, temporal, *gains(self.config, key.student, key.teacher))
        constants = (key.student, key.teacher, tokens, 512, max(scan, skip), skip, EPS)
        return launch, (*sizes, *factors, *constants)

    def _panel(self, clips: slice, first: int, end: int, table: Tensor, done: int) -> Panel:
        key, config = self.key, self.config
        out_rows = out_cols = 0
        if key.gradient:
            out_rows, out_cols = end - first, aligned(key.tokens - first)
        sizes = (self.tiles, done, key.tokens, self.padded, self.blocks, out_rows, out_cols, clips.start, first, end)
        widths = (key.student, key.teacher)
        tile = (config.rows, config.cols, config.depth, config.slices, config.square, config.skip)
        kinds = (key.penalty, HUBER, key.framed, key.weight is not None, key.gradient, self.unit)
        arithmetic = (config.use_tma, key.precision, INTERPRET)
        options = {"num_warps": config.warps, "num_stages": config.stages}
        if config.registers:
            options["maxnreg"] = config.registers
        launch = Launch(relation_pairs.pair_kernel, len(table), clips.stop - clips.start, **options)
        return Panel(clips, first, end, table, launch, (*sizes, key.margin, *widths, *tile, *kinds, *arithmetic))

    # ------------------------------------------------------------------------------------------------- operands

    def operands(self, student: Tensor, teacher: Tensor) -> tuple[Any, ...]:
        """Student for rows and for columns, teacher for rows and for columns, as the pair kernel takes them."""
        config = self.config
        if not config.use_tma:
            return student, student, teacher, teacher
        student, teacher = _loadable(student), _loadable(teacher)
        row_block, col_block = [1, config.rows, config.depth], [1, config.cols, config.depth]
        return (
            self.describe(student, row_block),
            self.describe(student, col_block),
            self.describe(teacher, row_block),
            self.describe(teacher, col_block),
        )

    def new_space(self) -> Tensor:
        """The workspace for A, in the student's precision."""
        return torch.empty(self.space, dtype=written(self.key.dtype), device=self.key.device)

    def space_of(self, panel: Panel, space: Tensor) -> Tensor:
        """The panel's part of A [clips, rows, columns], in the workspace."""
        clips = panel.clips.stop - panel.clips.start
        rows = panel.end - panel.first
        columns = self.key.tokens - panel.first
        row_length = aligned(columns)
        return space.as_strided((clips, rows, columns), (rows * row_length, row_length, 1))

    def outputs(self, matrix: Tensor | None) -> tuple[Any, Any]:
        """A panel of A as the pair kernel writes it: for its tiles, and for their mirror images."""
        config = self.config
        if matrix is None or not config.use_tma:
            return matrix, matrix
        width = config.cols // config.slices
        return self.describe(matrix, [1, config.rows, width]), self.describe(matrix, [1, width, config.rows])

    def describe(self, tensor: Tensor, block: list[int]) -> TensorDescriptor:
        """A tensor descriptor of ``tensor`` in blocks of that shape."""
        key = (tensor.shape, tensor.dtype, *block)
        known = self.descriptors.get(key)
        if known is None:
            made = TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
            self.descriptors[key] = known = dict(made.__dict__)
            known["base"] = None
        # Copied without its constructor, whose checks are needed once for each shape: every call makes six descriptors.
        copy = TensorDescriptor.__new__(TensorDescriptor)
        copy.__dict__.update(known)
        copy.base = tensor
        return copy


def _loadable(features: Tensor) -> Tensor:
    """``features`` with rows of a multiple of 16 bytes, as tensor descriptors need; padded with zeros."""
    missing = -features.shape[2] % (16 // features.element_size())
    return F.pad(features, (0, missing)) if missing else features


@lru_cache(maxsize=64)
def plan(key: Key) -> Plan:
    """The plan for ``key``, made once; making it copies its tile tables to the device."""
    return Plan(key)


@lru_cache(maxsize=64)
def projection(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Launch, tuple[Any, ...]]:
    """The launch that projects gradients of this shape, and its arguments from ``rows`` to the last."""
    clips, tokens, features = shape
    # a program holds whole rows in registers: several short ones, or a long one over several warps
    columns = 1 << (features - 1).bit_length()
    rows = 32 if INTERPRET else max(1024 // columns, 1)
    warps = min(max(columns // 1024, 1), 16)
    launch = Launch(relation_finish.project_kernel, -(-clips * tokens // rows), num_warps=warps)
    return launch, (clips * tokens, tokens, features, rows, columns, dtype == torch.float16, EPS)
