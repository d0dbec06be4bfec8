<?php
/**
 * What the pages share: configuration, session and login, CSRF, response headers, errors.
 *
 * A script says in its first lines how it answers errors (fail_as) and which methods it takes (allow_methods); from then
 * on anything that is wrong is a thrown Failure, and nothing is printed before everything has been checked.
 */
declare(strict_types=1);

const CONFIG_PATH = '/etc/handoff-app/config.php';

// A warning printed into a response would be taken for part of the answer; errors belong in the log.
ini_set('display_errors', '0');
header_remove('X-Powered-By');

/** An answer that is not the one the client asked for. */
final class Failure extends RuntimeException
{
    /** @param array<string, string> $headers */
    public function __construct(
        public readonly int $status,
        public readonly string $type,
        string $message,
        public readonly array $headers = [],
    ) {
        parent::__construct($message);
    }
}

/** Sends every uncaught Failure as 'json' (scripts) or 'html' (pages); other exceptions become a 500 without details. */
function fail_as(string $format): void
{
    set_exception_handler(static function (Throwable $error) use ($format): void {
        // An operator has asked for maintenance, and a load balancer asks twice a second: nothing has failed.
        if (!$error instanceof Failure || ($error->status >= 500 && $error->type !== 'maintenance')) {
            error_log('handoff-app: ' . $error->getMessage() . ' (' . $error->getFile() . ':' . $error->getLine() . ')');
        }
        if (!$error instanceof Failure) {
            $error = new Failure(500, 'internal_error', 'Something went wrong here; the error log says what.');
        }
        foreach ($error->headers as $name => $value) {
            header("$name: $value");
        }
        if ($format === 'json') {
            send_json($error->status, ['error' => ['type' => $error->type, 'message' => $error->getMessage()]]);
        }
        require_once __DIR__ . '/page.php';
        error_page($error->status, $error->getMessage());
    });
}

/** The request's method, if it is one of $methods. HEAD goes with GET for pages, which name it. */
function allow_methods(string ...$methods): string
{
    $method = $_SERVER['REQUEST_METHOD'];
    if (!in_array($method, $methods, true)) {
        $allowed = implode(', ', $methods);
        throw new Failure(405, 'method_not_allowed', "This address takes $allowed.", ['Allow' => $allowed]);
    }
    return $method;
}

/** A client can only set variables whose names begin with HTTP_, so both sources are the operator's. */
function config_path(): string
{
    return ($_SERVER['HANDOFF_APP_CONFIG'] ?? getenv('HANDOFF_APP_CONFIG')) ?: CONFIG_PATH;
}

/** @return array{target: string, user: string, password_hash: string} */
function config(): array
{
    static $config = null;
    if ($config !== null) {
        return $config;
    }
    $path = config_path();
    if (!is_file($path) || !is_readable($path)) {
        throw new Failure(500, 'not_configured', "The configuration file $path is missing, or Apache may not read it.");
    }
    try {
        $config = require $path;
    } catch (Throwable $error) {
        // PHP's message quotes the file, which holds a password hash: that is for the log, not for a client.
        error_log("handoff-app: $path: {$error->getMessage()}");
        throw new Failure(500, 'not_configured', "The configuration file $path has an error in line {$error->getLine()}.");
    }
    if (is_array($config)) {
        $config['target'] ??= $config['socket'] ?? null; // as it was called when there were only paths
    }
    $forms = [
        'target' => '~^([A-Za-z0-9][A-Za-z0-9._-]{0,63}|/[\x21-\x7e]+)$~D',
        'user' => '~^.+$~Ds',
        'password_hash' => '~^\$.+$~D',
    ];
    foreach ($forms as $key => $form) {
        if (!is_array($config) || !is_string($config[$key] ?? null) || !preg_match($form, $config[$key])) {
            $config = null;
            $what = "The configuration file $path has no usable '$key'";
            throw new Failure(500, 'not_configured', "$what; see config.example.php.");
        }
    }
    return $config;
}

