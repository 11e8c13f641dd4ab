// The official client for Node. Prints what it saw as JSON.
import assert from "node:assert/strict";
import OpenAI, { NotFoundError } from "openai";
import { VERSION } from "openai/version";

const client = new OpenAI({ baseURL: `${process.env.GATEWAY}/v1`, apiKey: "unused", maxRetries: 0 });
const ask = (text, more = {}) =>
  client.chat.completions.create({
    model: "assistant",
    messages: [{ role: "user", content: text }],
    ...more,
  });

const answer = await ask("one two");
assert.equal(answer.choices[0].message.content, "one two");
assert.equal(answer.usage.total_tokens, 15);

let text = "";
for await (const chunk of await ask("one two three", { stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
}
assert.equal(text, "one two three");

const stream = client.chat.completions.stream({
  model: "assistant",
  messages: [{ role: "user", content: "one two" }],
});
assert.equal(await stream.finalContent(), "one two");

const { response } = await ask("one").withResponse();
assert.match(response.headers.get("x-run-id"), /^run_/);

const weather = ({ city }) => `sunny in ${city}`;
const parameters = { type: "object", properties: { city: { type: "string" } } };
const said = { model: "assistant", messages: [{ role: "user", content: "CALL" }] };
for (const more of [{}, { stream: true }]) {
  const runner = client.chat.completions.runTools({
    ...said,
    ...more,
    tools: [
      {
        type: "function",
        function: { name: "weather", parse: JSON.parse, function: weather, parameters },
      },
    ],
  });
  assert.equal(await runner.finalContent(), "sunny in Rome and sunny in Oslo");
}

const first = await client.responses.create({ model: "assistant", input: "one two" });
assert.equal(first.output_text, "one two");
const events = [];
for await (const event of await client.responses.create({
  model: "assistant",
  input: "three",
  previous_response_id: first.id,
  stream: true,
})) {
  events.push(event);
}
assert.equal(events.at(-1).response.output_text ?? "three", "three");
const rest = [];
for await (const event of await client.responses.retrieve(events[0].response.id, {
  stream: true,
  starting_after: 2,
})) {
  rest.push(event);
}
assert.deepEqual(rest, events.slice(3));

const tools = [{ type: "function", name: "weather", parameters, strict: false }];
const wants = await client.responses
  .stream({ model: "assistant", input: "CALL", tools })
  .finalResponse();
const input = wants.output
  .filter((item) => item.type === "function_call")
  .map((call) => ({
    type: "function_call_output",
    call_id: call.call_id,
    output: weather(JSON.parse(call.arguments)),
  }));
const done = await client.responses.create({
  model: "assistant",
  input,
  previous_response_id: wants.id,
  tools,
});
assert.equal(done.output_text, "sunny in Rome and sunny in Oslo");

const models = await client.models.list();
assert.equal(models.data[0].id, "assistant");
assert.equal((await client.models.retrieve("openai:a/b:c")).id, "openai:a/b:c");

const made = await client.embeddings.create({ model: "openai:embed", input: ["four"] });
assert.deepEqual(made.data[0].embedding, [4, 0.5]);

await assert.rejects(ask("x", { model: "nobody" }), NotFoundError);
await assert.rejects(async () => {
  for await (const _ of await ask("FAIL", { stream: true }));
}, /no such thing/);

console.log(JSON.stringify({ client: `openai for Node ${VERSION}` }));
