/** examples/js/handoff-resume.js without a browser; the daemon's side of it is tests/examples/test_browser.py. */
import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { describe, it } from 'node:test';

// As in handoff-stream.test.mjs: by a data: address, because the modules end in .js.
const load = async (path) => {
  const source = await readFile(new URL(`../../examples/${path}`, import.meta.url));
  return import(`data:text/javascript;base64,${source.toString('base64')}`);
};
const { StreamError, answer } = await load('php-app/public/handoff-stream.js');
const { resuming } = await load('js/handoff-resume.js');

const piece = (id, retry) => ({
  event: 'message',
  data: JSON.stringify({ content: id }),
  id,
  ...(retry === undefined ? {} : { retry }),
});
const done = (id) => ({ event: 'message', data: '[DONE]', id });
const broken = () => new StreamError('interrupted', 'The connection broke.');

/** A source per connection: its events, and then the error where there is one. */
function playing(...connections) {
  const asked = [];
  const open = async function* (after) {
    asked.push(after);
    const [events, error] = connections[Math.min(asked.length, connections.length) - 1];
    yield* events;
    if (error) throw error;
  };
  return { asked, open };
}

async function collect(source) {
  const seen = [];
  for await (const one of source) seen.push(one);
  return seen;
}

describe('resuming', () => {
  it('asks once where nothing breaks', async () => {
    const { asked, open } = playing([[piece('1'), done('2')]]);
    assert.deepEqual(await collect(answer(resuming(open))), ['1']);
    assert.deepEqual(asked, ['']);
  });
  it('goes on behind the last event, after a broken connection and after one that ended', async () => {
    const { asked, open } = playing([[piece('1'), piece('2')], broken()], [[piece('3')]], [[piece('4'), done('5')]]);
    assert.deepEqual(await collect(answer(resuming(open, { pause: 1 }))), ['1', '2', '3', '4']);
    assert.deepEqual(asked, ['', '2', '3']);
  });
  it('does not ask again where the answer has no name, or nothing of it came', async () => {
    for (const events of [[], [piece('')]]) {
      const cut = playing([events, broken()]);
      await assert.rejects(collect(resuming(cut.open, { pause: 1 })), { kind: 'interrupted' });
      assert.equal(cut.asked.length, 1);
      const short = playing([events]);
      await assert.rejects(collect(answer(resuming(short.open, { pause: 1 }))), { kind: 'interrupted' });
      assert.equal(short.asked.length, 1);
    }
  });
  it('does not ask again after what asking again does not mend', async () => {
    const gone = new StreamError('http', 'Over.', { status: 410 });
    const { asked, open } = playing([[piece('1')], broken()], [[], gone]);
    await assert.rejects(collect(resuming(open, { pause: 1 })), gone);
    assert.deepEqual(asked, ['', '1']);
    const given = playing([[piece('1'), { event: 'error', data: '{"error":{"message":"no"}}', id: '2' }]]);
    await assert.rejects(collect(answer(resuming(given.open, { pause: 1 }))), { kind: 'backend', message: 'no' });
    assert.equal(given.asked.length, 1);
  });
  it('gives up after so many attempts in a row with the last error, and events begin the count anew', async () => {
    const network = new StreamError('network', 'Not there.');
    const { asked, open } = playing([[piece('1')], broken()], [[], network], [[piece('2')], broken()], [[], network]);
    await assert.rejects(collect(resuming(open, { pause: 1, attempts: 3 })), network);
    assert.deepEqual(asked, ['', '1', '1', '2', '2', '2']);
  });
  it('waits as long as the server said, by retry or Retry-After, else longer each time', async (context) => {
    const waits = [];
    context.mock.method(globalThis, 'setTimeout', (then, milliseconds) => {
      waits.push(milliseconds);
      queueMicrotask(then);
    });
    const busy = new StreamError('http', 'Busy.', { status: 503, retryAfter: 7 });
    const network = new StreamError('network', 'Not there.');
    await collect(resuming(playing([[piece('1')], network], [[], network], [[], network], [[done('2')]]).open));
    await collect(resuming(playing([[piece('1', 1234)], network], [[], network], [[done('2')]]).open));
    await collect(resuming(playing([[piece('1')], busy], [[done('2')]]).open));
    assert.deepEqual(waits, [500, 1000, 2000, 1234, 1234, 7000]);
  });
  it('throws the reason to abort, whatever it is, also while it reads', async () => {
    for (const reason of [null, 0, 'enough']) {
      const open = async function* () {
        yield piece('1');
        throw reason;
      };
      await assert.rejects(collect(resuming(open, { pause: 1 })), (thrown) => thrown === reason);
    }
  });
  it('stops waiting when it is aborted, and throws the reason', async () => {
    const controller = new AbortController();
    const { asked, open } = playing([[piece('1')], broken()]);
    const events = resuming(open, { signal: controller.signal, pause: 3600000 });
    assert.equal((await events.next()).value.id, '1');
    const next = events.next();
    setTimeout(() => controller.abort('enough'), 10);
    await assert.rejects(next, (reason) => reason === 'enough');
    assert.equal(asked.length, 1);
  });
});
