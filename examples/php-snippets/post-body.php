<?php
/**
 * The body of a POST as the daemon's data, megabytes of it: a document to summarise, a conversation with images.
 *
 * A header takes some 6,000 bytes. SocketHandoff sends more than that as the response body (X-Handoff-Data-From:
 * response-body), which Apache passes to the daemon in a sealed memfd, up to SocketHandoffMaxPayload; its target needs
 * envelope=on. PHP reads the body to its end here, so nothing of it is left in the connection that the daemon gets.
 */
declare(strict_types=1);

use SocketHandoff\SocketHandoff;

require __DIR__ . '/SocketHandoff.php'; // examples/php-helper, or Composer's autoload.php

const BODY_MAX = 4194304; // PHP holds it several times in memory: memory_limit has to be about six times this

function refuse(int $status, string $type, string $message): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode(['error' => ['type' => $type, 'message' => $message]]));
}

session_start(['read_and_close' => true]);
$user = $_SESSION['user'] ?? refuse(401, 'not_logged_in', 'Sign in first.');

// One byte more than is allowed tells whether there is more; Content-Length may be missing, or wrong.
$body = (string) file_get_contents('php://input', length: BODY_MAX + 1);
if (strlen($body) > BODY_MAX) {
    refuse(413, 'too_large', 'At most ' . BODY_MAX . ' bytes are read.');
}
$asked = json_decode($body, true, 32);
if (!is_array($asked) || array_is_list($asked)) {
    refuse(422, 'invalid_json', 'The request body has to be a JSON object.');
}
try {
    // The daemon believes what comes from here: only the members that this endpoint means to offer, and who it is.
    SocketHandoff::to('llm')->with([
        'prompt' => $asked['prompt'] ?? null,
        'messages' => $asked['messages'] ?? null,
        'user' => $user,
    ])->send();
} catch (InvalidArgumentException | LengthException $error) {
    refuse(422, 'not_usable', $error->getMessage());
}
