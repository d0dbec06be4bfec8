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

const PROMPT_MAX = 20000; // bytes: more is nobody's question, and paid for
const SEARCH_SECONDS = 10; // that a question waits for the search's next word, at most
const DOCUMENTS_MAX = 1000000; // bytes

function refuse(int $status, string $type, string $message): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode(['error' => ['type' => $type, 'message' => $message]]));
}

// The login sets the cookie, with its options (README.md): who has none gets none here, and no session for knocking.
// Read, and released at once. Whoever has to write opens it again afterwards, for as long as that takes.
isset($_COOKIE[session_name()]) && session_start(['read_and_close' => true]);
$user = $_SESSION['user'] ?? refuse(401, 'not_logged_in', 'Sign in first.');
if ($_SERVER['REQUEST_METHOD'] !== 'POST') {
    header('Allow: POST');
    refuse(405, 'method_not_allowed', 'This address takes POST.');
}
// Another site's form would bring the user's cookie along. csrf.php has the whole of it.
if (($_SERVER['HTTP_SEC_FETCH_SITE'] ?? 'same-origin') !== 'same-origin') {
    refuse(403, 'cross_site', 'Requests from other sites are not answered.');
}
$prompt = $_POST['prompt'] ?? null; // prompt[]=x is a list, and a byte that is no UTF-8 could not be handed on
if (!is_string($prompt) || strlen($prompt) > PROMPT_MAX || preg_match('//u', $prompt) !== 1) {
    refuse(422, 'prompt', '"prompt" has to be a text in UTF-8 of at most ' . PROMPT_MAX . ' bytes.');
}

// From here on as slow as it likes: nobody waits but who asked.
$context = stream_context_create(['http' => ['timeout' => SEARCH_SECONDS]]);
// @: the warning would write the address, with the question in it, into the log.
$url = getenv('SEARCH_URL') . '?' . http_build_query(['q' => $prompt]);
$documents = @file_get_contents($url, false, $context, length: DOCUMENTS_MAX + 1);
if ($documents === false || strlen($documents) > DOCUMENTS_MAX || preg_match('//u', $documents) !== 1) {
    error_log('session-lock.php: the search did not answer, or too much, or not in UTF-8');
    refuse(502, 'search', 'The documents cannot be searched at the moment.');
}
// What was found may be anybody's text: it comes with the question, and is no instruction of ours.
SocketHandoff::to('llm')->with([
    'messages' => [
        ['role' => 'system', 'content' => 'Answer the question from the documents, which are in front of it.'],
        ['role' => 'user', 'content' => "<documents>\n$documents\n</documents>\n\n$prompt"],
    ],
    'user' => $user,
])->send();
