"""Memory of this process: current, peak, and copy speed."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from types import TracebackType

import torch
from torch._subclasses.fake_tensor import FakeTensor

from megagrow.background import Loop

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.002
_COPY_BYTES = 256 * 2**20


def resident_bytes() -> int:
    """Current resident memory of this process."""
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


class PeakMemory:
    """Peak resident memory of this process inside a `with`: `bytes` afterwards.

    Uses the kernel's own peak counter if it can be reset; otherwise a thread samples every 2 ms
    (`exact` is then False).
    """

    def __enter__(self) -> PeakMemory:
        try:
            _CLEAR.write_text("5")
            self.exact = True
        except OSError:
            self.exact = False
            self.bytes = resident_bytes()
            self._thread = Loop("peak memory", self._watch, every=_SAMPLE_SECONDS)
            self._thread.start()
        return self

    def _watch(self) -> None:
        self.bytes = max(self.bytes, resident_bytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.exact:
            self.bytes = _status("VmHWM")
        else:
            self._thread.stop()
            self.bytes = max(self.bytes, resident_bytes())


def tensor_bytes() -> int:
    """Bytes of all tensors of this process, with shared memory counted once."""
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor):
            for tensor in (item, item.grad if item.is_leaf else None):
                if isinstance(tensor, FakeTensor):  # it has no memory
                    continue
                if tensor is not None and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    # Another storage may share the start of this one's memory.
                    known = storages.get(storage.data_ptr(), 0)
                    storages[storage.data_ptr()] = max(known, storage.nbytes())
    return sum(storages.values())


def copy_seconds(size: int, *, device: torch.device) -> float:
    """Time to copy `size` bytes in memory, with all pages touched first."""
    length = max(1, min(size, _COPY_BYTES) // 4)
    source = torch.ones(length, device=device)
    target = torch.zeros_like(source)
    begin = _now(device)
    left = size // 4
    while left > 0:
        n = min(left, length)
        target[:n].copy_(source[:n])
        left -= n
    return _now(device) - begin


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
