<?php
/** GET /: the login form, or the page that asks and shows answers. */
declare(strict_types=1);
require __DIR__ . '/../lib.php';
require __DIR__ . '/../page.php';

fail_as('html');
allow_methods('GET', 'HEAD');
config();
if (!isset($_COOKIE[session_cookie_name()]) && ($_SERVER['HTTP_SEC_FETCH_SITE'] ?? '') === 'cross-site') {
    // Somebody followed a link from another site, so the browser kept the SameSite=Strict cookie back. A new session
    // would overwrite it and sign the user out. This reload is our own page's, and brings the cookie along.
    header('Refresh: 0; url=/');
    send_headers('text/html; charset=utf-8');
    exit;
}
open_session();
$user = current_user();
if ($user === null) {
    login_page();
}
$token = e(csrf_token());
session_write_close();
page_top('Handoff', 'chat');
?>
<header class="bar">
  <h1 class="brand"><a href="/"><img src="/icon.svg" alt="" width="26" height="26">Handoff</a></h1>
  <div class="bar-end">
    <button type="button" id="ping" class="quiet">Ping Apache</button>
    <output id="ping-result" for="ping" class="ping-result"></output>
    <span class="user" title="Signed in"><?= e($user) ?></span>
    <form method="post" action="/logout.php">
      <input type="hidden" name="csrf" value="<?= $token ?>">
      <button type="submit" class="quiet">Sign out</button>
    </form>
  </div>
</header>

<main class="column">
  <section id="welcome" class="welcome">
    <h2>What would you like to know?</h2>
    <p>PHP checks who you are and is done. A daemon takes over your connection and writes the answer to you as it comes.</p>
    <ul class="ideas" aria-label="Suggestions">
      <li><button type="button">What happens to my request when PHP hands it off?</button></li>
      <li><button type="button">Why does a long answer not keep an Apache worker busy?</button></li>
      <li><button type="button">Tell me a short story about a river.</button></li>
    </ul>
    <noscript><p class="notice">Answers are written into this page by JavaScript, which is switched off.</p></noscript>
  </section>
  <div id="turns" role="log" aria-label="Conversation"></div>
</main>

<footer class="dock">
  <form id="ask" class="composer column" autocomplete="off">
    <input type="hidden" name="csrf" value="<?= $token ?>">
    <div class="box">
      <label for="prompt" class="visually-hidden">Your question</label>
      <textarea id="prompt" name="prompt" rows="1" placeholder="Ask a question" autofocus required
        aria-describedby="keys"></textarea>
      <div class="tools">
        <fieldset class="transport">
          <legend class="visually-hidden">How the browser reads the answer</legend>
          <label><input type="radio" name="transport" value="fetch" checked><span>fetch()</span></label>
          <label><input type="radio" name="transport" value="eventsource"><span>EventSource</span></label>
        </fieldset>
        <button type="button" id="stop" class="stop" hidden>Stop</button>
        <button type="submit" id="send" class="primary">Ask</button>
      </div>
    </div>
    <div class="status-line">
      <span id="status" role="status" data-state="ready">Ready</span>
      <span id="numbers" class="numbers"></span>
      <span id="keys" class="keys">Enter sends · Shift+Enter new line · Esc stops</span>
    </div>
  </form>
</footer>

<template id="turn">
  <article class="turn">
    <h2 class="question"><span class="visually-hidden">Question: </span><span data-slot="question"></span></h2>
    <div class="answer" data-slot="answer" aria-label="Answer"></div>
    <div class="problem" data-slot="problem" role="alert"></div>
    <p class="meta" data-slot="meta"></p>
  </article>
</template>
<script type="module" src="/app.js"></script>
<?php
page_end();
