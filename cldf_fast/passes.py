"""Passes of bounded size: rows that do not mix go through a network a part at a time."""

from __future__ import annotations

from torch import Tensor

from cldf_fast.ops._arguments import check_count

_CUDA_ROWS = 128
# Arrays beyond 32 MB, such as 64 channels of so many pixels, glibc returns to the system when they are freed and takes
# anew, page by page, which costs a CPU a fifth of a pass. Fewer pixels gain nothing, and a few rows wait for Python.
_CPU_VALUES = 2**23


def check_max_batch(max_batch: int | None) -> int | None:
    """The bound as it is, or ConfigError."""
    if max_batch is not None:
        check_count(max_batch=max_batch)
    return max_batch


def split_rows(rows: Tensor, max_batch: int | None, *, width: int = 64) -> tuple[Tensor, ...]:
    """Rows [R, C, H, W] in parts as equal as can be, none longer than the bound.

    max_batch: None is 128 rows on a GPU, and on a CPU as many as hold 2^23 / width pixels. width: channels that a
    network of the usual size makes of every pixel.
    """
    fit = _CUDA_ROWS if rows.is_cuda else _CPU_VALUES // width // max(1, rows.shape[2] * rows.shape[3])
    return rows.chunk(max(1, -(-len(rows) // (max_batch or max(1, fit)))))
