<?php
/**
 * The session's lock, released before anything slow.
 *
 * PHP locks a session from session_start() to the end of the script, and the user's next request waits for it: a second
 * tab, the page's own calls. After a handoff the script is over, so the stream holds nothing; what holds the lock is the
 * script's own slow work before it, such as this search for documents that the model shall answer from.
 */
declare(strict_types=1);

use SocketHandoff\SocketHandoff;

require __DIR__ . '/SocketHandoff.php'; // examples/php-helper, or Composer's autoload.php

// Read, and released at once. Whoever has to write opens it again afterwards, for as long as that takes.
session_start(['read_and_close' => true]);
$user = $_SESSION['user'] ?? null;

if ($user === null) {
    http_response_code(401);
    header('Content-Type: application/json');
    exit(json_encode(['error' => ['type' => 'not_logged_in', 'message' => 'Sign in first.']]));
}
$question = (string) ($_POST['prompt'] ?? '');

// From here on as slow as it likes: nobody waits but who asked.
$documents = file_get_contents(getenv('SEARCH_URL') . '?' . http_build_query(['q' => $question]));

SocketHandoff::to('llm')->with([
    'messages' => [
        ['role' => 'system', 'content' => "Answer from these documents:\n$documents"],
        ['role' => 'user', 'content' => $question],
    ],
    'user' => $user,
])->send();
