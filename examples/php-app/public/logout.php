<?php
/** POST /logout.php (csrf): ends the session, 303 to the login form. */
declare(strict_types=1);
require __DIR__ . '/../lib.php';

fail_as('html');
allow_methods('POST');
open_session();
if (!csrf_matches($_POST['csrf'] ?? null)) {
    throw new Failure(403, 'csrf', 'This form was too old. Go back to the start and try again.');
}
$cookie = session_get_cookie_params();
unset($cookie['lifetime']);
setcookie(session_name(), '', ['expires' => 1] + $cookie);
session_destroy();
redirect('/');
