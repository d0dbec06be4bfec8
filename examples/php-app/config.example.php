<?php
// Copy to /etc/handoff-app/config.php, owner root, group www-data, mode 0640.
return [
    // The daemon, by the name of a SocketHandoffTarget that SocketHandoffAllow permits here. The path of its socket
    // does as well; without any SocketHandoffTarget it is the only form, and SocketHandoffAllowedPrefix permits it.
    'target' => 'llm',
    'user' => 'demo',
    // php -r 'echo password_hash(readline("Password: "), PASSWORD_DEFAULT), "\n";'
    'password_hash' => '',
];
