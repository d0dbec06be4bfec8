/**
 * An answer over broken connections, where the application has given it a name (resume.php of examples/php-snippets).
 *
 *   const goOn = (after) => viaFetch(url, { headers: { 'Last-Event-ID': after } });
 *   const events = resuming((after) => (after === '' ? viaFetch(url, question) : goOn(after)));
 *   for await (const text of answer(events)) show(text);
 *
 * What was sent while nobody listened comes first, and nothing comes twice. Where the events have no numbers the answer
 * has no name: nothing is asked again then, since that would be a new question.
 */

/**
 * @param open     called with the id of the last event that arrived, '' at first; returns a source of handoff-stream.js
 * @param attempts how often in a row to connect again in vain, before the last error is thrown
 * @param pause    milliseconds before the first of them, doubled for each further, unless the server says `retry:`
 */
export async function* resuming(open, { signal, attempts = 5, pause = 500 } = {}) {
  let after = '';
  let retry = null;
  for (let failures = 0; ; failures += 1) {
    let problem = null;
    try {
      for await (const event of open(after)) {
        failures = 0;
        after = event.id;
        retry = event.retry ?? retry;
        yield event;
        if (event.data === '[DONE]' || event.event === 'error') return; // complete, or given up by the daemon
      }
    } catch (error) {
      const passes = ['network', 'interrupted'].includes(error?.kind) || error?.status === 503;
      if (!passes || after === '' || failures >= attempts) throw error;
      problem = error;
    }
    if (problem === null && (after === '' || failures >= attempts)) return; // ended early: answer() says so
    await sleep((problem?.retryAfter ?? 0) * 1000 || (retry ?? pause * 2 ** failures), signal);
  }
}

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const timer = setTimeout(done, milliseconds);
    function done() {
      clearTimeout(timer);
      signal?.removeEventListener('abort', done);
      if (signal?.aborted) reject(signal.reason);
      else resolve();
    }
    signal?.addEventListener('abort', done);
  });
}
