<?php
/**
 * An answer that goes on after a reload, a lost connection, a phone that slept in a pocket.
 *
 * POST asks, and gives the answer a name that nobody can guess; the daemon then numbers its events, keeps them, and goes
 * on with the model while nobody listens (`[resume]` in its configuration: a minute). GET continues the answer that this
 * session began, behind the event that the browser has: EventSource says which in Last-Event-ID when it reconnects, and a
 * page that was reloaded says it as ?after=, or 0 for all of it from the beginning. An answer that is over and seen to
 * its end is a 204.
 */
declare(strict_types=1);

use SocketHandoff\SocketHandoff;

require __DIR__ . '/SocketHandoff.php'; // examples/php-helper, or Composer's autoload.php

function refuse(int $status, string $type, string $message): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode(['error' => ['type' => $type, 'message' => $message]]));
}

session_start();
$user = $_SESSION['user'] ?? refuse(401, 'not_logged_in', 'Sign in first.');
$asks = $_SERVER['REQUEST_METHOD'] === 'POST';
if ($asks) {
    // The name stays on the server: a page that does not know it cannot lose it, and another user cannot use it.
    $_SESSION['answer'] = bin2hex(random_bytes(16));
}
$answer = $_SESSION['answer'] ?? refuse(404, 'no_answer', 'There is no answer to go on with.');
session_write_close();

if ($asks) {
    SocketHandoff::to('llm')->with([
        'prompt' => (string) ($_POST['prompt'] ?? ''),
        'user' => $user,
        'resume' => ['id' => $answer],
    ])->send();
}
$after = $_SERVER['HTTP_LAST_EVENT_ID'] ?? $_GET['after'] ?? '0';
if (!is_string($after) || !preg_match('/^[0-9]{1,9}$/D', $after)) {
    refuse(422, 'after', 'Last-Event-ID, or "after", has to be the number of an event.');
}
SocketHandoff::to('llm')->with(['user' => $user, 'resume' => ['id' => $answer, 'after' => (int) $after]])->send();
