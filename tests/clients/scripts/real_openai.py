"""The official Python client talks to a real model through both APIs. Prints who it is as JSON."""

import json
import os

import openai

client = openai.OpenAI(base_url=os.environ["GATEWAY"] + "/v1", api_key="unused", max_retries=0)

answer = client.chat.completions.create(
    model="brief", messages=[{"role": "user", "content": "Count to ten."}]
)
assert answer.choices[0].message.content, answer
assert answer.usage is not None and answer.usage.completion_tokens > 3
with client.chat.completions.stream(
    model="brief", messages=[{"role": "user", "content": "Count to ten."}]
) as stream:
    deltas = [event.delta for event in stream if event.type == "content.delta"]
    # Its last word is cut off by the profile's limit, of which the client makes an error.
    snapshot = stream.current_completion_snapshot
    assert snapshot.choices[0].message.content == "".join(deltas)
assert len(deltas) > 3, deltas

events = list(client.responses.create(model="brief", input="Count to ten.", stream=True))
last = events[-1]
assert last.type in ("response.completed", "response.incomplete"), last
texts = [event.delta for event in events if event.type == "response.output_text.delta"]
assert last.response.output_text == "".join(texts)
rest = client.responses.retrieve(last.response.id, stream=True, starting_after=3)
assert list(rest) == events[4:]
print(json.dumps({"client": f"openai {openai.__version__}"}))
