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
