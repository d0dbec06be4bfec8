/**
 * The stream reader of the page, without a browser: `node --test tests/browser` (Debian's nodejs is enough).
 *
 * fetch() and the connection are real: a small server on loopback plays the daemon's good and bad days. Node has no
 * EventSource, so a stand-in raises the events that the HTML standard prescribes; test_page.py uses the real one.
 */
import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import http from 'node:http';
import { after, before, describe, it } from 'node:test';

// The page's modules end in .js for the web server's sake; by a data: address older versions of Node take them too.
const source = await readFile(new URL('../../examples/php-app/public/handoff-stream.js', import.meta.url));
const { SseParser, StreamError, answer, viaEventSource, viaFetch } = await import(
  `data:text/javascript;base64,${source.toString('base64')}`
);

it('is the same file in examples/js, where others copy it from', async () => {
  // No link: ansible-galaxy installs no collection that has one which leads to another directory.
  const copy = await readFile(new URL('../../examples/js/handoff-stream.js', import.meta.url));
  assert.ok(copy.equals(source), 'cp examples/php-app/public/handoff-stream.js examples/js/');
});

const parse = (...chunks) => {
  const parser = new SseParser();
  return chunks.flatMap((chunk) => parser.push(chunk));
};
const datas = (...chunks) => parse(...chunks).map((event) => event.data);

describe('SseParser', () => {
  const table = [
    ['one event', 'data: a\n\n', ['a']],
    ['two events', 'data: a\n\ndata: b\n\n', ['a', 'b']],
    ['CRLF', 'data: a\r\n\r\ndata: b\r\n\r\n', ['a', 'b']],
    ['CRLF inside an event', 'event: x\r\ndata: a\r\ndata: b\r\n\r\n', ['a\nb']],
    ['CR inside an event', 'data: a\rdata: b\r\r', ['a\nb']],
    ['CR', 'data: a\r\rdata: b\r\r', ['a', 'b']],
    ['mixed line ends', 'data: a\r\n\ndata: b\r\r\n', ['a', 'b']],
    ['several data lines', 'data: a\ndata: b\ndata\ndata:c\n\n', ['a\nb\n\nc']],
    ['only one space is taken away', 'data:  a \n\n', [' a ']],
    ['no space', 'data:a\n\n', ['a']],
    ['a colon in the value', 'data: a: b:c\n\n', ['a: b:c']],
    ['comments', ': ping\n\n:\ndata: a\n: in between\n\n', ['a']],
    ['an empty data line is an event', 'data:\n\n', ['']],
    ['a field without colon', 'data\n\n', ['']],
    ['no data, no event', 'event: x\n\nid: 1\n\n\n\n', []],
    ['unknown fields', 'datax: no\nDATA: no\n data: no\nfoo\ndata: a\n\n', ['a']],
    ['an event that is not closed is dropped', 'data: a\n\ndata: b\n', ['a']],
    ['no characters but these end a line', 'data: a\u2028b\u0085c\u000bd\n\n', ['a\u2028b\u0085c\u000bd']],
    ['nothing', '', []],
  ];
  for (const [name, text, expected] of table) {
    it(`${name}, whole`, () => assert.deepEqual(datas(text), expected));
    it(`${name}, cut at every place`, () => {
      for (let cut = 0; cut <= text.length; cut += 1) {
        assert.deepEqual(datas(text.slice(0, cut), text.slice(cut)), expected, `cut at ${cut}`);
      }
    });
    it(`${name}, character by character, with empty chunks`, () => {
      assert.deepEqual(datas(...[...text].flatMap((character) => [character, ''])), expected);
    });
  }

  it('names the event, and only that one', () => {
    const events = parse('event: error\ndata: a\n\ndata: b\n\nevent:\ndata: c\n\n');
    assert.deepEqual(events.map((event) => event.event), ['error', 'message', 'message']);
  });
  it('does not carry a name over from an event without data', () => {
    assert.equal(parse('event: x\n\ndata: a\n\n')[0].event, 'message');
  });
  it('keeps the last id, and ignores one with NUL', () => {
    const events = parse('id: 1\ndata: a\n\ndata: b\n\nid: 2\0\ndata: c\n\nid\ndata: d\n\n');
    assert.deepEqual(events.map((event) => event.id), ['1', '1', '1', '']);
  });
  it('passes retry on with the events behind it, and only once it was said', () => {
    const events = parse('data: a\n\nretry: 1500\ndata: b\n\ndata: c\n\n');
    assert.deepEqual(events.map((event) => event.retry), [undefined, 1500, 1500]);
    assert.equal('retry' in events[0], false);
  });
  it('takes retry only in digits', () => {
    const parser = new SseParser();
    for (const [value, expected] of [['x', null], ['-1', null], ['1.5', null], ['1500', 1500], ['', 1500], [' 7', 1500]]) {
      parser.push(`retry: ${value}\n`);
      assert.equal(parser.retry, expected, JSON.stringify(value));
    }
  });
  it('is not slow for many small chunks of one long line', () => {
    const begin = performance.now();
    const parser = new SseParser();
    parser.push('data: ');
    for (let count = 0; count < 2000; count += 1) parser.push('x'.repeat(32));
    assert.equal(parser.push('\n\n')[0].data.length, 64000);
    assert.ok(performance.now() - begin < 2000);
  });
});

