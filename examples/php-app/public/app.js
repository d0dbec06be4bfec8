/** The page: asks, shows the answer as it arrives, and says in plain words what went wrong. */
import { answer, viaEventSource, viaFetch } from './handoff-stream.js';

const $ = (id) => document.getElementById(id);
const form = $('ask');
const prompt = $('prompt');
let running = null; // the AbortController of the answer that is being written

const seconds = (ms) => `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;

function setStatus(state, text) {
  $('status').dataset.state = state;
  $('status').textContent = text;
}

function newTurn(question) {
  const turn = $('turn').content.firstElementChild.cloneNode(true);
  const slot = (name) => turn.querySelector(`[data-slot="${name}"]`);
  slot('question').textContent = question;
  $('welcome').hidden = true;
  $('turns').append(turn);
  turn.scrollIntoView({ block: 'start' });
  return { turn, slot };
}

/** What is measured for the status line; `done()` returns the final words. */
function measure() {
  const begin = performance.now();
  let first = null;
  let events = 0;
  const words = () => {
    const parts = [`${events} ${events === 1 ? 'event' : 'events'}`];
    if (first !== null) parts.push(`first token ${seconds(first)}`);
    parts.push(seconds(performance.now() - begin));
    return parts.join(' · ');
  };
  const timer = setInterval(() => ($('numbers').textContent = words()), 100);
  return {
    count() {
      events += 1;
      first ??= performance.now() - begin;
    },
    done() {
      clearInterval(timer);
      $('numbers').textContent = words();
      return words();
    },
  };
}

async function ask(question) {
  const { turn, slot } = newTurn(question);
  const transport = new FormData(form).get('transport');
  const numbers = measure();
  const text = document.createTextNode(''); // text, never HTML: an answer must not be able to script this page
  const controller = new AbortController();
  running = controller;
  slot('answer').append(text);
  turn.setAttribute('aria-busy', 'true'); // a screen reader waits and reads the answer as a whole, not token by token
  turn.dataset.state = 'streaming';
  $('send').hidden = true;
  $('stop').hidden = false;
  setStatus('streaming', 'Waiting for the first token');
  let outcome = 'done';
  let follow = true; // until the reader scrolls up
  try {
    for await (const piece of answer(open(transport, question, controller.signal))) {
      if (text.length === 0) setStatus('streaming', 'Answering');
      follow = atBottom();
      text.appendData(piece);
      numbers.count();
      if (follow) toBottom();
    }
  } catch (error) {
    follow = atBottom();
    outcome = controller.signal.aborted ? 'stopped' : 'failed';
    if (outcome === 'failed') showProblem(slot('problem'), question, await explain(error));
  }
  const label = { done: 'Done', stopped: 'Stopped', failed: 'Failed' }[outcome];
  running = null;
  turn.dataset.state = outcome;
  turn.removeAttribute('aria-busy');
  slot('meta').textContent = `${label} · ${numbers.done()} · ${transport === 'fetch' ? 'fetch()' : 'EventSource'}`;
  setStatus(outcome, label);
  // A key that was meant for the Stop button must not land on the Ask button that takes its place.
  const refocus = document.activeElement === $('stop') || document.activeElement === document.body;
  $('stop').hidden = true;
  $('send').hidden = false;
  if (refocus) prompt.focus({ preventScroll: true });
  if (follow) toBottom();
}

function open(transport, question, signal) {
  if (transport === 'eventsource') {
    // EventSource can only GET, so the question is in the address, and in every access log on its way.
    return viaEventSource(`/stream.php?${new URLSearchParams({ prompt: question })}`, { signal });
  }
  return viaFetch('/stream.php', {
    method: 'POST',
    body: JSON.stringify({ prompt: question }),
    headers: { 'Content-Type': 'application/json', 'X-CSRF-Token': form.elements.csrf.value },
    signal,
  });
}

/** An error in words for the user: { title, text, action: 'again' | 'sign in' | 'reload' | '' }. */
async function explain(error) {
  if (error.kind === 'refused') error = await whyRefused(error);
  const again = (title, text) => ({ title, text, action: 'again' });
  switch (error.kind) {
    case 'network':
      return again('The server cannot be reached', 'Check your connection, then ask again.');
    case 'interrupted':
      return again('The answer broke off', 'The connection ended before the answer was complete.');
    case 'backend':
      return again('The answer could not be finished', error.message);
    case 'refused':
      return again(
        'The answer service is not available',
        'The server refused the stream; EventSource does not tell why. Ask again with fetch() to see the reason.',
      );
    case 'http':
      break;
    default:
      console.error(error);
      return again('Something unexpected arrived', error.message);
  }
  switch (error.status) {
    case 401:
      return { title: 'Your session has ended', text: 'Sign in again; your question is kept.', action: 'sign in' };
    case 403:
      return { title: 'The server did not accept this page', text: error.message, action: 'reload' };
    case 414:
    case 422:
      return { title: 'This question cannot be sent', text: error.message, action: '' };
    case 503: {
      const when = error.retryAfter > 0 ? `in ${error.retryAfter} seconds` : 'in a moment';
      return again('The answer service is not available', `The daemon did not take the question. Try again ${when}.`);
    }
    default:
      return again('The server could not answer', error.message);
  }
}

/** EventSource hides the response it did not like. The session is the one cause that can be looked up. */
async function whyRefused(error) {
  try {
    const session = await (await fetch('/session.php', { cache: 'no-store' })).json();
    return session.user === null ? { kind: 'http', status: 401 } : error;
  } catch {
    return { kind: 'network' };
  }
}

function showProblem(box, question, { title, text, action }) {
  const heading = document.createElement('strong');
  heading.textContent = title;
  const words = document.createElement('p');
  words.textContent = text;
  box.append(heading, words);
  if (action !== '') {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = { again: 'Ask again', 'sign in': 'Sign in', reload: 'Reload the page' }[action];
    button.addEventListener('click', () => {
      if (action === 'again') return void (running ?? ask(question));
      sessionStorage.setItem('question', question);
      location.assign('/');
    });
    box.append(button);
  } else if (prompt.value === '') {
    prompt.value = question; // to be shortened
  }
}

const atBottom = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 48;
const toBottom = () => scrollTo({ top: document.documentElement.scrollHeight, behavior: 'instant' });

form.addEventListener('submit', (event) => {
  event.preventDefault();
  const question = prompt.value.trim();
  if (running || question === '') return;
  prompt.value = '';
  ask(question);
});
prompt.addEventListener('keydown', (event) => {
  // isComposing: the Enter that ends an input method's suggestion is not meant for us.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') running?.abort();
});
$('stop').addEventListener('click', () => running?.abort());
for (const idea of document.querySelectorAll('.ideas button')) {
  idea.addEventListener('click', () => running ?? ask(idea.textContent));
}
$('ping').addEventListener('click', async () => {
  const begin = performance.now();
  try {
    const response = await fetch('/plain.php', { cache: 'no-store' });
    await response.text();
    const time = `${Math.round(performance.now() - begin)} ms`;
    $('ping-result').textContent = response.ok ? time : `status ${response.status}`;
  } catch {
    $('ping-result').textContent = 'no answer';
  }
});

prompt.value = sessionStorage.getItem('question') ?? prompt.value;
sessionStorage.removeItem('question');
