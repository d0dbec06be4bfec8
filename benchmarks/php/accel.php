<?php
/**
 * nginx fetches the answer itself, from a location that only PHP can name.
 */
declare(strict_types=1);
require __DIR__ . '/user.php';
header('Content-Type: text/event-stream; charset=utf-8');
header('Cache-Control: no-cache');
header("X-Accel-Redirect: /model/{$_GET['pace']}x{$_GET['tokens']}");
