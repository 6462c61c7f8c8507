"""Tensors kept in a temporary file: what calibration looks at again and again, without holding it in memory."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor


class TensorStore:
    """A list of CPU tensors on disk, read back one at a time; the file is gone when the store is closed.

    The operating system keeps in memory what it has room for, so reading is fast where there is memory and possible
    where there is not. ::

        with contextlib.closing(TensorStore()) as images:
            images.append(image)
            images[0]
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix='basicsr_quant_')  # noqa: SIM115 (lives as long as the store)
        self._entries: list[tuple[int, torch.Size, torch.dtype]] = []
        self._end = 0

    def append(self, tensor: Tensor) -> None:
        """Add a tensor of any shape and dtype, from any device; without its gradient."""
        data = tensor.detach().cpu().contiguous()
        self._file.seek(self._end)
        self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._entries.append((self._end, tensor.shape, tensor.dtype))
        self._end = self._file.tell()

    def __getitem__(self, index: int) -> Tensor:
        offset, shape, dtype = self._entries[index]
        data = bytearray(shape.numel() * dtype.itemsize)
        self._file.seek(offset)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        self._file.close()
