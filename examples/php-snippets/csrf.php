<?php
/**
 * No other site may ask in the user's name: each answer costs money, and the cookie goes along with any form.
 *
 * GET hands out the token of the session, POST asks with it. The page puts it into a header, which a form of another site
 * cannot do, and fetch() of another site only where CORS allows it.
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
isset($_COOKIE[session_name()]) && session_start(['use_strict_mode' => true]);
$user = $_SESSION['user'] ?? refuse(401, 'not_logged_in', 'Sign in first.');
$token = $_SESSION['csrf'] ??= bin2hex(random_bytes(32));
session_write_close();

if ($_SERVER['REQUEST_METHOD'] === 'GET') {
    header('Content-Type: application/json');
    header('Cache-Control: no-store');
    exit(json_encode(['csrf' => $token]));
}
// Browsers say where a request comes from, and no page can make them lie. Old ones, and plain HTTP, leave it out.
if (($_SERVER['HTTP_SEC_FETCH_SITE'] ?? 'same-origin') !== 'same-origin') {
    refuse(403, 'cross_site', 'Requests from other sites are not answered.');
}
// hash_equals takes the same time for every wrong token, so that none can be found letter by letter.
if (!hash_equals($token, $_SERVER['HTTP_X_CSRF_TOKEN'] ?? '')) {
    refuse(403, 'csrf', 'The header X-CSRF-Token is missing or out of date. Reload the page.');
}
$prompt = $_POST['prompt'] ?? null; // prompt[]=x is a list, and a byte that is no UTF-8 could not be handed on
if (!is_string($prompt) || strlen($prompt) > PROMPT_MAX || preg_match('//u', $prompt) !== 1) {
    refuse(422, 'prompt', '"prompt" has to be a text in UTF-8 of at most ' . PROMPT_MAX . ' bytes.');
}
SocketHandoff::to('llm')->with(['prompt' => $prompt, 'user' => $user])->send();
