"""Small images, made here."""

import struct
import zlib


def png(width: int = 2, height: int = 3, filler: int = 0) -> bytes:
    """Return a PNG; `filler` bytes of a comment make it as large as a test wants it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (width + 1) * height)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", header),
            *([chunk(b"tEXt", b"Comment\0" + b"x" * filler)] if filler else []),
            chunk(b"IDAT", rows),
            chunk(b"IEND", b""),
        ]
    )


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0;"


def jpeg(width: int, height: int, frame: int = 0xC2) -> bytes:
    """Return the beginning of a JPEG, with a segment and a filler before its frame."""
    segment = b"\xff\xe0" + struct.pack(">H", 16) + b"JFIF\0" + b"\0" * 9
    size = struct.pack(">BHHB", 8, height, width, 3) + b"\0" * 9
    return b"\xff\xd8" + segment + b"\xff\xff" + bytes([frame]) + struct.pack(">H", 17) + size


def webp(kind: str, width: int, height: int) -> bytes:
    match kind:
        case "VP8 ":
            body = b"\0" * 3 + b"\x9d\x01\x2a" + struct.pack("<HH", width | 0x4000, height)
        case "VP8L":
            body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14 | 1 << 28)
        case _:
            sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
            body = b"\0" * 4 + sides
    chunk = kind.encode() + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk
