<?php
/**
 * GET, HEAD or POST /stream.php (prompt): decides whether this user may ask, then gives the connection to the daemon.
 *
 * PHP is here for a few milliseconds per answer; the answer itself is written by the daemon.
 */
declare(strict_types=1);
require __DIR__ . '/../lib.php';
require __DIR__ . '/../handoff.php';

/** Bytes of a request body, which PHP holds in memory several times. PHP's own post_max_size is 8M by default. */
const BODY_MAX = 4194304;

fail_as('json');
$method = allow_methods('GET', 'HEAD', 'POST');
$config = config();

// 1. Who is asking? The session is only read: its lock is released before anything else happens.
$user = null;
$token_ok = false;
if (isset($_COOKIE[session_cookie_name()])) { // do not create a session for everybody who knocks
    open_session();
    $user = current_user();
    $token_ok = csrf_matches($_SERVER['HTTP_X_CSRF_TOKEN'] ?? null);
    session_write_close();
}
if ($user === null) {
    throw new Failure(401, 'not_logged_in', 'You are not signed in, or your session has ended.');
}

// 2. Is it really the user's own page that asks? Browsers say where a request comes from and pages cannot forge it, so
//    anything but our own origin is refused. EventSource can send neither a body nor a header of ours, so a GET has no
//    token. Where Sec-Fetch-Site is missing too (plain HTTP to a name other than localhost, old browsers, scripts), the
//    SameSite=Strict cookie is what keeps other sites out: without it the request ended at 401 above. A GET changes
//    nothing on the server and its answer cannot be read across origins; what is protected is the cost of the answer.
if (($_SERVER['HTTP_SEC_FETCH_SITE'] ?? 'same-origin') !== 'same-origin') {
    throw new Failure(403, 'cross_site', 'Requests from other sites are not answered.');
}
if ($method === 'POST' && !$token_ok) {
    throw new Failure(403, 'csrf', 'The X-CSRF-Token header is missing or out of date. Reload the page.');
}

// 3. What is asked?
$input = $method === 'POST' ? request_body() : $_GET;
$prompt = $input['prompt'] ?? null;
if (!is_string($prompt) || trim($prompt) === '') {
    throw new Failure(422, 'prompt_missing', 'Send a question in the field "prompt".');
}
if (preg_match('//u', $prompt) !== 1) {
    throw new Failure(422, 'prompt_not_utf8', 'The field "prompt" has to be UTF-8 text.');
}
$data = ['prompt' => $prompt, 'user' => $user, 'request_id' => bin2hex(random_bytes(8))];
$demo = array_filter([
    'tokens' => number($input, 'tokens', FILTER_VALIDATE_INT, 1, 100000),
    'tokens_per_second' => number($input, 'pace', FILTER_VALIDATE_FLOAT, 0.1, 10000),
], static fn ($value) => $value !== null);
if ($demo !== []) {
    $data['demo'] = $demo; // only the demo backend looks at it
}

// 4. Hand off.
try {
    handoff($config['target'], $data);
} catch (LengthException $error) {
    throw new Failure(422, 'prompt_too_long', "The question is too long: {$error->getMessage()}.");
}

/** @return array<mixed> the fields of a JSON or form body */
function request_body(): array
{
    if ((int) ($_SERVER['CONTENT_LENGTH'] ?? 0) > BODY_MAX) {
        throw new Failure(422, 'prompt_too_long', 'The request is too long: at most ' . BODY_MAX . ' bytes are read.');
    }
    if (!preg_match('~^application/json\b~i', $_SERVER['CONTENT_TYPE'] ?? '')) {
        return $_POST;
    }
    $body = json_decode((string) file_get_contents('php://input', false, null, 0, BODY_MAX), true, 8);
    if (!is_array($body)) {
        throw new Failure(422, 'invalid_json', 'The request body has to be a JSON object.');
    }
    return $body;
}

/** @param array<mixed> $input */
function number(array $input, string $field, int $filter, int|float $min, int|float $max): int|float|null
{
    if (!isset($input[$field])) {
        return null;
    }
    $options = ['options' => ['min_range' => $min, 'max_range' => $max]];
    $value = is_bool($input[$field]) ? false : filter_var($input[$field], $filter, $options);
    if ($value === false) {
        throw new Failure(422, "{$field}_invalid", "The field \"$field\" has to be a number from $min to $max.");
    }
    return $value;
}
