// OpenAI's client for Node, as a child process of the tests. It reads one request per line, as JSON, and writes one
// answer per line.
import { createInterface } from "node:readline";
import OpenAI from "openai";

async function embed({ baseURL, apiKey, maxRetries, fields, headers }) {
  const client = new OpenAI({ baseURL, apiKey, maxRetries });
  try {
    const { data, response } = await client.embeddings.create(fields, { headers }).withResponse();
    return {
      embeddings: data.data.map((item) => item.embedding),
      headers: Object.fromEntries(response.headers),
      tokens: data.usage.total_tokens,
    };
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return { error: error.constructor.name, status: error.status, code: error.code };
  }
}

async function list({ baseURL, apiKey }) {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  return { models };
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  console.log(JSON.stringify(await (request.fields ? embed(request) : list(request))));
}
