#!/usr/bin/env php
<?php
// SPDX-License-Identifier: Apache-2.0

/*
 * A whole streaming daemon in one file: a process per stream, plain PHP 8.2 from Debian (php-cli).
 *
 *  1. Apache connects to our SOCK_SEQPACKET socket once for every client, sends one message and hangs up.
 *  2. With the message comes a descriptor (SCM_RIGHTS): the client's TCP connection, which is ours alone from then on.
 *  3. Where the target says ack=on (here: --ack) we say one byte, 0x06, after accept; until then Apache sends nothing.
 *  4. A plain message is the application's data, or one NUL byte. It says nothing of the request: never chunk then.
 *  5. An envelope is a JSON object that begins {"handoff":2 and has the request, the application's headers and its data.
 *  6. Data that is too large for it is in a second descriptor, a memfd: check its seals and length, then read it from 0.
 *  7. We write the whole HTTP response, with Connection: close; chunked for HTTP/1.1 only; to HEAD the head only.
 *  8. At the end: shutdown(SHUT_WR), read and forget what the client still sends, close. A bare close cuts the answer.
 *  9. What is wrong with a message: 400 to the client who came with it, and every descriptor is closed.
 * 10. recvmsg may say 0 while a message is queued, and ECONNRESET where our 0x06 was not read: receive once more.
 *
 * All of it is docs/wire-protocol.md. systemd gives us the socket (LISTEN_FDS), see systemd/ beside this file. To try it:
 *
 *     systemd-socket-activate --seqpacket -l /run/handoff-php.sock php streaming_daemon.php
 *
 * It answers with the words of the data's "prompt"; replace words() by what your daemon is for. Its data is
 * {"prompt": "…", "demo": {"tokens": n, "tokens_per_second": r}}: that many words, at that pace. All may be missing.
 *
 * A process ends with its stream, and the kernel closes every descriptor that it had, whatever it was. Of Debian's
 * extensions it takes sockets, pcntl, and FFI, for the one system call (fcntl) that PHP has no function for.
 */

declare(strict_types=1);

const MOST_STREAMS = 500;       // processes; more clients wait in the socket's queue
const MOST_MESSAGE = 1 << 18;
const MOST_PAYLOAD = 8 << 20;
const MESSAGE_TIMEOUT = 5;      // seconds for Apache to send what it connected for
const WRITE_TIMEOUT = 30;       // seconds for a client to take one event
const LINGER_TIMEOUT = 2;       // seconds for a client to hang up after the answer

// From linux/fcntl.h.
const F_GET_SEALS = 1034;
const SEALS = 0x2 | 0x4 | 0x8;  // F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE

// The application's headers go to the client, but for those that frame the response or describe another body.
const NOT_COPIED = ['connection', 'content-length', 'content-type', 'date', 'keep-alive', 'proxy-connection', 'te',
    'trailer', 'transfer-encoding', 'upgrade'];

/** What is wrong with a message, for the client. */
final class Bad extends Exception
{
}

/** The client has left, or does not read; or Apache changed its mind. */
final class Gone extends Exception
{
}

/** Text as a JSON object. Of a name that is there twice, the last counts. */
function parse(string $text, string $what): stdClass
{
    $value = json_decode($text);
    return $value instanceof stdClass ? $value : throw new Bad("$what must be a JSON object in UTF-8");
}

function is_between(mixed $value, int $low, int $high): bool
{
    return is_int($value) && $low <= $value && $value <= $high;
}

function is_end(mixed $value): bool
{
    return $value instanceof stdClass && is_string($value->addr ?? null) && is_between($value->port ?? null, 0, 65535);
}

function is_headers(mixed $value): bool
{
    foreach (is_array($value) ? $value : [null] as $pair) {
        if (!is_array($pair) || count($pair) !== 2 || !is_string($pair[0]) || !is_string($pair[1])) {
            return false;
        }
    }
    return true;
}

/** Members that we do not know are ignored; one that is missing or of the wrong form spoils the whole. */
function check_envelope(stdClass $envelope): void
{
    $text = is_string(...);
    $text_or_null = fn (mixed $value): bool => $value === null || is_string($value);
    $forms = ['id' => $text, 'method' => $text, 'uri' => $text, 'protocol' => $text, 'scheme' => $text,
        'target' => $text, 'host' => $text_or_null, 'data' => $text_or_null,
        'client' => is_end(...), 'peer' => is_end(...),
        'headers' => is_headers(...), 'response_headers' => is_headers(...),
        'handoff' => fn (mixed $value): bool => $value === 2,
        'status' => fn (mixed $value): bool => is_between($value, 100, 999),
        'unread_body' => fn (mixed $value): bool => is_between($value, -1, PHP_INT_MAX),
        'prefetched' => fn (mixed $value): bool => is_between($value, 0, PHP_INT_MAX)];
    foreach ($forms as $name => $fits) {
        if (!property_exists($envelope, $name) || !$fits($envelope->$name)) {
            throw new Bad("$name is missing or wrong");
        }
    }
    if (property_exists($envelope, 'user') && !is_string($envelope->user)) {
        throw new Bad('user is wrong');
    }
}

