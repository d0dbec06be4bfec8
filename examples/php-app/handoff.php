<?php
/**
 * The one function to copy into an application of your own: give this request's connection to a daemon.
 */
declare(strict_types=1);

/**
 * mod_proxy_fcgi reads PHP-FPM's response headers into an 8192-byte line buffer: with Apache 2.4.71 a line of 8189 bytes
 * passes and one of 8190 becomes "500 Premature end of script headers". mod_php has no such limit; do not depend on that.
 */
const HANDOFF_LINE_MAX = 8000;

/**
 * Sets the two headers that mod_socket_handoff acts on and ends the request.
 *
 * @param string               $socket absolute path of the daemon's socket
 * @param array<string, mixed> $data   what the daemon has to know; strings are UTF-8
 * @throws JsonException   if $data is not UTF-8
 * @throws LengthException if $data makes a header line of more than HANDOFF_LINE_MAX bytes
 * @throws LogicException  if output was sent before, so that headers can no longer be set
 */
function handoff(string $socket, array $data): never
{
    // Without JSON_UNESCAPED_UNICODE every character beyond ASCII becomes \uXXXX and every control byte is escaped,
    // so the text is a legal header value whatever the user typed. DEL is the one exception that json_encode leaves.
    $json = json_encode($data, JSON_UNESCAPED_SLASHES | JSON_PRESERVE_ZERO_FRACTION | JSON_THROW_ON_ERROR);
    $line = 'X-Handoff-Data: ' . str_replace("\x7f", '\u007f', $json);
    if (strlen($line) > HANDOFF_LINE_MAX) {
        throw new LengthException(sprintf('header line of %d bytes, at most %d fit', strlen($line), HANDOFF_LINE_MAX));
    }
    if (headers_sent($file, $number)) {
        throw new LogicException("output started in $file:$number, too late to hand the connection off");
    }
    // The user's next request must not wait for a lock that this one still holds.
    session_write_close();
    header("X-Socket-Handoff: $socket");
    header($line);
    // The daemon, not PHP, sends status line, headers and body. Whatever is printed from here on is thrown away.
    exit;
}