async function collect(events, stopAfter = Infinity) {
  const seen = [];
  for await (const event of events) {
    seen.push(event);
    if (seen.length === stopAfter) break;
  }
  return seen;
}

async function rejection(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  return assert.fail('nothing was thrown');
}

describe('viaFetch', () => {
  let server;
  let base;
  let play; // what the server does with the next request
  before(async () => {
    server = http.createServer((request, response) => play(request, response));
    await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
    base = `http://127.0.0.1:${server.address().port}/`;
  });
  after(() => {
    server.closeAllConnections();
    server.close();
  });
  const sse = { 'Content-Type': 'text/event-stream; charset=utf-8', Connection: 'close' };
  const hungUp = (response) => new Promise((resolve) => response.on('close', resolve));

  it('puts characters together whose bytes arrive one by one', async (context) => {
    // On a real connection nobody can tell how bytes are gathered on the way, so this body is made up.
    const bytes = [...Buffer.from('\ufeff: hello\r\n\r\ndata: {"content":"é日🎉"}\r\n\r\ndata: [DONE]\r\n\r\n')];
    const body = new ReadableStream({
      pull(controller) {
        if (bytes.length === 0) controller.close();
        else controller.enqueue(Uint8Array.of(bytes.shift()));
      },
    });
    context.mock.method(globalThis, 'fetch', async () => new Response(body, { headers: sse }));
    assert.deepEqual(await collect(answer(viaFetch(base))), ['é日🎉']);
  });

  it('yields an event as soon as it is there, not when the stream is over', async () => {
    let proceed;
    play = (request, response) => {
      response.writeHead(200, sse);
      response.write('data: first\n\n');
      proceed = () => response.end('data: second\n\n');
    };
    const events = viaFetch(base);
    assert.equal((await events.next()).value.data, 'first');
    proceed(); // the server writes the second only now
    assert.equal((await events.next()).value.data, 'second');
    assert.equal((await events.next()).done, true);
  });

  it('sends what it is told and asks for an event stream', async () => {
    let seen;
    play = async (request, response) => {
      seen = { method: request.method, headers: request.headers, body: (await request.toArray()).join('') };
      response.writeHead(200, sse).end();
    };
    await collect(viaFetch(base, { method: 'POST', body: '{"prompt":"é"}', headers: { 'X-CSRF-Token': 't' } }));
    assert.equal(seen.method, 'POST');
    assert.equal(seen.body, '{"prompt":"é"}');
    assert.equal(seen.headers.accept, 'text/event-stream');
    assert.equal(seen.headers['x-csrf-token'], 't');
  });

  it('reports status, type, message and Retry-After of a refusal', async () => {
    play = (request, response) => {
      response.writeHead(503, { 'Content-Type': 'application/json', 'Retry-After': '7' });
      response.end('{"error":{"type":"daemon_gone","message":"Not now."}}');
    };
    const error = await rejection(collect(viaFetch(base)));
    assert.ok(error instanceof StreamError);
    const { kind, status, type, message, retryAfter } = error;
    assert.deepEqual([kind, status, type, message, retryAfter], ['http', 503, 'daemon_gone', 'Not now.', 7]);
  });

  for (const body of ['<h1>Service Unavailable</h1>', '', '{"error":', '[]', 'null', '{"error":"x"}']) {
    it(`reports a refusal whose body is ${JSON.stringify(body)}`, async () => {
      play = (request, response) => response.writeHead(503, { 'Content-Type': 'text/html' }).end(body);
      const error = await rejection(collect(viaFetch(base)));
      assert.deepEqual([error.kind, error.status, error.retryAfter], ['http', 503, 0]);
      assert.equal(error.message, 'The server answered 503 Service Unavailable.');
    });
  }

  it('does not take a refusal for an answer, whatever its type', async () => {
    play = (request, response) => response.writeHead(500, sse).end('data: x\n\n');
    const error = await rejection(collect(viaFetch(base)));
    assert.deepEqual([error.kind, error.status], ['http', 500]);
  });

  it('does not take a login page for an answer', async () => {
    play = (request, response) => response.writeHead(200, { 'Content-Type': 'text/html' }).end('data: x\n\n');
    assert.equal((await rejection(collect(viaFetch(base)))).kind, 'protocol');
  });

  it('tells when nobody listens', async () => {
    assert.equal((await rejection(collect(viaFetch('http://127.0.0.1:1/')))).kind, 'network');
  });

  it('tells when the connection is reset in the middle, after what has arrived', async () => {
    play = (request, response) => {
      response.writeHead(200, sse);
      response.write('data: {"content":"half"}\n\n', () => response.socket.resetAndDestroy());
    };
    const seen = [];
    const error = await rejection(
      (async () => {
        for await (const text of answer(viaFetch(base))) seen.push(text);
      })(),
    );
    assert.equal(error.kind, 'interrupted');
    assert.deepEqual(seen, ['half']);
  });

  it('tells when the stream ends tidily but without [DONE]', async () => {
    play = (request, response) => response.writeHead(200, sse).end('data: {"content":"half"}\n\n');
    assert.equal((await rejection(collect(answer(viaFetch(base))))).kind, 'interrupted');
  });

  it('hangs up when it is aborted, and throws the reason', async () => {
    let closed;
    play = (request, response) => {
      closed = hungUp(response);
      response.writeHead(200, sse);
      response.write('data: {"content":"x"}\n\n');
    };
    const controller = new AbortController();
    const pieces = answer(viaFetch(base, { signal: controller.signal }));
    assert.equal((await pieces.next()).value, 'x');
    const next = rejection(pieces.next());
    controller.abort();
    assert.equal(await next, controller.signal.reason);
    await closed;
  });

  it('can be aborted before the response has begun', async () => {
    const controller = new AbortController();
    play = () => controller.abort();
    assert.equal(await rejection(collect(viaFetch(base, { signal: controller.signal }))), controller.signal.reason);
  });

  it('hangs up when the consumer leaves, and after [DONE]', async () => {
    for (const read of [() => collect(viaFetch(base), 1), () => collect(answer(viaFetch(base)))]) {
      let closed;
      play = (request, response) => {
        closed = hungUp(response);
        response.writeHead(200, sse);
        response.write('data: [DONE]\n\n'); // and leaves the connection open
      };
      await read();
      await closed;
    }
  });
});

