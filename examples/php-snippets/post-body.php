<?php
/**
 * The body of a POST as the daemon's data, a megabyte of it: a document to summarise, a conversation with images.
 *
 * A header takes some 6,000 bytes. SocketHandoff sends more than that as the response body (X-Handoff-Data-From:
 * response-body), which Apache passes to the daemon in a sealed memfd, up to SocketHandoffMaxPayload; its target needs
 * envelope=on. PHP reads the body to its end here, so nothing of it is left in the connection that the daemon gets.
 */
declare(strict_types=1);

use SocketHandoff\SocketHandoff;

require __DIR__ . '/SocketHandoff.php'; // examples/php-helper, or Composer's autoload.php

// Of small values PHP makes a hundred times their bytes: 1 MiB is what its usual memory_limit of 128M bears.
const BODY_MAX = 1048576;

function refuse(int $status, string $type, string $message): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode(['error' => ['type' => $type, 'message' => $message]]));
}

/** The first part of a message that is neither text nor an image in itself: of an address, a backend may go and fetch it. */
function foreign_part(mixed $messages): ?string
{
    foreach (is_array($messages) ? $messages : [] as $number => $message) {
        $content = $message->content ?? null;
        foreach (is_array($content) ? $content : [] as $place => $part) {
            $url = $part->image_url->url ?? null;
            $own = match ($part->type ?? null) {
                'text' => true,
                'image_url' => is_string($url) && str_starts_with($url, 'data:image/'),
                default => false,
            };
            if (!$own) {
                return "messages[$number].content[$place]";
            }
        }
    }
    return null;
}

// The login sets the cookie, with its options (README.md): who has none gets none here, and no session for knocking.
isset($_COOKIE[session_name()]) && session_start(['read_and_close' => true]);
$user = $_SESSION['user'] ?? refuse(401, 'not_logged_in', 'Sign in first.');
// Another site's form would bring the user's cookie along. csrf.php has the whole of it.
if (($_SERVER['HTTP_SEC_FETCH_SITE'] ?? 'same-origin') !== 'same-origin') {
    refuse(403, 'cross_site', 'Requests from other sites are not answered.');
}

// One byte more than is allowed tells whether there is more; Content-Length may be missing, or wrong.
$body = (string) file_get_contents('php://input', length: BODY_MAX + 1);
if (strlen($body) > BODY_MAX) {
    refuse(413, 'too_large', 'At most ' . BODY_MAX . ' bytes are read.');
}
$asked = json_decode($body, false, 32); // as arrays, {} and [] would be the same
if (!$asked instanceof stdClass) {
    refuse(422, 'invalid_json', 'The request body has to be a JSON object.');
}
$prompt = $asked->prompt ?? null;
$messages = $asked->messages ?? null;
if ($prompt === null && $messages === null) {
    refuse(422, 'nothing_asked', 'Send "prompt" or "messages".');
}
$part = foreign_part($messages);
if ($part !== null) {
    refuse(422, 'foreign_part', "$part has to be text, or an image as data:image/… in itself.");
}
try {
    // The daemon believes what comes from here: only the members that this endpoint means to offer, and who it is.
    SocketHandoff::to('llm')->with([
        'prompt' => $prompt,
        'messages' => $messages,
        'user' => $user,
    ])->send();
} catch (InvalidArgumentException | LengthException $error) {
    refuse(422, 'not_usable', $error->getMessage());
}
