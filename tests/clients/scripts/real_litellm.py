"""LiteLLM talks to a real model. Prints who it is as JSON."""

import json
import os
from importlib.metadata import version

import litellm

ASK = {
    "model": "openai/brief",
    "api_base": os.environ["GATEWAY"] + "/v1",
    "api_key": "unused",
    "messages": [{"role": "user", "content": "Count to ten."}],
}
assert litellm.completion(**ASK).choices[0].message.content
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **ASK)]
assert len(pieces) > 3, pieces
print(json.dumps({"client": f"litellm {version('litellm')}"}))
