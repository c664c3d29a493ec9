"""Memory that the allocators would keep, given back to the system. Linux and glibc; elsewhere it does nothing.

TensorFlow's allocator keeps what it once had: with oneDNN in regions of its own, which it never returns.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

_LIBC = ctypes.CDLL(None, use_errno=True)
_MADV_DONTNEED = 4


def forget(array: npt.NDArray[np.generic]) -> None:
    """Gives back the whole pages that an array lies on; what is read there afterwards is undefined.

    The caller owns the memory, private and anonymous, and needs its content no more. It stays allocated: its owner
    frees it as ever.
    """
    madvise = getattr(_LIBC, "madvise", None)
    first = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if madvise is not None and array.flags.c_contiguous and last > first:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def end_variables(variables: Iterable[Any], living: Iterable[Any] = ()) -> None:
    """Takes what they hold from TensorFlow's variables, and gives its memory back.

    Args:
        variables: `tf.Variable`, of float32.
        living: variables that stay; what was assigned from one of them may lie where it does.
    """
    import tensorflow as tf

    nothing = tf.zeros([0], tf.float32)
    kept = {_address(variable) for variable in living}
    for variable in variables:
        # The allocator keeps its regions: the pages go back while they are still the variable's.
        if _address(variable) not in kept:
            forget(np.asarray(variable.read_value()))
        # TensorFlow keeps graphs, and these the variable: what it holds is taken from it.
        tf.raw_ops.AssignVariableOp(resource=variable.handle, value=nothing)


def _address(variable: Any) -> int:
    # Not `numpy()`, which copies.
    return int(np.asarray(variable.read_value()).ctypes.data)


def trim() -> None:
    """Has the C library return what lies free in its heaps."""
    malloc_trim = getattr(_LIBC, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