/** The application's data, from the envelope or from the memfd behind the client. */
function data_of(stdClass $envelope, array $extra): string
{
    if (!property_exists($envelope, 'payload')) {
        return $extra === [] ? $envelope->data ?? '' : throw new Bad('a descriptor too many');
    }
    $payload = $envelope->payload;
    // php-sockets makes a stream of a descriptor that is no socket.
    if (!$payload instanceof stdClass || ($payload->memfd ?? null) !== true || $envelope->data !== null
        || count($extra) !== 1 || !is_resource($extra[0])) {
        throw new Bad('payload is wrong');
    }
    $length = $payload->length ?? null;
    $stat = fstat($extra[0]);
    if (!is_between($length, 0, MOST_PAYLOAD) || $stat['size'] !== $length || (seals_of($stat) & SEALS) !== SEALS) {
        throw new Bad('payload is not a sealed memfd of that length');
    }
    $data = stream_get_contents($extra[0], $length, 0);
    return is_string($data) && strlen($data) === $length ? $data : throw new Bad('payload cannot be read');
}

/** The seals of our descriptor of that file, whose number PHP does not tell; 0 for what is no memfd. */
function seals_of(array $stat): int
{
    foreach (scandir('/proc/self/fd') as $fd) {
        $other = @stat("/proc/self/fd/$fd");
        if (ctype_digit($fd) && $other && $other['ino'] === $stat['ino'] && $other['dev'] === $stat['dev']) {
            return max(0, FFI::cdef('int fcntl(int, int, ...);')->fcntl((int) $fd, F_GET_SEALS));
        }
    }
    return 0;
}

/** The answer, piece by piece, and microseconds from one to the next. Here your own daemon begins. */
function words(string $data): array
{
    $text = trim($data, "\0 \t\r\n");
    $asked = $text === '' ? new stdClass() : parse($text, 'the data');
    $prompt = $asked->prompt ?? '';
    $demo = $asked->demo ?? new stdClass();
    if (!is_string($prompt)) {
        throw new Bad('prompt must be a string');
    }
    if (!$demo instanceof stdClass) {
        throw new Bad('demo must be an object');
    }
    $prompt = $prompt === '' ? 'Hello from a daemon of one file.' : $prompt;
    preg_match_all('/[ \t\r\n]*[^ \t\r\n]+|[ \t\r\n]+$/D', $prompt, $found);
    $tokens = $demo->tokens ?? count($found[0]);
    $pace = $demo->tokens_per_second ?? 20;
    if (!is_between($tokens, 1, 100_000)) {
        throw new Bad('demo.tokens must be an integer from 1 to 100000');
    }
    if (!is_int($pace) && !is_float($pace) || $pace < 0.1 || $pace > 10_000) {
        throw new Bad('demo.tokens_per_second must be a number from 0.1 to 10000');
    }
    $pieces = (function () use ($found, $tokens): Generator {
        for ($i = 0; $i < $tokens; $i++) {
            yield $found[0][$i % count($found[0])];
        }
    })();
    return [$pieces, (int) (1_000_000 / $pace)];
}

/** The connection of one client. */
final class Client
{
    public bool $chunked = false;
    public bool $wants_body = true;

    public function __construct(private readonly Socket $socket)
    {
        // It came O_NONBLOCK. This process has one client only, and may wait for it, though not for ever.
        socket_set_block($socket);
        socket_set_option($socket, SOL_SOCKET, SO_SNDTIMEO, ['sec' => WRITE_TIMEOUT, 'usec' => 0]);
        socket_set_option($socket, SOL_SOCKET, SO_RCVTIMEO, ['sec' => LINGER_TIMEOUT, 'usec' => 0]);
    }

    public function send(string $bytes): void
    {
        for ($done = 0; $done < strlen($bytes); $done += $sent) {
            // A part at a time: the tail of a long text would be copied again and again.
            $part = substr($bytes, $done, 1 << 16);
            $sent = @socket_send($this->socket, $part, strlen($part), MSG_NOSIGNAL);
            if (!$sent) {
                throw new Gone('the client left or does not read');
            }
        }
    }

    public function event(string $event): void
    {
        $this->send($this->chunked ? sprintf("%x\r\n%s\r\n", strlen($event), $event) : $event);
    }

    public function refuse(Bad $error): void
    {
        $body = json_encode(['error' => ['type' => 'bad_request', 'message' => $error->getMessage()]]);
        $this->send("HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            . 'Content-Length: ' . strlen($body) . "\r\nCache-Control: no-store\r\n\r\n"
            . ($this->wants_body ? $body : ''));
    }

    /** FIN now; then wait for the client's, because a close with unread bytes resets the connection. */
    public function linger(): void
    {
        $until = time() + LINGER_TIMEOUT;
        if (@socket_shutdown($this->socket, 1)) {
            while (time() <= $until && @socket_recv($this->socket, $forgotten, 65536, 0)) {
                continue;
            }
        }
    }

