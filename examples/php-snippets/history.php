<?php
/**
 * A conversation: the model remembers nothing, so every question takes along what was said before.
 *
 * PHP has gone when the answer is written, and never sees it. So the browser, which has it all on the screen, sends the
 * conversation back with each question, and PHP looks it over: only the two roles of a conversation come from outside,
 * the instructions of the system come from here, and what is too long loses its oldest part. (A user can put words into
 * the model's mouth that way, in a conversation that nobody else reads. Where that matters, let the page save each
 * finished answer.)
 */
declare(strict_types=1);

use SocketHandoff\SocketHandoff;

require __DIR__ . '/SocketHandoff.php'; // examples/php-helper, or Composer's autoload.php

const SYSTEM = 'You are the assistant of a shop for bicycles. Answer in a few sentences.';
const MESSAGES_MAX = 20;
const TEXT_MAX = 20000; // bytes of each

function refuse(int $status, string $type, string $message): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode(['error' => ['type' => $type, 'message' => $message]]));
}

// The login sets the cookie, with its options (README.md): who has none gets none here, and no session for knocking.
isset($_COOKIE[session_name()]) && session_start(['read_and_close' => true]);
$user = $_SESSION['user'] ?? refuse(401, 'not_logged_in', 'Sign in first.');
// Another site's form would bring the user's cookie along. csrf.php has the whole of it.
if (($_SERVER['HTTP_SEC_FETCH_SITE'] ?? 'same-origin') !== 'same-origin') {
    refuse(403, 'cross_site', 'Requests from other sites are not answered.');
}

$asked = json_decode((string) file_get_contents('php://input', length: 1048576), true, 8);
$said = $asked['messages'] ?? null;
if (!is_array($said) || !array_is_list($said) || $said === []) {
    refuse(422, 'messages_missing', 'Send {"messages": [{"role", "content"}, …]}, at most 1 MiB.');
}
$conversation = [];
foreach ($said as $number => $message) {
    $role = $message['role'] ?? null;
    $content = $message['content'] ?? null;
    if (!in_array($role, ['user', 'assistant'], true)) {
        refuse(422, 'role', "messages[$number].role has to be \"user\" or \"assistant\".");
    }
    if (!is_string($content) || strlen($content) > TEXT_MAX) {
        refuse(422, 'content', "messages[$number].content has to be a text of at most " . TEXT_MAX . ' bytes.');
    }
    $conversation[] = ['role' => $role, 'content' => $content]; // and no other member
}
if ($conversation[array_key_last($conversation)]['role'] !== 'user') {
    refuse(422, 'role', 'The last message has to be the user\'s question.');
}
// Models want the user to speak first after the instructions.
$conversation = array_slice($conversation, -MESSAGES_MAX);
while ($conversation[0]['role'] !== 'user') {
    array_shift($conversation);
}
SocketHandoff::to('llm')->with([
    'messages' => [['role' => 'system', 'content' => SYSTEM], ...$conversation],
    'user' => $user,
])->send();
