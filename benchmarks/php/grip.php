<?php
/**
 * Pushpin keeps the client; what is published for its channel is sent to it.
 */
declare(strict_types=1);
require __DIR__ . '/user.php';
header('Content-Type: text/event-stream; charset=utf-8');
header('Cache-Control: no-cache');
header('Grip-Hold: stream');
header("Grip-Channel: {$_COOKIE['user']}");
echo "data: {\"content\":\" nothing\"}\n\n";
