<?php
/**
 * HTML that more than one script prints: the frame of a page, the login form, an error.
 */
declare(strict_types=1);

function e(string $text): string
{
    return htmlspecialchars($text, ENT_QUOTES | ENT_SUBSTITUTE, 'UTF-8');
}

function page_top(string $title, string $class): void
{
    send_headers('text/html; charset=utf-8');
    ?>
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<meta name="color-scheme" content="light dark">
<title><?= e($title) ?></title>
<link rel="icon" href="/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/style.css">
</head>
<body class="<?= e($class) ?>">
<?php
}

function page_end(): void
{
    echo "</body>\n</html>\n";
}

/** The login page; needs an open session for its token. */
function login_page(int $status = 200, string $error = '', string $user = ''): never
{
    $token = csrf_token();
    session_write_close();
    http_response_code($status);
    page_top('Sign in · Handoff', 'narrow');
    ?>
<main class="card">
  <img class="mark" src="/icon.svg" alt="" width="44" height="44">
  <h1>Sign in</h1>
  <p class="lead">Ask a question and watch the answer being written.</p>
<?php if ($error !== '') { ?>
  <p class="notice" role="alert" id="login-error"><?= e($error) ?></p>
<?php } ?>
  <form method="post" action="/login.php" class="stack">
    <input type="hidden" name="csrf" value="<?= e($token) ?>">
    <label for="user">User name</label>
    <input id="user" name="user" type="text" autocomplete="username" autocapitalize="none" spellcheck="false" required
      maxlength="256" value="<?= e($user) ?>"<?= $user === '' ? ' autofocus' : '' ?>>
    <label for="password">Password</label>
    <input id="password" name="password" type="password" autocomplete="current-password" required
      maxlength="256"<?= $user === '' ? '' : ' autofocus' ?><?= $error === '' ? '' : ' aria-describedby="login-error"' ?>>
    <button type="submit" class="primary">Sign in</button>
  </form>
</main>
<?php
    page_end();
    exit;
}

function error_page(int $status, string $message): never
{
    http_response_code($status);
    page_top('Error · Handoff', 'narrow');
    ?>
<main class="card">
  <img class="mark" src="/icon.svg" alt="" width="44" height="44">
  <h1><?= $status >= 500 ? 'This page cannot be shown' : 'That did not work' ?></h1>
  <p class="notice" role="alert"><?= e($message) ?></p>
  <p><a class="button" href="/">Back to the start</a></p>
</main>
<?php
    page_end();
    exit;
}
