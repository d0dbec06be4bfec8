<?php
/**
 * Who is asking: what every page of the benchmark does first, so that all contenders' PHP does the same work.
 */
declare(strict_types=1);

/** As in a session's cookie: a name, and proof that we gave it. */
const KEY = 'benchmark';

if (!hash_equals(hash_hmac('sha256', 'streams', KEY), $_COOKIE['proof'] ?? '') || !isset($_COOKIE['user'])) {
    http_response_code(401);
    exit("not logged in\n");
}

/** How long and how fast the answer is: ?tokens=, ?pace= (per second). */
$tokens = (int) ($_GET['tokens'] ?? 10);
$pace = (float) ($_GET['pace'] ?? 1);
