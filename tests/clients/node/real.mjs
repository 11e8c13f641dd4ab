// The official client for Node talks to a real model. Prints who it is as JSON.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { VERSION } from "openai/version";

const client = new OpenAI({ baseURL: `${process.env.GATEWAY}/v1`, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "Count to ten." }];
const stream = client.chat.completions.stream({ model: "brief", messages });
let pieces = 0;
stream.on("content", () => (pieces += 1));
assert.ok((await stream.finalContent()).length > 3);
assert.ok(pieces > 3);
const response = await client.responses.create({ model: "brief", input: "Count to ten." });
assert.ok(response.output_text.length > 3);
console.log(JSON.stringify({ client: `openai for Node ${VERSION}` }));
