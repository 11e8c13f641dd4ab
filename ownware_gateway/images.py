"""Which bytes are an image that models are shown: known by what they are, not by their name.

A provider refuses a whole conversation for one image that it cannot take, so what is said of bytes
by whoever made them does not count.
"""

import struct
from typing import Final, NamedTuple

#: The largest image: 5 MiB as base64, which is what the strictest provider takes
#: (https://docs.anthropic.com/en/docs/build-with-claude/vision).
IMAGE_BYTES_MAX: Final = 3_932_160

#: The longest side, from the same page.
SIDE_PX_MAX: Final = 8_000

_PNG: Final = b"\x89PNG\r\n\x1a\n"

#: Markers of a JPEG that are followed by its size (start of frame), of ITU-T T.81, table B.1.
_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})

#: How many segments of a JPEG are passed on the way to its frame.
_SEGMENTS_MAX: Final = 500


class Picture(NamedTuple):
    """What an image says of itself."""

    mime_type: str
    width_px: int
    height_px: int

    @property
    def can_be_shown(self) -> bool:
        """Whether its sides are of a length that every provider takes."""
        return 0 < self.width_px <= SIDE_PX_MAX and 0 < self.height_px <= SIDE_PX_MAX


def look(data: bytes) -> Picture | None:
    """Return what an image is: PNG, JPEG, GIF or WebP; None for anything else."""
    try:
        if data.startswith(_PNG) and data[12:16] == b"IHDR":
            return Picture("image/png", *struct.unpack(">II", data[16:24]))
        if data.startswith((b"GIF87a", b"GIF89a")):
            return Picture("image/gif", *struct.unpack("<HH", data[6:10]))
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return Picture("image/webp", *_webp(data))
        if data.startswith(b"\xff\xd8\xff"):
            return Picture("image/jpeg", *_jpeg(data))
    except (struct.error, IndexError, ValueError):
        # It begins like one and goes on as something else.
        pass
    return None


def shown_as_image(data: bytes) -> Picture | None:
    """Return what an image is if every provider takes it, None otherwise."""
    picture = look(data) if len(data) <= IMAGE_BYTES_MAX else None
    return picture if picture is not None and picture.can_be_shown else None


def _webp(data: bytes) -> tuple[int, int]:
    """https://developers.google.com/speed/webp/docs/riff_container ."""
    match data[12:16]:
        case b"VP8 ":
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            (bits,) = struct.unpack("<I", data[21:25])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            sides = data[24:30]
            return int.from_bytes(sides[:3], "little") + 1, int.from_bytes(sides[3:], "little") + 1
        case kind:
            raise ValueError(kind)


def _jpeg(data: bytes) -> tuple[int, int]:
    at = 2
    for _ in range(_SEGMENTS_MAX):
        while data[at + 1] == 0xFF:  # Segments may be filled up in front.
            at += 1
        if data[at] != 0xFF:
            break
        if data[at + 1] in _FRAMES:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        (length,) = struct.unpack(">H", data[at + 2 : at + 4])
        at += 2 + length
    raise ValueError(at)
