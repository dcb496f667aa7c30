// The public wire, as any other client would use it.

export class WireError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new WireError(response.status, body?.error?.message ?? `The server answered ${response.status}.`);
}

export async function get(path, key) {
  return (await checked(await fetch(path, { headers: headers(key) }))).json();
}

// Calls told(chunk) for every chunk of a streamed answer; an error in the stream is thrown.
export async function stream(body, key, signal, told) {
  const sent = { method: "POST", headers: headers(key), body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await checked(await fetch("/v1/chat/completions", sent));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new WireError(0, "The stream broke off.");
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new WireError(0, chunk.error.message);
      told(chunk);
    }
  }
}
