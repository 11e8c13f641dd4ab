"""Texts as vectors: `/embeddings`, as OpenAI has it and most other servers too.

The format is https://platform.openai.com/docs/api-reference/embeddings.
"""

from collections.abc import Sequence
from typing import Any

from ownware_gateway.models import Embedded, ModelError
from ownware_gateway.models.http import Endpoint, Pool, reported


async def embed(
    pool: Pool, endpoint: Endpoint, model: str, texts: Sequence[Any], dimensions: int | None
) -> Embedded:
    """Return the texts as vectors, in their order. Raises ModelError."""
    body: dict[str, Any] = {"model": model, "input": list(texts), "encoding_format": "float"}
    if dimensions is not None:
        body["dimensions"] = dimensions
    answer = await pool.ask(endpoint, body)
    if isinstance(answer, dict) and answer.get("error"):
        raise reported(endpoint, answer["error"])
    try:
        items = sorted(answer["data"], key=lambda item: item.get("index", 0))
        vectors = [[float(number) for number in item["embedding"]] for item in items]
        tokens = (answer.get("usage") or {}).get("prompt_tokens") or 0
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        message = f"{endpoint.provider} sent something that is no list of vectors."
        raise ModelError(message) from error
    if len(vectors) != len(texts):
        raise ModelError(f"{endpoint.provider} sent {len(vectors)} vectors for {len(texts)} texts.")
    return Embedded(model, vectors, tokens)
