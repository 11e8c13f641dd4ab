#!/usr/bin/env node
// A complete chat client for the gateway: Node 18 or newer, nothing to install.
//
//   node examples/chat.mjs [--model provider:model]
//
// OWNWARE_GATEWAY is the gateway's address, OWNWARE_GATEWAY_TOKEN its token (where it wants one),
// OWNWARE_PROFILE the agent to talk to, OWNWARE_MODEL the model that answers.

import readline from "node:readline";

const gateway = (process.env.OWNWARE_GATEWAY ?? "http://localhost:3011").replace(/\/$/, "");
const profileId = process.env.OWNWARE_PROFILE ?? "assistant";
const token = process.env.OWNWARE_GATEWAY_TOKEN;
const flag = process.argv.indexOf("--model");
const RETRIES_MAX = 20; // connections in a row that bring nothing new

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const reason = (error) => error.cause?.message || error.cause?.code || error.message;
const headers = { "Content-Type": "application/json" };
if (token) headers.Authorization = `Bearer ${token}`;

async function ask(path, body) {
  const method = body ? "POST" : "GET";
  const response = await fetch(`${gateway}/api/v1${path}`, {
    method, headers, body: body && JSON.stringify(body),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.message ?? `the gateway answers ${response.status}`);
  return answer;
}

// Lines from a person at a terminal, or from a pipe; undefined at their end.
const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
async function read(prompt) {
  process.stdout.write(prompt);
  return (await lines.next()).value;
}

// The frames of one response: fields separated by line ends, frames by an empty line.
async function* frames(response) {
  let text = "";
  for await (const bytes of response.body.pipeThrough(new TextDecoderStream())) {
    text += bytes;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:"));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
    }
  }
}

// Follow a thread from `seq` to the end of its run, through cut connections and restarts.
async function follow(threadId, seq) {
  let why = "the stream was cut off";
  for (let failures = 0; failures < RETRIES_MAX; failures++) {
    let pause = Math.min(100 * 2 ** failures, 10_000);
    try {
      const url = `${gateway}/api/v1/threads/${threadId}/agents/root/events?since=${seq}`;
      const response = await fetch(url, { headers: { ...headers, Accept: "text/event-stream" } });
      if (response.status >= 500) throw new Error(`the gateway answers ${response.status}`);
      if (!response.ok) return console.error(`\n[${(await response.json()).message}]`);
      for await (const event of frames(response)) {
        if (event.type === "stream.shutdown") pause = event.retryAfterMs;
        if (!(event.seq > seq)) continue; // about the stream itself, or seen before
        seq = event.seq;
        failures = 0;
        await show(event, threadId);
        if (event.type === "session.end") return;
      }
    } catch (error) {
      why = reason(error);
    }
    await sleep(pause);
  }
  throw new Error(why);
}

async function show(event, threadId) {
  if (event.type === "text.delta") process.stdout.write(event.text);
  if (event.type === "tool.call.execute") console.log(`\n[${event.toolName}]`);
  if (event.type === "agent.spawn") console.log(`[${event.name} begins: ${event.task}]`);
  if (event.type === "agent.complete") console.log(`[an agent has ended: ${event.status}]`);
  if (event.content) console.log(`[${event.content.map((part) => part.mimeType ?? part.kind)}]`);
  if (event.type === "error") console.error(`\n[${event.code}: ${event.message}]`);
  if (event.type === "question.request") return answer(event, threadId);
  if (event.type !== "permission.request") return;
  console.log(`\n${event.toolName} wants to run with ${JSON.stringify(event.input, null, 2)}`);
  const said = (await read("Allow it? [y]es / [n]o / [a]lways: "))?.trim().toLowerCase()[0];
  const action = { y: "approve", a: "always" }[said] ?? "deny";
  await resume(threadId, { action, requestId: event.requestId });
}

// A question of the agent's own: options can be chosen by their numbers, and any text is an answer.
async function answer(event, threadId) {
  const options = event.options ?? [];
  console.log(`\n${[event.question, ...options.map((text, i) => `  ${i + 1}. ${text}`)].join("\n")}`);
  const line = (await read("Answer (an empty line declines): "))?.trim();
  const numbers = event.multiple ? line?.split(/[\s,]+/) : [line];
  const chosen = numbers?.map((number) => options[number - 1]);
  const said = chosen?.every(Boolean) ? chosen.join(", ") : line;
  const words = said ? { action: "answer", answer: said } : { action: "deny" };
  await resume(threadId, { ...words, requestId: event.requestId });
}

async function resume(threadId, body) {
  // Someone else may have answered meanwhile: that is not an error of this chat.
  await ask(`/threads/${threadId}/resume`, body).catch((error) => console.error(error.message));
}

async function main() {
  const models = await ask("/models");
  const usable = models.find((model) => model.hasCredentials);
  const model = (flag > 0 && process.argv[flag + 1]) || process.env.OWNWARE_MODEL || usable?.id;
  if (!model) throw new Error("no model is usable: set a provider's key");
  console.log(`Talking to ${profileId} (${model}). Ctrl-D ends.`);
  let threadId; // one conversation: the first answer names it
  for (let prompt; (prompt = await read("\n> ")) !== undefined; ) {
    if (!prompt.trim()) continue;
    const run = await ask("/run", { profileId, prompt, model, threadId });
    threadId = run.threadId;
    await follow(threadId, run.startSeq);
    console.log();
  }
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(`${gateway}: ${reason(error)}`);
    process.exit(1);
  },
);
