<?php
/** GET /session.php: who is logged in, and the token to send with POST. For scripts; it starts a session. */
declare(strict_types=1);
require __DIR__ . '/../lib.php';

fail_as('json');
allow_methods('GET', 'HEAD');
open_session();
send_json(200, ['user' => current_user(), 'csrf' => csrf_token()]);
