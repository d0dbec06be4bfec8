<?php
/**
 * An answer that goes on after a reload, a lost connection, a phone that slept in a pocket.
 *
 * POST asks. The page calls its question by a random "question", a new one for each, so that two tabs have two answers;
 * the answer's name is made of that and a secret of the session, so that nobody else can guess it. The daemon then numbers
 * its events, keeps them, and goes on with the model while nobody listens (`[resume]` in its configuration: a minute).
 * GET continues the answer to ?question=, behind the event that the browser has: EventSource says which in Last-Event-ID
 * when it reconnects, and a page that was reloaded says it as ?after=, or 0 for all of it from the beginning. An answer
 * that is over and seen to its end is a 204, one that the daemon has forgotten a 410.
 */
declare(strict_types=1);

use SocketHandoff\SocketHandoff;

require __DIR__ . '/SocketHandoff.php'; // examples/php-helper, or Composer's autoload.php

const PROMPT_MAX = 20000; // bytes: more is nobody's question, and paid for

function refuse(int $status, string $type, string $message): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode(['error' => ['type' => $type, 'message' => $message]]));
}

// The login sets the cookie, with its options (README.md): who has none gets none here, and no session for knocking.
isset($_COOKIE[session_name()]) && session_start();
$user = $_SESSION['user'] ?? refuse(401, 'not_logged_in', 'Sign in first.');
// Another site's form would bring the user's cookie along. csrf.php has the whole of it.
if (($_SERVER['HTTP_SEC_FETCH_SITE'] ?? 'same-origin') !== 'same-origin') {
    refuse(403, 'cross_site', 'Requests from other sites are not answered.');
}
$asks = $_SERVER['REQUEST_METHOD'] === 'POST';
$question = ($asks ? $_POST : $_GET)['question'] ?? null;
if (!is_string($question) || !preg_match('/^[0-9a-f-]{36}$/D', $question)) {
    refuse(422, 'question', '"question" has to be a UUID, as crypto.randomUUID() makes them.');
}
if (!$asks && !isset($_SESSION['answers'])) {
    refuse(404, 'no_answer', 'There is no answer to go on with.');
}
// Never in a page: who knows the UUID alone, from an access log, cannot go on with the answer.
$secret = $_SESSION['answers'] ??= bin2hex(random_bytes(32));
session_write_close();
$answer = hash_hmac('sha256', $question, $secret);

if ($asks) {
    $prompt = $_POST['prompt'] ?? null; // prompt[]=x is a list, and a byte that is no UTF-8 could not be handed on
    if (!is_string($prompt) || strlen($prompt) > PROMPT_MAX || preg_match('//u', $prompt) !== 1) {
        refuse(422, 'prompt', '"prompt" has to be a text in UTF-8 of at most ' . PROMPT_MAX . ' bytes.');
    }
    SocketHandoff::to('llm')->with([
        'prompt' => $prompt,
        'user' => $user,
        'resume' => ['id' => $answer],
    ])->send();
}
$after = $_SERVER['HTTP_LAST_EVENT_ID'] ?? $_GET['after'] ?? '0';
if (!is_string($after) || !preg_match('/^[0-9]{1,9}$/D', $after)) {
    refuse(422, 'after', 'Last-Event-ID, or "after", has to be the number of an event.');
}
SocketHandoff::to('llm')->with(['user' => $user, 'resume' => ['id' => $answer, 'after' => (int) $after]])->send();
