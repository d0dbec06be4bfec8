<?php
// Copy to /etc/handoff-app/config.php, owner root, group www-data, mode 0640.
return [
    // The daemon's socket. Apache hands the browser's connection to it if SocketHandoffAllowedPrefix permits the path.
    'socket' => '/run/streaming-daemon.sock',
    'user' => 'demo',
    // php -r 'echo password_hash(readline("Password: "), PASSWORD_DEFAULT), "\n";'
    'password_hash' => '',
];
