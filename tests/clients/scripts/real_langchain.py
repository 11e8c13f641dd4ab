"""LangChain talks to a real model. Prints who it is as JSON."""

import json
import os
from importlib.metadata import version

from langchain_openai import ChatOpenAI

URL = os.environ["GATEWAY"] + "/v1"
for responses in (False, True):
    chat = ChatOpenAI(
        base_url=URL,
        api_key="unused",
        model="brief",
        use_responses_api=responses,
        stream_usage=True,
    )
    answer = chat.invoke("Count to ten.")
    assert answer.text and answer.usage_metadata["output_tokens"] > 3, answer
    pieces = [chunk.text for chunk in chat.stream("Count to ten.")]
    assert len(pieces) > 3, pieces
print(json.dumps({"client": f"langchain-openai {version('langchain-openai')}"}))
