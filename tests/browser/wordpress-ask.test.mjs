/**
 * The form of examples/wordpress without WordPress, which only the lane of that name has: its script, with the reader of
 * streams beside it as the README copies them, and a stand-in for the page.
 */
import assert from 'node:assert/strict';
import { mkdtemp, copyFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, beforeEach, describe, it } from 'node:test';
import { pathToFileURL } from 'node:url';

const EXAMPLES = new URL('../../examples/', import.meta.url);

describe('ask.js of examples/wordpress', () => {
  let directory;
  let submit; // sends a question, as the form's button does
  let asked; // the requests: { prompt, signal, answer(response) }
  const form = {
    dataset: { url: 'http://site.test/admin-ajax.php', nonce: '0123456789', loggedOut: 'Log in again.' },
    elements: { prompt: {} },
    status: {},
    output: { textContent: '', append: (text) => (form.output.textContent += text) },
    querySelector: (selector) => (selector === '.answer' ? form.output : form.status),
    addEventListener: (_, listener) => {
      submit = (prompt) => {
        form.elements.prompt.value = prompt;
        return listener({ preventDefault() {} });
      };
    },
  };

  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'handoff-ask-'));
    await writeFile(join(directory, 'package.json'), '{"type": "module"}');
    await copyFile(new URL('wordpress/handoff-stream/ask.js', EXAMPLES), join(directory, 'ask.js'));
    await copyFile(new URL('js/handoff-stream.js', EXAMPLES), join(directory, 'handoff-stream.js'));
    globalThis.document = { querySelectorAll: () => [form] };
    await import(pathToFileURL(join(directory, 'ask.js')));
  });
  after(async () => {
    delete globalThis.document;
    await rm(directory, { recursive: true });
  });
  beforeEach((context) => {
    asked = [];
    context.mock.method(globalThis, 'fetch', (url, { body, signal }) => {
      assert.equal(body.get('_ajax_nonce'), '0123456789');
      return new Promise((resolve, reject) => {
        signal.addEventListener('abort', () => reject(signal.reason));
        asked.push({ prompt: body.get('prompt'), signal, answer: resolve });
      });
    });
  });
  const stream = (...pieces) =>
    new Response([...pieces.map((content) => JSON.stringify({ content })), '[DONE]'].map((data) => `data: ${data}\n\n`).join(''), {
      headers: { 'Content-Type': 'text/event-stream' },
    });

  it('shows the answer, and nothing else', async () => {
    const shown = submit('Why?');
    assert.equal(form.status.textContent, '…');
    asked[0].answer(stream('Be', 'cause <b>.'));
    await shown;
    assert.deepEqual([form.status.textContent, form.output.textContent], ['', 'Because <b>.']);
  });

  it('ends the question before, of which nothing is shown any more', async () => {
    const first = submit('Why?');
    const second = submit('And how?');
    assert.deepEqual(asked.map(({ prompt, signal }) => [prompt, signal.aborted]), [['Why?', true], ['And how?', false]]);
    await first;
    assert.equal(form.status.textContent, '…', 'the second one is still to come');
    asked[1].answer(stream('So.'));
    await second;
    assert.deepEqual([form.status.textContent, form.output.textContent], ['', 'So.']);
  });

  it("says what WordPress' bare 400 means, and passes on what others say", async () => {
    const refusals = [
      [new Response('0', { status: 400 }), 'Log in again.'],
      [Response.json({ error: { type: 'bad_request', message: 'Too much.' } }, { status: 400 }), 'Too much.'],
      [Response.json({ error: { type: 'nonce', message: 'Reload it.' } }, { status: 403 }), 'Reload it.'],
    ];
    for (const [response, words] of refusals) {
      const shown = submit('Why?');
      asked.at(-1).answer(response);
      await shown;
      assert.equal(form.status.textContent, words);
    }
  });
});
