"""What an image is, by its bytes."""

import pytest

from ownware_gateway.images import IMAGE_BYTES_MAX, SIDE_PX_MAX, Picture, look, shown_as_image
from tests.pictures import gif, jpeg, png, webp

IMAGES = {
    "image/png": png(300, 7),
    "image/gif": gif(300, 7),
    "image/jpeg": jpeg(300, 7),
    "image/webp": webp("VP8 ", 300, 7),
}


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        *((data, kind) for kind, data in IMAGES.items()),
        (jpeg(300, 7, 0xC0), "image/jpeg"),
        (webp("VP8L", 300, 7), "image/webp"),
        (webp("VP8X", 300, 7), "image/webp"),
    ],
)
def test_an_image_is_known_with_its_size_by_its_bytes(data: bytes, kind: str) -> None:
    assert look(data) == Picture(kind, 300, 7)
    assert shown_as_image(data) is not None


@pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES)
def test_what_only_begins_like_an_image_is_none(data: bytes) -> None:
    for length in range(10):
        assert look(data[:length]) is None
    for length in range(10, len(data)):
        look(data[:length])
    assert look(data[:8].ljust(100, b"z")) is None or data[:3] == b"GIF"


@pytest.mark.parametrize(
    "data",
    [b"", b"hello!", b"<svg/>", b"%PDF-1.7", b"\xff\xd8\xff\xe0\0\2" + b"\xff\xe0\0\2" * 900],
)
def test_anything_else_is_no_image(data: bytes) -> None:
    assert look(data) is None


def test_an_image_that_a_provider_would_refuse_is_not_shown() -> None:
    assert shown_as_image(png(SIDE_PX_MAX, 1)) is not None
    assert shown_as_image(png(SIDE_PX_MAX + 1, 1)) is None
    assert shown_as_image(gif(0, 1)) is None
    fits = png(filler=IMAGE_BYTES_MAX - 100)
    assert shown_as_image(fits) is not None
    assert shown_as_image(png(filler=IMAGE_BYTES_MAX)) is None
