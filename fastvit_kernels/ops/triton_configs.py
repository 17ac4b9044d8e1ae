"""Launch configurations of the Triton kernels, as data.

Each was chosen by compiling the published models' sizes ahead of time for sm_80 and sm_90: no register is spilled to
memory, and shared memory stays within the 99 KiB that the smaller GPUs of these generations have. Channel counts that
are no multiple of 16 are loaded element by element, which takes registers, hence smaller tiles.

The batch and the map choose no configuration. They choose between two variants of the same tiles in few places: whether
a block holds all keys of an attention (`ONE_BLOCK`, and the output projection in its launch), whether the gradients of
keys are written at once or in parts. A window's size, which is the module's own, bounds tiles of its pixels.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Tile sizes, warps and pipeline stages of one kernel; a block that a kernel does not have is 0."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def tiles(self, rows: int, columns: int) -> int:
        """How many of these tiles cover a matrix."""
        return -(-rows // self.block_m) * -(-columns // self.block_n)


Table = dict[tuple[str, str], tuple[tuple[int, Config], ...]]
ALIGNMENT = 16
ANY = 1 << 31
_INTERPRETER = ((ANY, Config(32, 64, 64, 4, 1)),)
# A tile holds rows as a whole: fewer of them the wider they are.
_WHOLE_ROWS = (
    (64, Config(32, 0, 0, 4, 1)),
    (128, Config(16, 0, 0, 4, 1)),
    (512, Config(8, 0, 0, 4, 1)),
    (1024, Config(4, 0, 0, 4, 1)),
    (2048, Config(2, 0, 0, 4, 1)),
    (ANY, Config(1, 0, 0, 8, 1)),
)
_SUMMED_ROWS = ((256, Config(16, 0, 0, 8, 1)), (1024, Config(8, 0, 0, 8, 1)), (ANY, Config(1, 0, 0, 8, 1)))
_MEMORY_BOUND: Table = {
    ("default", "ieee"): ((ANY, Config(32, 64, 0, 4, 1)),),
    ("default", "tf32"): ((ANY, Config(32, 64, 0, 4, 1)),),
    ("default", "unaligned"): ((ANY, Config(16, 64, 0, 4, 1)),),
    ("interpreter", "any"): ((ANY, Config(128, 64, 0, 4, 1)),),
}
# Accumulators of a whole tile for several sums.
_COLUMN_SUMS: Table = {
    ("default", "ieee"): ((ANY, Config(16, 64, 0, 4, 1)),),
    ("default", "tf32"): ((ANY, Config(16, 64, 0, 4, 1)),),
    ("default", "unaligned"): ((ANY, Config(16, 64, 0, 4, 1)),),
    # The interpreter adds the rows of a tile one after another: the fewer, the smaller the error.
    ("interpreter", "any"): ((ANY, Config(16, 64, 0, 4, 1)),),
}

# Kernel -> (architecture, kind of product) -> rows of (widest channel count, configuration), narrowest first. The count
# is that of the output channels, for attention that of one head. "half" is bf16 and fp16, "ieee" fp32 without tf32.
CONFIGS: dict[str, Table] = {
    "linear": {
        ("default", "half"): (
            (64, Config(128, 64, 64, 8, 2)),
            (512, Config(64, 64, 64, 4, 3)),
            (ANY, Config(128, 128, 32, 8, 3)),
        ),
        ("default", "tf32"): ((ANY, Config(64, 64, 32, 4, 3)),),
        ("default", "ieee"): ((ANY, Config(64, 64, 16, 8, 2)),),
        ("default", "unaligned"): ((ANY, Config(32, 32, 32, 4, 2)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "expansion": {
        ("default", "half"): ((ANY, Config(128, 64, 64, 8, 2)),),
        ("default", "tf32"): ((ANY, Config(64, 64, 32, 4, 3)),),
        ("default", "ieee"): ((ANY, Config(64, 64, 16, 8, 2)),),
        ("default", "unaligned"): ((ANY, Config(32, 32, 32, 4, 2)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "prepare": {
        ("default", "half"): ((ANY, Config(16, 128, 128, 4, 2)),),
        ("default", "tf32"): ((ANY, Config(16, 128, 128, 4, 2)),),
        ("default", "ieee"): ((ANY, Config(16, 128, 128, 4, 2)),),
        ("default", "unaligned"): ((ANY, Config(16, 128, 64, 4, 2)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "normalize": {
        ("default", "half"): ((ANY, Config(16, 128, 128, 4, 2)),),
        ("default", "tf32"): ((ANY, Config(16, 128, 128, 4, 2)),),
        ("default", "ieee"): ((ANY, Config(16, 128, 128, 4, 2)),),
        ("default", "unaligned"): ((ANY, Config(16, 128, 64, 4, 2)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "projection": {
        ("default", "half"): ((64, Config(64, 64, 32, 8, 2)), (ANY, Config(64, 128, 64, 8, 2))),
        ("default", "tf32"): ((64, Config(64, 64, 32, 4, 2)), (ANY, Config(64, 128, 32, 8, 2))),
        ("default", "ieee"): ((ANY, Config(32, 64, 16, 4, 2)),),
        ("default", "unaligned"): ((ANY, Config(32, 32, 32, 4, 2)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "depthwise_projection": {
        ("default", "half"): (
            (64, Config(64, 64, 32, 16, 1)),
            (128, Config(64, 128, 64, 16, 1)),
            (ANY, Config(64, 256, 64, 16, 1)),
        ),
        ("sm_90", "half"): (
            (64, Config(64, 64, 64, 8, 1)),
            (128, Config(64, 128, 64, 16, 1)),
            (ANY, Config(64, 256, 32, 8, 1)),
        ),
        ("gfx942", "half"): ((64, Config(64, 64, 64, 8, 1)), (ANY, Config(64, 128, 32, 8, 1))),
        ("default", "tf32"): ((ANY, Config(32, 64, 32, 4, 1)),),
        ("default", "ieee"): ((ANY, Config(32, 64, 16, 4, 1)),),
        ("default", "unaligned"): ((ANY, Config(64, 64, 32, 8, 1)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "embedding": {
        ("default", "half"): (
            (64, Config(128, 64, 64, 8, 3)),
            (128, Config(64, 128, 64, 8, 3)),
            (256, Config(64, 256, 32, 8, 3)),
            (ANY, Config(64, 128, 64, 8, 3)),
        ),
        ("default", "tf32"): ((64, Config(64, 64, 32, 4, 2)), (ANY, Config(64, 128, 32, 8, 2))),
        ("default", "ieee"): ((64, Config(64, 64, 16, 8, 2)), (ANY, Config(32, 128, 16, 8, 2))),
        ("default", "unaligned"): ((64, Config(32, 64, 32, 8, 2)), (ANY, Config(32, 128, 32, 8, 2))),
        ("interpreter", "any"): _INTERPRETER,
    },
    "attention": {
        ("default", "half"): (
            (64, Config(64, 64, 32, 4, 3)),
            (128, Config(32, 32, 64, 4, 2)),
            (ANY, Config(32, 16, 64, 4, 1)),
        ),
        ("default", "tf32"): (
            (64, Config(64, 32, 32, 4, 2)),
            (128, Config(64, 32, 32, 8, 2)),
            (ANY, Config(32, 16, 32, 8, 2)),
        ),
        ("default", "ieee"): (
            (64, Config(32, 32, 16, 8, 2)),
            (128, Config(32, 16, 16, 4, 2)),
            (ANY, Config(32, 16, 16, 8, 2)),
        ),
        ("default", "unaligned"): (
            (64, Config(32, 16, 32, 4, 2)),
            (ANY, Config(16, 16, 32, 8, 2)),
        ),
        ("interpreter", "any"): _INTERPRETER,
    },
    # Of output channels; the wider of them do not fit, nor do loads element by element.
    "attention_projection": {
        ("default", "half"): ((32, Config(32, 64, 64, 4, 1)), (128, Config(32, 64, 64, 8, 1))),
        ("sm_90", "half"): ((128, Config(64, 64, 64, 8, 1)),),
        ("default", "tf32"): ((128, Config(32, 64, 32, 8, 2)),),
        ("default", "ieee"): ((64, Config(32, 64, 16, 16, 1)),),
        ("default", "unaligned"): (),
        ("interpreter", "any"): ((128, Config(32, 64, 64, 4, 1)),),
    },
    # Queries, keys and values of a whole window; block_m follows from its size. In fp32 a head counts four times; wider
    # ones than 32 spill under Triton 3.6 whatever the tiles.
    "projected_window_attention": {
        ("default", "half"): ((64, Config(0, 0, 32, 4, 2)), (128, Config(0, 0, 32, 8, 2))),
        ("sm_90", "half"): ((64, Config(0, 0, 32, 8, 2)), (128, Config(0, 0, 32, 16, 2))),
        ("default", "tf32"): ((512, Config(0, 0, 32, 8, 2)),),
        ("default", "ieee"): ((128, Config(0, 0, 16, 16, 1)),),
        ("default", "unaligned"): ((64, Config(0, 0, 16, 8, 1)), (128, Config(0, 0, 16, 16, 2))),
        ("interpreter", "any"): ((512, Config(0, 0, 64, 4, 1)),),
    },
    "window_attention": {
        ("default", "half"): (
            (64, Config(64, 32, 0, 4, 2)),
            (128, Config(64, 16, 0, 8, 1)),
            (ANY, Config(32, 16, 0, 4, 2)),
        ),
        ("default", "tf32"): (
            (64, Config(64, 32, 0, 4, 2)),
            (128, Config(32, 16, 0, 8, 1)),
            (ANY, Config(32, 16, 0, 8, 2)),
        ),
        ("default", "ieee"): (
            (64, Config(16, 16, 0, 4, 1)),
            (128, Config(32, 16, 0, 4, 2)),
            (ANY, Config(32, 16, 0, 8, 2)),
        ),
        ("default", "unaligned"): (
            (64, Config(32, 16, 0, 4, 1)),
            (128, Config(32, 16, 0, 4, 1)),
            (ANY, Config(16, 16, 0, 8, 2)),
        ),
        ("interpreter", "any"): _INTERPRETER,
    },
    "pool": {
        ("default", "ieee"): ((ANY, Config(16, 64, 0, 8, 1)),),
        ("default", "tf32"): ((ANY, Config(16, 64, 0, 8, 1)),),
        ("default", "unaligned"): ((ANY, Config(8, 64, 0, 4, 1)),),
        ("interpreter", "any"): ((ANY, Config(128, 64, 0, 4, 1)),),
    },
    "moments": {
        ("default", "ieee"): ((ANY, Config(1, 2048, 1, 4, 2)),),
        ("default", "tf32"): ((ANY, Config(1, 2048, 1, 4, 2)),),
        ("default", "unaligned"): ((ANY, Config(1, 1024, 1, 4, 2)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "attention_saved": {
        ("default", "half"): (
            (64, Config(64, 32, 0, 8, 1)),
            (128, Config(32, 32, 0, 8, 1)),
            (ANY, Config(16, 32, 0, 8, 1)),
        ),
        ("default", "tf32"): ((ANY, Config(16, 16, 0, 4, 1)),),
        ("default", "ieee"): ((ANY, Config(16, 16, 0, 4, 1)),),
        ("default", "unaligned"): ((64, Config(16, 16, 0, 4, 1)), (ANY, Config(16, 16, 0, 8, 1))),
        ("interpreter", "any"): _INTERPRETER,
    },
    "attention_gradient": {
        ("default", "half"): (
            (64, Config(64, 32, 0, 8, 1)),
            (128, Config(32, 32, 0, 8, 1)),
            (ANY, Config(16, 16, 0, 8, 1)),
        ),
        ("default", "tf32"): ((ANY, Config(16, 16, 0, 8, 1)),),
        ("default", "ieee"): ((ANY, Config(16, 16, 0, 8, 1)),),
        ("default", "unaligned"): ((64, Config(16, 16, 0, 4, 1)), (ANY, Config(16, 16, 0, 8, 1))),
        ("interpreter", "any"): _INTERPRETER,
    },
    "bias_gradient": {
        ("default", "half"): ((64, Config(32, 32, 0, 4, 1)), (ANY, Config(16, 16, 0, 4, 1))),
        ("sm_90", "half"): ((64, Config(64, 32, 0, 8, 1)), (ANY, Config(16, 16, 0, 4, 1))),
        ("default", "tf32"): ((ANY, Config(16, 16, 0, 8, 1)),),
        ("default", "ieee"): ((ANY, Config(16, 16, 0, 8, 1)),),
        ("default", "unaligned"): ((ANY, Config(16, 16, 0, 8, 1)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "hidden_gradient": {
        ("default", "half"): ((ANY, Config(128, 64, 64, 8, 2)),),
        ("default", "tf32"): ((ANY, Config(64, 64, 32, 8, 2)),),
        ("default", "ieee"): ((ANY, Config(64, 64, 16, 8, 2)),),
        ("default", "unaligned"): ((ANY, Config(32, 32, 32, 4, 2)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "input_gradient": {
        ("default", "half"): ((64, Config(128, 64, 64, 8, 2)), (ANY, Config(128, 128, 32, 8, 3))),
        ("default", "tf32"): ((ANY, Config(64, 64, 32, 4, 3)),),
        ("default", "ieee"): ((ANY, Config(64, 64, 16, 8, 2)),),
        ("default", "unaligned"): ((ANY, Config(32, 32, 32, 4, 2)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "weight_gradient": {
        ("default", "half"): ((64, Config(64, 64, 64, 4, 3)), (ANY, Config(128, 64, 64, 8, 3))),
        ("default", "tf32"): ((ANY, Config(64, 64, 32, 8, 2)),),
        ("default", "ieee"): ((ANY, Config(64, 64, 16, 8, 2)),),
        ("default", "unaligned"): ((ANY, Config(32, 32, 32, 4, 2)),),
        ("interpreter", "any"): ((ANY, Config(32, 64, 32, 4, 1)),),
    },
    "patch_weight_gradient": {
        ("default", "half"): ((ANY, Config(64, 64, 32, 4, 2)),),
        ("default", "tf32"): ((ANY, Config(64, 64, 32, 8, 2)),),
        ("default", "ieee"): ((ANY, Config(64, 64, 16, 8, 1)),),
        ("default", "unaligned"): ((ANY, Config(64, 32, 32, 8, 2)),),
        ("interpreter", "any"): ((ANY, Config(32, 64, 32, 4, 1)),),
    },
    "patch_input_gradient": {
        ("default", "half"): ((64, Config(64, 64, 64, 8, 2)), (ANY, Config(128, 128, 32, 8, 2))),
        ("sm_90", "half"): ((64, Config(128, 64, 64, 8, 2)), (ANY, Config(128, 128, 32, 8, 2))),
        ("default", "tf32"): ((ANY, Config(64, 64, 32, 4, 2)),),
        ("default", "ieee"): ((ANY, Config(64, 64, 16, 8, 1)),),
        ("default", "unaligned"): ((ANY, Config(64, 32, 16, 8, 1)),),
        ("interpreter", "any"): _INTERPRETER,
    },
    "norm_gradient": {
        ("default", "ieee"): _WHOLE_ROWS,
        ("default", "tf32"): _WHOLE_ROWS,
        ("default", "unaligned"): _WHOLE_ROWS,
        ("interpreter", "any"): ((ANY, Config(16, 0, 0, 4, 1)),),
    },
    "token_rows": {
        ("default", "ieee"): _SUMMED_ROWS,
        ("default", "tf32"): _SUMMED_ROWS,
        ("default", "unaligned"): _SUMMED_ROWS,
        ("interpreter", "any"): ((ANY, Config(16, 0, 0, 4, 1)),),
    },
    "elementwise": {
        **_MEMORY_BOUND,
        ("default", "ieee"): ((ANY, Config(16, 64, 0, 4, 1)),),
        ("default", "tf32"): ((ANY, Config(16, 64, 0, 4, 1)),),
    },
    "depthwise": _MEMORY_BOUND,
    "filter_gradient": {**_COLUMN_SUMS, ("interpreter", "any"): ((ANY, Config(64, 64, 0, 4, 1)),)},
    "sums": _COLUMN_SUMS,
    "sum": {
        ("default", "ieee"): ((ANY, Config(16, 128, 0, 4, 1)),),
        ("default", "tf32"): ((ANY, Config(16, 128, 0, 4, 1)),),
        ("default", "unaligned"): ((ANY, Config(16, 128, 0, 4, 1)),),
        ("interpreter", "any"): ((ANY, Config(16, 1024, 0, 4, 1)),),
    },
}

# Where NVIDIA's assembler would give threads fewer registers than they need, for more programs side by side, and spill
# two or four: kernel -> kinds of product. Elsewhere it makes worse code of more registers.
ALL_REGISTERS: dict[str, tuple[str, ...]] = {
    "attention": ("unaligned half",),
    "attention_saved": ("unaligned ieee",),
    "bias_gradient": ("unaligned ieee",),
    "depthwise": ("ieee", "tf32", "unaligned ieee", "unaligned tf32"),
    "input_gradient": ("unaligned half",),
    "patch_input_gradient": ("half",),
    "patch_weight_gradient": ("half", "unaligned half"),
}