/** TLS ends at a load balancer in front of Apache; the vhost sets HTTPS for such requests (see README). */
function is_https(): bool
{
    return !in_array(strtolower($_SERVER['HTTPS'] ?? ''), ['', 'off'], true);
}

/** The __Host- prefix makes browsers refuse the cookie from sub-domains and from plain HTTP. */
function session_cookie_name(): string
{
    return is_https() ? '__Host-handoff' : 'handoff';
}

/** Starts or resumes the session and takes its lock. Nothing about it depends on php.ini. */
function open_session(): void
{
    $started = @session_start([
        'name' => session_cookie_name(),
        'use_strict_mode' => '1',      // an id that the server did not issue is replaced: no fixation from outside
        'use_only_cookies' => '1',
        'use_trans_sid' => '0',
        'cookie_path' => '/',
        'cookie_domain' => '',
        'cookie_lifetime' => '0',
        'cookie_secure' => is_https() ? '1' : '0',
        'cookie_httponly' => '1',
        'cookie_samesite' => 'Strict', // GET /stream.php relies on it where browsers send no Sec-Fetch-Site
        'cache_limiter' => '',         // send_headers() does this, and stream.php must not add headers of its own
    ]);
    if (!$started) {
        throw new Failure(500, 'no_session', 'No session could be opened; is session.save_path writable and not full?');
    }
}

/** The logged-in user of the open session. */
function current_user(): ?string
{
    $mark = $_SESSION['login'] ?? null;
    return is_string($mark) && hash_equals(login_mark(), $mark) ? config()['user'] : null;
}

/**
 * Makes the open session a logged-in one if the credentials are right.
 *
 * The hash is verified whatever the name was, so an unknown name takes as long as a wrong password.
 */
function log_in(string $user, string $password): bool
{
    $right_password = password_verify($password, config()['password_hash']);
    $right_user = hash_equals(config()['user'], $user);
    if (!$right_password || !$right_user) {
        return false;
    }
    session_regenerate_id(true); // an id that was known before the login must not be worth anything after it
    $_SESSION = ['login' => login_mark()];
    return true;
}

/**
 * What a logged-in session holds. It names the user and the password hash, so changing either ends every session; and
 * another application that shares session.save_path cannot produce it by chance.
 */
function login_mark(): string
{
    return hash('sha256', "handoff-app\0" . config()['user'] . "\0" . config()['password_hash']);
}

/** The open session's token; a request that changes something has to bring it along. */
function csrf_token(): string
{
    if (!is_string($_SESSION['csrf'] ?? null)) {
        $_SESSION['csrf'] = bin2hex(random_bytes(32));
    }
    return $_SESSION['csrf'];
}

function csrf_matches(mixed $token): bool
{
    return is_string($token) && is_string($_SESSION['csrf'] ?? null) && hash_equals($_SESSION['csrf'], $token);
}

/** Headers of everything PHP answers itself. A stream's headers come from the daemon. */
function send_headers(string $content_type): void
{
    header("Content-Type: $content_type");
    header('Cache-Control: no-store');
    header('X-Content-Type-Options: nosniff');
    header('Referrer-Policy: no-referrer');
    header('Cross-Origin-Opener-Policy: same-origin');
    header('Cross-Origin-Resource-Policy: same-origin');
    header("Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        . "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'");
}

/** @param array<string, mixed> $value */
function send_json(int $status, array $value): never
{
    http_response_code($status);
    send_headers('application/json');
    echo json_encode($value, JSON_UNESCAPED_SLASHES | JSON_INVALID_UTF8_SUBSTITUTE), "\n";
    exit;
}

function redirect(string $path): never
{
    // 303: the browser asks for the page with GET, so a reload does not send the form again.
    header("Location: $path", true, 303);
    header('Cache-Control: no-store');
    exit;
}
