<?php
/**
 * So many questions per user and minute, before the daemon hears of them.
 *
 * The daemon has limits too (`[limits]`: streams per user at once, new ones per second, by the `user` that is sent here);
 * this one is for what the application alone knows: who has paid for how much. It counts in a file per user under a
 * lock, which one host is content with; several need a database or Redis, and the same four lines in between.
 */
declare(strict_types=1);

use SocketHandoff\SocketHandoff;

require __DIR__ . '/SocketHandoff.php'; // examples/php-helper, or Composer's autoload.php

const QUESTIONS = 3;
const SECONDS = 60;
const PROMPT_MAX = 20000; // bytes: more is nobody's question, and paid for

function refuse(int $status, string $type, string $message): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode(['error' => ['type' => $type, 'message' => $message]]));
}

/** Counts this question; the seconds to wait where it is one too many, which then does not count, otherwise 0. */
function seconds_to_wait(string $user, int $now): int
{
    // HANDOFF_STATE: a directory that only PHP can write to. The name is a hash: a user's may have slashes and dots.
    $file = fopen(getenv('HANDOFF_STATE') . '/rate-' . hash('sha256', $user), 'c+');
    flock($file, LOCK_EX); // two tabs at the same moment are counted one after the other
    $times = array_filter(
        array_map(intval(...), explode("\n", (string) stream_get_contents($file))),
        static fn (int $time): bool => $time > $now - SECONDS,
    );
    $wait = count($times) < QUESTIONS ? 0 : min($times) + SECONDS - $now;
    if ($wait === 0) {
        $times[] = $now;
        ftruncate($file, 0);
        rewind($file);
        fwrite($file, implode("\n", $times));
    }
    fclose($file); // and the lock with it
    return $wait;
}

// The login sets the cookie, with its options (README.md): who has none gets none here, and no session for knocking.
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
// Only now, so that no other page can use up what the user may ask.
$wait = seconds_to_wait($user, time());
if ($wait > 0) {
    header("Retry-After: $wait");
    refuse(429, 'rate_limited', "That were enough questions; ask again in $wait seconds.");
}
SocketHandoff::to('llm')->with(['prompt' => $prompt, 'user' => $user])->send();
