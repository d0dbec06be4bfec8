<?php
/**
 * PHP streams itself: the worker is this answer's until it is over.
 */
declare(strict_types=1);
require __DIR__ . '/user.php';
set_time_limit(0);
header('Content-Type: text/event-stream; charset=utf-8');
header('Cache-Control: no-cache');
while (ob_get_level() > 0) {
    ob_end_flush();
}
$due = microtime(true);
for ($number = 0; $number < $tokens; $number++) {
    // A client that left ends this script: PHP notices when it writes.
    echo "data: {\"content\":\" nothing\"}\n\n";
    flush();
    $due += 1 / $pace;
    $wait = $due - microtime(true);
    if ($wait > 0) {
        usleep((int) ($wait * 1e6));
    }
}
echo "data: [DONE]\n\n";
