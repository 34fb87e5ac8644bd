"""Products of small matrices inside a compiled kernel. Importing it needs the extra `[fast]`.

LLVM does not keep a product's sums in registers by itself, so the innermost loop is written in its own language: a tile
of the result, up to 6 rows of 16 numbers, stays there while the sum runs over what is multiplied.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfrank.numerics.team import FLOAT, compile_once

LANES = 16  # columns of a tile: one register of AVX-512, two of AVX2
MOST = 6  # rows of a tile: with AVX2 12 of 16 registers hold sums


_word, _number, _place = ir.IntType(64), ir.FloatType(), ir.IntType(32)
_vector = ir.VectorType(_number, LANES)
_NO_VECTOR, _EVERY = ir.Constant(_vector, ir.Undefined), ir.Constant(ir.VectorType(_place, LANES), [0] * LANES)
_ZEROS = ir.Constant(_vector, [0.0] * LANES)


@intrinsic
def _tile(
    context: Any, c: Any, ldc: Any, a: Any, down: Any, along: Any, b: Any, ldb: Any, count: Any, rows: Any
) -> Any:
    """What `product` says, for at least 1 and up to `MOST` rows, `LANES` columns, and `count` from 1 on."""

    def code(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        *operands, height = given
        end = builder.append_basic_block()
        chosen = builder.switch(height, end)
        for number in range(1, MOST + 1):
            block = builder.append_basic_block()
            chosen.add_case(ir.Constant(_word, number), block)
            builder.position_at_end(block)
            _sum_tile(builder, number, *operands)
            builder.branch(end)
        builder.position_at_end(end)
        return target.get_dummy_value()

    return types.void(*[types.int64] * 9), code


def _sum_tile(
    builder: Any, rows: int, c: Any, ldc: Any, a: Any, down: Any, along: Any, b: Any, ldb: Any, count: Any
) -> None:
    """Write the loop over `count` whose sums are `rows` vectors."""
    multiply_add = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_vector, [_vector] * 3), f"llvm.fmuladd.v{LANES}f32"
    )

    def pointer(base: Any, offset: Any, kind: Any) -> Any:
        return builder.inttoptr(builder.add(base, builder.mul(offset, ir.Constant(_word, FLOAT))), kind.as_pointer())

    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    starts = [builder.mul(down, ir.Constant(_word, row)) for row in range(rows)]
    builder.branch(loop)
    builder.position_at_end(loop)
    k, *sums = builder.phi(_word), *(builder.phi(_vector) for _ in range(rows))
    columns = builder.load(pointer(b, builder.mul(k, ldb), _vector), align=FLOAT)
    grown = []
    for start, total in zip(starts, sums, strict=True):
        one = builder.load(pointer(a, builder.add(start, builder.mul(k, along)), _number))
        first = builder.insert_element(_NO_VECTOR, one, ir.Constant(_place, 0))
        spread = builder.shuffle_vector(first, _NO_VECTOR, _EVERY)
        grown.append(builder.call(multiply_add, [spread, columns, total]))
    following = builder.add(k, ir.Constant(_word, 1))
    k.add_incoming(ir.Constant(_word, 0), before)
    k.add_incoming(following, loop)
    for total, larger in zip(sums, grown, strict=True):
        total.add_incoming(_ZEROS, before)
        total.add_incoming(larger, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    for row, total in enumerate(grown):
        builder.store(total, pointer(c, builder.mul(ldc, ir.Constant(_word, row)), _vector), align=FLOAT)


@compile_once(*[types.int64] * 10)
def _product(
    c: Any, ldc: Any, a: Any, down: Any, along: Any, b: Any, ldb: Any, rows: Any, columns: Any, count: Any
) -> None:
    """c = a b: float32 at addresses, `rows` by `count` and `count` by `columns`, a multiple of `LANES`.

    In `a` the next row is `down` elements away and the next number of a row `along`; rows of `b` and of `c` are `ldb`
    and `ldc` apart. Every element of the result is summed in the order of `count`, at least 1.
    """
    for column in range(0, columns, LANES):
        for row in range(0, rows, MOST):
            _tile(
                c + FLOAT * (row * ldc + column), ldc, a + FLOAT * row * down, down, along, b + FLOAT * column, ldb,
                count, min(rows - row, MOST),
            )  # fmt: skip


product = _product.ctypes
