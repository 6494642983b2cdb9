// What the page asks of the service. The key is a variable and nothing else: no cookie, no storage.

let key = "";
const refusedListeners = [];

export const useKey = (text) => { key = text.trim(); };
export const onRefused = (listener) => refusedListeners.push(listener);

export class Refused extends Error {
  constructor(status, body) {
    super(body?.error ?? `the service answered ${status}`);
    this.status = status;
    this.body = body;
  }
}

async function fetched(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key) headers.set("authorization", `Bearer ${key}`);
  const reply = await fetch(path, { ...options, headers, cache: "no-store" });
  if (reply.ok) return reply;
  const refused = new Refused(reply.status, await reply.json().catch(() => null));
  if (reply.status === 401) refusedListeners.forEach((listener) => listener(refused));
  throw refused;
}

export const get = async (path) => (await fetched(path)).json();

export const post = async (path, body) =>
  (await fetched(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) })).json();

/** One prediction: the answer, and the milliseconds that it took as seen from here. Without a variant the split decides. */
export async function predict({ type, body }, variant) {
  const headers = { ...(type ? { "content-type": type } : {}), ...(variant ? { "x-variant": variant } : {}) };
  const began = performance.now();
  const answer = await (await fetched("v1/predict", { method: "POST", headers, body })).json();
  return { answer, ms: performance.now() - began };
}

/** Server-sent events, read by fetch, as an EventSource sends no key. Ends when the stream does. */
export async function listen(path, each) {
  const reader = (await fetched(path)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) each(JSON.parse(event.slice("data: ".length)));
  }
}
