"""What the header of a PNG file says, without decoding the image."""

from __future__ import annotations

from dataclasses import dataclass

_MAGIC = b'\x89PNG\r\n\x1a\n'
_GRAY = (0, 4)  # without and with an alpha channel


@dataclass(frozen=True)
class PngHeader:
    """Bits of a sample (1 to 16), and whether there is one sample a pixel."""

    bits: int
    is_gray: bool


def png_header(path: str) -> PngHeader | None:
    """The header of a PNG file; None for any other file, or where there is none (a key in a database)."""
    try:
        with open(path, 'rb') as file:
            start = file.read(26)
    except OSError:
        return None
    if len(start) < 26 or not start.startswith(_MAGIC):
        return None
    return PngHeader(start[24], start[25] in _GRAY)
