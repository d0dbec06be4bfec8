<?php
/**
 * Hands the client to the daemon: with ?backend=demo the daemon's own text, otherwise what the model says.
 */
declare(strict_types=1);
require __DIR__ . '/user.php';
require __DIR__ . '/lib/handoff.php'; // examples/php-app/handoff.php
$data = ['prompt' => 'What happened on the way to this answer?', 'user' => $_COOKIE['user'], 'model' => "{$pace}x$tokens"];
if (($_GET['backend'] ?? '') === 'demo') {
    $data = ['user' => $_COOKIE['user'], 'demo' => ['tokens' => $tokens, 'tokens_per_second' => $pace]];
}
handoff('llm', $data);
