"""Models that cannot see: what they are asked without the images of tools' results.

Which models take images is known of few, and a conversation holds what its tools have given back: a
model that refuses an image would refuse every request from there on. So it is asked again without.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from ownware_gateway.models import Message, Model, ModelError, Part, Request, ToolTurn

#: Text models that are asked without at once; the maker's name may stand before theirs.
_BLIND: Final = re.compile(
    r"(?:.*/)?(?:gpt-3\.5|gpt-4(?:-0\d{3}|-32k|$)|gpt-oss|o1-mini|o3-mini|codestral"
    r"|deepseek-(?:chat|reasoner|coder|r1|v3)|qwen3-coder)"
)

#: What a refusal of images says, in the words of any of the servers.
_REFUSED: Final = re.compile(r"image|vision|multi-?modal|modalit|mmproj", re.IGNORECASE)

NOT_SEEN: Final = "\n[Its images cannot be shown to this model.]"


class Seeing:
    """A model that is not shown what it cannot see."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def stream(self, request: Request) -> AsyncIterator[Sequence[Part]]:
        """Ask the model; see `Model.stream`."""
        if not any(isinstance(turn, ToolTurn) and turn.images for turn in request.messages):
            return self.model.stream(request)
        if _BLIND.match(request.model):
            return self.model.stream(without_images(request))
        return self._stream(request)

    def unable(self, request: Request) -> Sequence[str]:
        """Return what the model will not honour; see `Model.unable`."""
        return self.model.unable(request)

    async def _stream(self, request: Request) -> AsyncGenerator[Sequence[Part], None]:
        try:
            async with aclosing(self.model.stream(request)) as batches:  # type: ignore[type-var]
                async for batch in batches:
                    yield batch
                return
        except ModelError as error:
            # Refused before anything else. It is not remembered: one image may be what is wrong.
            if error.retry in ("rate_limit", "connection") or not _REFUSED.search(error.message):
                raise
        stream = self.model.stream(without_images(request))
        async with aclosing(stream) as batches:  # type: ignore[type-var]
            async for batch in batches:
                yield batch


def without_images(request: Request) -> Request:
    """Return the request with a sentence in place of the images of each result."""
    return replace(request, messages=[_without(turn) for turn in request.messages])


def _without(turn: Message) -> Message:
    if isinstance(turn, ToolTurn) and turn.images:
        return replace(turn, text=turn.text + NOT_SEEN, images=())
    return turn