describe('answer', () => {
  async function* from(...events) {
    for (const event of events) yield { event: 'message', id: '', ...event };
  }
  const done = { data: '[DONE]' };

  it('yields the pieces up to [DONE] and nothing after it', async () => {
    const events = from({ data: '{"content":"a"}' }, { data: '{"content":""}' }, done, { data: '{"content":"b"}' });
    assert.deepEqual(await collect(answer(events)), ['a', '']);
  });
  it('passes over kinds of events that it does not know', async () => {
    assert.deepEqual(await collect(answer(from({ event: 'usage', data: '{}' }, done))), []);
  });
  it('throws what the daemon reports', async () => {
    const error = await rejection(
      collect(answer(from({ event: 'error', data: '{"error":{"type":"backend_timeout","message":"Too slow."}}' }))),
    );
    assert.deepEqual([error.kind, error.type, error.message], ['backend', 'backend_timeout', 'Too slow.']);
  });
  for (const data of ['', 'x', 'null', '{}', '[]', '"x"', '{"error":null}']) {
    it(`survives an error event with ${JSON.stringify(data)}`, async () => {
      const error = await rejection(collect(answer(from({ event: 'error', data }))));
      assert.deepEqual([error.kind, error.message], ['backend', 'The daemon reported an error.']);
    });
    it(`refuses a message with ${JSON.stringify(data)}`, async () => {
      assert.equal((await rejection(collect(answer(from({ data }))))).kind, 'protocol');
    });
  }
});