    /** Understand the message, with the descriptors that came behind the client's, and write the response. */
    public function answer(string $message, array $extra): void
    {
        $headers = [];
        if (preg_match('/\A\{"handoff":-?[0-9]/', $message)) {
            $envelope = parse($message, 'the message');
            $this->wants_body = ($envelope->method ?? '') !== 'HEAD';
            check_envelope($envelope);
            $headers = $envelope->response_headers;
            [$pieces, $pause] = words(data_of($envelope, $extra));
            $this->chunked = $envelope->protocol === 'HTTP/1.1' && $this->wants_body;
        } elseif ($extra !== []) {
            throw new Bad('a descriptor too many');
        } else {
            [$pieces, $pause] = words($message);
        }
        $head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n"
            . "X-Accel-Buffering: no\r\n" . ($this->chunked ? "Transfer-Encoding: chunked\r\n" : '');
        if (!in_array('cache-control', array_map(strtolower(...), array_column($headers, 0)), true)) {
            $head .= "Cache-Control: no-cache\r\n";
        }
        foreach ($headers as [$name, $value]) {
            if (preg_match('/^[!#$%&\'*+.^_`|~0-9A-Za-z-]+$/D', $name) && !preg_match('/[\r\n\0]/', $value)
                && !in_array(strtolower($name), NOT_COPIED, true)) {
                $head .= "$name: $value\r\n";
            }
        }
        $this->send("$head\r\n");
        if (!$this->wants_body) {
            return;
        }
        foreach ($pieces as $piece) {
            // One event per piece, which is whole characters, never some bytes of one.
            $this->event('data: ' . json_encode(['content' => $piece], JSON_UNESCAPED_UNICODE) . "\n\n");
            usleep($pause);
        }
        $this->event("data: [DONE]\n\n");
        if ($this->chunked) {
            $this->send("0\r\n\r\n");
        }
    }
}

/** The one message of this connection: bytes, descriptors, whether some of either were cut off. */
function receive(Socket $apache): array
{
    socket_set_block($apache);
    socket_set_option($apache, SOL_SOCKET, SO_RCVTIMEO, ['sec' => MESSAGE_TIMEOUT, 'usec' => 0]);
    for ($try = 0; $try < 3; $try++) {
        // Without controllen PHP gives the kernel no room for descriptors, and without buffer_size 8 KiB for the bytes.
        $received = ['buffer_size' => MOST_MESSAGE, 'controllen' => socket_cmsg_space(SOL_SOCKET, SCM_RIGHTS, 253)];
        $length = @socket_recvmsg($apache, $received, 0);
        // Of this function PHP keeps the error only where no socket is named.
        if ($length === false && socket_last_error() !== SOCKET_ECONNRESET) {
            throw new Gone('no message: ' . socket_strerror(socket_last_error()));
        }
        $control = $length === false ? [] : $received['control'];
        if ($length || $control) {
            $cut = ($received['flags'] & (MSG_TRUNC | MSG_CTRUNC)) !== 0;
            return [implode('', $received['iov']), $control[0]['data'] ?? [], $cut];
        }
    }
    throw new Gone('Apache hung up');
}

/** One handoff, from Apache's connection to the client's end. */
function serve(Socket $apache, bool $ack): void
{
    if ($ack) {
        @socket_send($apache, "\x06", 1, MSG_NOSIGNAL); // false only says that it was not waited for
    }
    [$message, $extra, $cut] = receive($apache);
    socket_close($apache);
    $socket = array_shift($extra);
    // PHP has a Socket for each descriptor that is one, and a stream for the others.
    if (!$socket instanceof Socket || socket_get_option($socket, SOL_SOCKET, SO_TYPE) !== SOCK_STREAM) {
        throw new Gone('no client came with the message');
    }
    $client = new Client($socket);
    try {
        $cut ? throw new Bad('the message is too long') : $client->answer($message, $extra);
    } catch (Bad $error) {
        $client->refuse($error);
    }
    $client->linger();
}

if (getenv('LISTEN_PID') !== (string) getmypid() || getenv('LISTEN_FDS') !== '1') {
    fwrite(STDERR, "start me by a .socket unit with one ListenSequentialPacket=, or by systemd-socket-activate --seqpacket\n");
    exit(1);
}
$listener = socket_import_stream(fopen('php://fd/3', 'r+'));
socket_set_nonblock($listener);
$ack = in_array('--ack', $argv, true);
$running = 0;
while (true) {
    // Forget the processes that have ended; wait for one of them where there are too many.
    while ($running > 0 && pcntl_waitpid(-1, $status, $running < MOST_STREAMS ? WNOHANG : 0) > 0) {
        $running--;
    }
    $read = [$listener];
    $none = null;
    if (@socket_select($read, $none, $none, 1) && ($apache = @socket_accept($listener))) {
        while (($pid = @pcntl_fork()) < 0) {
            usleep(100_000); // no process or memory left, for now: whoever has come must not be dropped for it
        }
        if ($pid === 0) {
            try {
                socket_close($listener);
                serve($apache, $ack);
            } catch (Gone $end) {
                fwrite(STDERR, "handoff ended: {$end->getMessage()}\n");
            }
            exit(0);
        }
        $running++;
        socket_close($apache);
    }
}
