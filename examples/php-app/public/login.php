<?php
/** POST /login.php (user, password, csrf): 303 to the page, or the form again with 401 or 403. */
declare(strict_types=1);
require __DIR__ . '/../lib.php';
require __DIR__ . '/../page.php';

fail_as('html');
if (allow_methods('GET', 'HEAD', 'POST') !== 'POST') {
    redirect('/'); // somebody went back to, or bookmarked, the address of a failed login
}
config();
open_session();
$user = is_string($_POST['user'] ?? null) ? $_POST['user'] : '';
$password = is_string($_POST['password'] ?? null) ? $_POST['password'] : '';

// Also before a login: else another site could log the browser in as somebody who then reads what is asked.
if (!csrf_matches($_POST['csrf'] ?? null)) {
    login_page(403, 'This form was too old. Please sign in again.', $user);
}
if (!log_in($user, $password)) {
    login_page(401, 'User name or password is wrong.', $user);
}
redirect('/');
