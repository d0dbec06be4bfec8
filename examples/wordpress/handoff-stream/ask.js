/** Every form of the shortcode [handoff_ask]: sends the question, shows the answer while it is written. */
import { answer, viaFetch } from './handoff-stream.js';

for (const form of document.querySelectorAll('form.handoff-ask')) {
  const status = form.querySelector('[role=status]');
  const output = form.querySelector('.answer');
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    const { url, nonce } = form.dataset;
    const body = new URLSearchParams({ action: 'handoff_ask', _ajax_nonce: nonce, prompt: form.elements.prompt.value });
    status.textContent = '…';
    output.textContent = '';
    try {
      for await (const text of answer(viaFetch(url, { method: 'POST', body }))) output.append(text); // as text, never as HTML
      status.textContent = '';
    } catch (error) {
      status.textContent = error.message;
    }
  });
}
