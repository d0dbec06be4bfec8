/**
 * Reads a stream of server-sent events, by fetch() or by EventSource, and the answer that is in it.
 *
 *   for await (const text of answer(viaFetch('/stream.php', { method: 'POST', body, headers, signal }))) show(text);
 *
 * Both sources are async generators of { event, data, id }; by fetch() with `retry` (milliseconds) once the server has
 * said it. They end when the server ends the stream, throw the signal's reason when it is aborted, and throw a
 * StreamError for everything else. Leaving the loop closes the connection. Nothing here reconnects: asking again would be
 * a new question, so that is for the user to decide; an answer that can be continued is for handoff-resume.js
 * (examples/js).
 */

/** `kind`: 'network' no connection · 'http' answered with `status` · 'refused' not a stream, and EventSource does not say
 *  why · 'interrupted' ended early · 'backend' the daemon reported an error · 'protocol' not what we expected. */
export class StreamError extends Error {
  constructor(kind, message, details = {}) {
    super(message, details);
    this.name = 'StreamError';
    this.kind = kind;
    this.status = details.status ?? 0;
    this.type = details.type ?? '';
    this.retryAfter = details.retryAfter ?? 0; // seconds
  }
}

/** Text in, events out; the rules: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream */
export class SseParser {
  lastEventId = '';
  retry = null; // milliseconds, if the server ever sent one
  #line = ''; // what has arrived of the next line
  #endedInCr = false; // an LF at the start of the next chunk belongs to the CR at the end of this one
  #data = [];
  #event = '';

  push(text) {
    if (text === '') return [];
    if (this.#endedInCr && text[0] === '\n') text = text.slice(1);
    this.#endedInCr = text.endsWith('\r');
    const lines = (this.#line + text).split(/\r\n|\n|\r/);
    this.#line = lines.pop();
    return lines.map((line) => this.#take(line)).filter((event) => event !== null);
  }

  #take(line) {
    if (line === '') return this.#dispatch();
    const colon = line.indexOf(':');
    // A comment, such as the daemon's heartbeat, is a field without a name.
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? '' : line.slice(line[colon + 1] === ' ' ? colon + 2 : colon + 1);
    if (field === 'data') this.#data.push(value);
    else if (field === 'event') this.#event = value;
    else if (field === 'id' && !value.includes('\0')) this.lastEventId = value;
    else if (field === 'retry' && /^[0-9]+$/.test(value)) this.retry = Number(value);
    return null;
  }

  #dispatch() {
    const event = { event: this.#event || 'message', data: this.#data.join('\n'), id: this.lastEventId };
    if (this.retry !== null) event.retry = this.retry;
    const empty = this.#data.length === 0;
    this.#data = [];
    this.#event = '';
    return empty ? null : event;
  }
}

export async function* viaFetch(url, options = {}) {
  const headers = new Headers(options.headers);
  headers.set('Accept', 'text/event-stream');
  let response;
  try {
    response = await fetch(url, { cache: 'no-store', ...options, headers });
  } catch (cause) {
    if (options.signal?.aborted) throw options.signal.reason;
    throw new StreamError('network', 'The server cannot be reached.', { cause });
  }
  if (!response.ok || !/^text\/event-stream\b/i.test(response.headers.get('Content-Type') ?? '')) {
    throw await httpError(response);
  }
  const reader = response.body.getReader();
  const decoder = new TextDecoder(); // keeps the bytes of a character that a chunk border has cut
  const parser = new SseParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return; // an event without its closing blank line is incomplete, and is dropped
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } catch (cause) {
    if (options.signal?.aborted) throw options.signal.reason;
    throw new StreamError('interrupted', 'The connection broke.', { cause });
  } finally {
    reader.cancel().catch(() => {}); // hangs up if the consumer left early; after a failure there is nothing to cancel
  }
}

async function httpError(response) {
  const body = await response.json().catch(() => null); // Apache's own error pages are HTML
  const message = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim() + '.';
  return new StreamError(response.ok ? 'protocol' : 'http', message, {
    status: response.status,
    type: body?.error?.type,
    retryAfter: Number.parseInt(response.headers.get('Retry-After') ?? '', 10) || 0,
  });
}

export async function* viaEventSource(url, { signal } = {}) {
  signal?.throwIfAborted();
  const source = new EventSource(url);
  const queue = [];
  let wake = () => {};
  let opened = false;
  const put = (item) => {
    queue.push(item);
    wake();
  };
  const abort = () => put({ thrown: signal.reason }); // which may be anything, also undefined
  signal?.addEventListener('abort', abort);
  source.addEventListener('open', () => (opened = true));
  source.addEventListener('message', (message) => {
    // The daemon hangs up after this one. EventSource would take that for a failure and ask the question again.
    if (message.data === '[DONE]') source.close();
    put({ event: 'message', data: message.data, id: message.lastEventId });
  });
  source.addEventListener('error', (failure) => {
    source.close(); // both kinds: else it reconnects for ever
    // The server's "event: error" and the browser's own error have the same name; only the first carries data.
    if (typeof failure.data === 'string') put({ event: 'error', data: failure.data, id: failure.lastEventId });
    else if (opened) put({ thrown: new StreamError('interrupted', 'The connection broke.') });
    else put({ thrown: new StreamError('refused', 'The server did not answer with a stream.') });
  });
  try {
    for (;;) {
      while (queue.length === 0) await new Promise((resolve) => (wake = resolve));
      const item = queue.shift();
      if ('thrown' in item) throw item.thrown;
      yield item;
      if (item.data === '[DONE]') return; // closed above: nothing comes any more, not even an error
    }
  } finally {
    source.close();
    signal?.removeEventListener('abort', abort);
  }
}

/** The pieces of text in a stream of events; throws if the stream ends before `[DONE]`. */
export async function* answer(events) {
  for await (const { event, data } of events) {
    if (event === 'error') {
      const error = parse(data)?.error;
      throw new StreamError('backend', error?.message ?? 'The daemon reported an error.', { type: error?.type });
    }
    if (event !== 'message') continue; // a kind of event that this version does not know
    if (data === '[DONE]') return;
    const content = parse(data)?.content;
    if (typeof content !== 'string') throw new StreamError('protocol', 'The stream is not in the expected format.');
    yield content;
  }
  throw new StreamError('interrupted', 'The connection ended before the answer was complete.');
}

function parse(json) {
  try {
    return JSON.parse(json);
  } catch {
    return null;
  }
}
