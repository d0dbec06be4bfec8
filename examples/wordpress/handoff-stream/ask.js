/** Every form of the shortcode [handoff_ask]: sends the question, shows the answer while it is written. */
import { answer, viaFetch } from './handoff-stream.js';

for (const form of document.querySelectorAll('form.handoff-ask')) {
  const status = form.querySelector('[role=status]');
  const output = form.querySelector('.answer');
  let controller;
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    controller?.abort(); // the question before: two answers would mix, and both be paid for
    controller = new AbortController();
    const { signal } = controller;
    const { url, nonce } = form.dataset;
    const body = new URLSearchParams({ action: 'handoff_ask', _ajax_nonce: nonce, prompt: form.elements.prompt.value });
    status.textContent = '…';
    output.textContent = '';
    try {
      const events = viaFetch(url, { method: 'POST', body, signal });
      for await (const text of answer(events)) output.append(text); // as text, never as HTML
      status.textContent = '';
    } catch (error) {
      if (signal !== controller.signal) return; // the form shows another question's answer by now
      // WordPress answers a bare 400 where an action is for nobody who is not logged in: the session has ended. The
      // daemon's 400 says what is wrong.
      status.textContent = error.status === 400 && !error.type ? form.dataset.loggedOut : error.message;
    }
  });
}
