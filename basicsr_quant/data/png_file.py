"""A PNG file written row by row, whole or not at all: a large image never stands in memory as one."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import QuantError

_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}
"""By channels: grey, RGB, RGBA."""
_FILTER_SUB = 1


class PngFile:
    """Used as a context: rows go to a temporary file, which takes its name at the end and goes away after an error.

    Compression is OpenCV's default, the fastest level: runs of equal differences to the pixel on the left.

    Args:
        path: The file; its folder is made where it is missing.
        height, width: Of the whole image.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        dtype: uint8 or uint16.

    Raises:
        QuantError: in any call, if the folder cannot be written or the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int, channels: int, dtype: np.dtype) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f'.{self.path.name}.{os.getpid()}.tmp')
        self._row = (width, channels) if channels > 1 else (width,)
        self._height, self._written = height, 0
        self._type = np.dtype(dtype).newbyteorder('>')
        self._pixel = channels * self._type.itemsize
        self._compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        header = struct.pack('>IIBBBBB', width, height, 8 * self._type.itemsize, _COLOUR_TYPES[channels], 0, 0, 0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, 'wb')  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise self._refused(error) from None
        try:
            self._put(b'\x89PNG\r\n\x1a\n')
            self._chunk(b'IHDR', header)
        except QuantError:
            self._remove()
            raise

    def write(self, rows: np.ndarray) -> None:
        """Append (h, width) or (h, width, channels) pixels, RGB(A)."""
        if rows.shape[1:] != self._row or rows.dtype != self._type.newbyteorder('='):
            raise ValueError(f'rows of shape {rows.shape} and type {rows.dtype} do not fit {self._row}, {self._type}')
        lines = np.ascontiguousarray(rows, self._type).view(np.uint8).reshape(len(rows), -1)
        filtered = np.empty((len(rows), 1 + lines.shape[1]), np.uint8)
        filtered[:, 0] = _FILTER_SUB
        filtered[:, 1 : 1 + self._pixel] = lines[:, : self._pixel]
        np.subtract(lines[:, self._pixel :], lines[:, : -self._pixel], out=filtered[:, 1 + self._pixel :])
        self._written += len(rows)
        self._data(self._compressor.compress(filtered))  # type: ignore[arg-type]

    def __enter__(self) -> PngFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._remove()

    def _finish(self) -> None:
        if self._written != self._height:
            raise ValueError(f'{self.path}: {self._written} of {self._height} rows were written')
        self._data(self._compressor.flush())
        self._chunk(b'IEND', b'')
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._refused(error) from None

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def _data(self, content: bytes) -> None:
        if content:
            self._chunk(b'IDAT', content)

    def _chunk(self, kind: bytes, content: bytes) -> None:
        self._put(struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content)))

    def _put(self, content: bytes) -> None:
        try:
            self._file.write(content)
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> QuantError:
        return QuantError(f'{self.path} cannot be written: {error.strerror or error}')
