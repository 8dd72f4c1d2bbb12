"""Pieces shared by the two Gluon kernels for Hopper.

A warpgroup holds 64 rows of a product: each thread has two rows, and of these the columns 8k + 2c and 8k + 2c + 1, where c is
its place among the four threads of a row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def thread_sums(p, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """(ROWS, 4): the sum of each row over the columns that each of its four threads holds. No data moves between threads."""
    p = p.reshape([ROWS, 4, COLUMNS // 32, 4, 2])
    p = gl.sum(p, axis=1)
    p = gl.sum(p, axis=1)
    return gl.sum(p, axis=2)


@gluon.jit
def along_rows(x, LAYOUT: gl.constexpr):
    """One value per row as a column that broadcasts against a tensor of LAYOUT, where the same threads hold the same rows."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, LAYOUT), assert_trivial=True), 1)


@gluon.jit
def named_barrier(SYNC: gl.constexpr, NUMBER: gl.constexpr):
    """Arrive at barrier 9 or 10 of two warpgroups, and with SYNC wait for the other. Triton itself uses those below."""
    each_thread: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    x = gl.arange(0, 128, layout=each_thread)
    if SYNC:
        if NUMBER == 9:
            gl.inline_asm_elementwise(
                "bar.sync 9, 256; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
            )
        else:
            gl.inline_asm_elementwise(
                "bar.sync 10, 256; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
            )
    elif NUMBER == 9:
        gl.inline_asm_elementwise(
            "bar.arrive 9, 256; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
        )
    else:
        gl.inline_asm_elementwise(
            "bar.arrive 10, 256; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
        )
