<?php
/**
 * POST /v1/chat/completions as OpenAI's clients expect it: PHP looks at the bearer token, the daemon streams the answer.
 *
 * Whatever speaks to OpenAI can be pointed here, and your users get an API with keys of yours, while the provider's own
 * key stays with the daemon. Its target has to be answered by a backend of type "openai" with output = "passthrough",
 * which gives the client the provider's own events. Apache's part is in README.md.
 */
declare(strict_types=1);

use SocketHandoff\SocketHandoff;

require __DIR__ . '/SocketHandoff.php'; // examples/php-helper, or Composer's autoload.php

/** Which models of the provider's a client may choose: what each costs is paid with your key. */
const MODELS = ['gpt-4o-mini'];
/** How long an answer may be, and is at most where the client does not say. */
const TOKENS_MAX = 4096;
/** Of small values PHP makes a hundred times their bytes: 1 MiB is what its usual memory_limit of 128M bears. */
const BODY_MAX = 1048576;
/** What a client may say. Not "user", "backend", "resume" and the like, which the daemon believes. */
const MEMBERS = [
    'messages', 'model', 'temperature', 'max_tokens', 'max_completion_tokens', 'top_p', 'stop', 'seed',
    'presence_penalty', 'frequency_penalty', 'logit_bias', 'tools', 'tool_choice', 'parallel_tool_calls',
    'response_format', 'reasoning_effort',
];

/** An error in the form that OpenAI's clients turn into their exceptions. */
function refuse(int $status, string $type, string $message, ?string $param = null, ?string $code = null): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode(['error' => ['message' => $message, 'type' => $type, 'param' => $param, 'code' => $code]]));
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

if ($_SERVER['REQUEST_METHOD'] !== 'POST') {
    header('Allow: POST');
    refuse(405, 'invalid_request_error', 'This address takes POST.');
}

// Whose token is it? The file has the tokens' SHA-256 and users, never a token: ['9f86d081…' => 'ada', …].
$users = require getenv('API_TOKENS') ?: '/etc/handoff-app/api-tokens.php';
$token = preg_match('/^Bearer +(\S+)$/iD', $_SERVER['HTTP_AUTHORIZATION'] ?? '', $found) ? $found[1] : '';
// Looked up by its hash, so how long it takes says nothing about a token. Of nothing there is a hash as well, and whoever
// made the file while $token was not set has it in there.
$user = ($token === '' ? null : $users[hash('sha256', $token)] ?? null)
    ?? refuse(401, 'invalid_request_error', 'Incorrect API key provided.', null, 'invalid_api_key');

$body = (string) file_get_contents('php://input', length: BODY_MAX + 1);
if (strlen($body) > BODY_MAX) {
    refuse(413, 'invalid_request_error', 'At most ' . BODY_MAX . ' bytes are read.');
}
// Not as arrays: of {}, which is in the schema of every tool without parameters, PHP would make [].
$asked = json_decode($body, false, 100);
if (!$asked instanceof stdClass) {
    refuse(400, 'invalid_request_error', 'The request body has to be a JSON object.');
}
$asked = get_object_vars($asked);
if (($asked['stream'] ?? false) !== true) {
    refuse(400, 'invalid_request_error', 'Only streams are answered here: say "stream": true.', 'stream');
}
if (($asked['messages'] ?? []) === []) {
    refuse(400, 'invalid_request_error', '"messages" is missing.', 'messages');
}
if (!in_array($asked['model'] ?? null, MODELS, true)) {
    $models = implode(', ', MODELS);
    refuse(404, 'invalid_request_error', "There is no such model here, but these: $models.", 'model', 'model_not_found');
}
foreach (['max_tokens', 'max_completion_tokens'] as $name) {
    $tokens = $asked[$name] ?? 1;
    if (!is_int($tokens) || $tokens < 1 || $tokens > TOKENS_MAX) {
        refuse(400, 'invalid_request_error', "\"$name\" has to be an integer from 1 to " . TOKENS_MAX . '.', $name);
    }
}
if (!isset($asked['max_tokens'])) {
    $asked['max_completion_tokens'] ??= TOKENS_MAX;
}
$part = foreign_part($asked['messages']);
if ($part !== null) {
    refuse(400, 'invalid_request_error', "$part has to be text, or an image as data:image/… in itself.", 'messages');
}
try {
    $members = array_intersect_key($asked, array_flip(MEMBERS));
    SocketHandoff::to('model')->with([...$members, 'user' => $user])->send();
} catch (InvalidArgumentException | LengthException $error) {
    refuse(400, 'invalid_request_error', $error->getMessage());
}