describe('viaEventSource', () => {
  /** Raises what it is told to; `close()` is final, as in the standard. */
  class StandIn extends EventTarget {
    static last;
    closed = false;
    constructor(url) {
      super();
      this.url = url;
      StandIn.last = this;
    }
    close() {
      this.closed = true;
    }
    open() {
      this.dispatchEvent(new Event('open'));
    }
    say(data, type = 'message') {
      if (!this.closed) this.dispatchEvent(Object.assign(new Event(type), { data, lastEventId: '' }));
    }
    fail() {
      if (!this.closed) this.dispatchEvent(new Event('error'));
    }
  }
  before(() => (globalThis.EventSource = StandIn));
  after(() => delete globalThis.EventSource);

  /** Starts reading, so that the source exists. */
  function reading(options) {
    const pieces = collect(answer(viaEventSource('/stream.php?prompt=x', options)));
    pieces.catch(() => {});
    return { pieces, source: StandIn.last };
  }

  it('yields pieces and closes at [DONE], before the browser can take the end for a failure', async () => {
    const { pieces, source } = reading();
    source.open();
    source.say('{"content":"a"}');
    source.say('{"content":"b"}');
    source.say('[DONE]');
    assert.ok(source.closed, 'closed in the same task as the message');
    source.fail();
    assert.deepEqual(await pieces, ['a', 'b']);
  });
  it("tells the daemon's error event from the browser's", async () => {
    const { pieces, source } = reading();
    source.open();
    source.say('{"error":{"type":"t","message":"Sorry."}}', 'error');
    const error = await rejection(pieces);
    assert.deepEqual([error.kind, error.message, source.closed], ['backend', 'Sorry.', true]);
  });
  it('does not reconnect when the connection breaks in the middle', async () => {
    const { pieces, source } = reading();
    source.open();
    source.say('{"content":"a"}');
    source.fail();
    assert.ok(source.closed);
    assert.equal((await rejection(pieces)).kind, 'interrupted');
  });
  it('does not try again when it is refused', async () => {
    const { pieces, source } = reading();
    source.fail();
    assert.ok(source.closed);
    assert.equal((await rejection(pieces)).kind, 'refused');
  });
  it('closes when it is aborted, and throws the reason', async () => {
    const controller = new AbortController();
    const { pieces, source } = reading({ signal: controller.signal });
    source.open();
    controller.abort();
    assert.equal(await rejection(pieces), controller.signal.reason);
    assert.ok(source.closed);
  });
  for (const reason of ['the user left', null, 0, { content: 'no event' }]) {
    it(`ends when it is aborted with ${JSON.stringify(reason)}, and throws that`, { timeout: 60_000 }, async () => {
      const controller = new AbortController();
      const events = viaEventSource('/stream.php', { signal: controller.signal });
      const next = rejection(events.next());
      controller.abort(reason);
      assert.equal(await next, reason);
      assert.ok(StandIn.last.closed);
    });
  }
  it('ends behind [DONE] for who reads the events themselves', { timeout: 60_000 }, async () => {
    const events = collect(viaEventSource('/stream.php'));
    StandIn.last.open();
    StandIn.last.say('{"content":"a"}');
    StandIn.last.say('[DONE]');
    assert.deepEqual((await events).map((event) => event.data), ['{"content":"a"}', '[DONE]']);
  });
  it('does not connect at all when it was aborted before', async () => {
    StandIn.last = undefined;
    const { pieces, source } = reading({ signal: AbortSignal.abort() });
    await rejection(pieces);
    assert.equal(source, undefined);
  });
  it('closes when the consumer leaves', async () => {
    const events = viaEventSource('/stream.php');
    const first = events.next();
    StandIn.last.say('x');
    await first;
    await events.return();
    assert.ok(StandIn.last.closed);
  });
});
