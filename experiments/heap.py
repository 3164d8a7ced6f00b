"""The heap of glibc, which XLA takes its memory from on a CPU."""

import ctypes


class Gaps:
    """The free blocks that a compilation leaves between others in glibc's heap.

    They are thousands of different sizes, and glibc searches them, with all threads waiting, for
    each of the thousands of blocks that XLA wants in a step. So this class keeps them allocated
    until the next compilation, and XLA gets blocks from the end of the heap. A train step of
    yocou_small as a transformer took 173 instead of 200 ms, and the memory of the process did not
    grow by more than 3% (LOG.md).
    """

    SMALLEST, LARGEST = 2**12, 2**26  # bytes
    BEGINS = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # its end: now XLA compiles
    ENDS = "/jax/core/compile/backend_compile_duration"
    MOST = 50_000  # gaps; a compilation leaves about 10,000
    LONG_S = 1.0  # of a compilation that leaves many

    def __init__(self, libc: ctypes.CDLL):
        self._malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("malloc", libc))
        self._free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("free", libc))
        self._sbrk = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t)(("sbrk", libc))
        self._filled: list[int] = []
        self._many = False

    def listen(self, event: str, seconds: float, **_) -> None:
        """A listener of jax.monitoring: opens the gaps for a compilation, and fills them after it,
        from the first long one on."""
        if event == self.BEGINS:
            self.open()
        elif event == self.ENDS:
            self._many |= seconds > self.LONG_S
            if self._many:
                self.fill()

    def open(self) -> None:
        while self._filled:
            self._free(self._filled.pop())

    def fill(self) -> None:
        """Takes all gaps, the largest ones first."""
        self.open()
        size = self.LARGEST
        if (end := self._malloc(4 * size)) is None:
            return
        # Only in the heap, which grows upwards, are blocks below `end` gaps. Mapped memory, and
        # that of another allocator, is above the heap.
        if end > self._sbrk(0):
            self._free(end)
            return
        while size >= self.SMALLEST:
            block = self._malloc(size)
            if block is not None and block < end and len(self._filled) < self.MOST:
                self._filled.append(block)
            else:  # it comes from the end of the heap, so no gap has this size
                self._free(block)
                size = int(size / 1.25)
        self._free(end)
