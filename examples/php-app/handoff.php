<?php
/**
 * The one function to copy into an application of your own: give this request's connection to a daemon.
 */
declare(strict_types=1);

/**
 * mod_proxy_fcgi reads PHP-FPM's response headers into an 8192-byte line buffer, and a longer line becomes "500 Premature
 * end of script headers". Larger data therefore goes as the response body, which has no such limit. The rest of the
 * 8192 bytes is not worth coming close.
 */
const HANDOFF_LINE_MAX = 6000;

/** Apache's SocketHandoffMaxPayload, as it is by default. */
const HANDOFF_DATA_MAX = 8388608;

/**
 * Sets the headers that mod_socket_handoff acts on and ends the request.
 *
 * What the data is, and a user typed, is in no exception: its trace ends in a log where zend.exception_ignore_args is off.
 *
 * @param string               $target name of the daemon as Apache knows it, or the path of its socket
 * @param array<string, mixed> $data   what the daemon has to know; strings are UTF-8
 * @throws JsonException   if $data is not UTF-8, or otherwise cannot be written as JSON
 * @throws LengthException if $data is larger than HANDOFF_DATA_MAX
 * @throws LogicException  if output was sent before, so that headers can no longer be set
 */
function handoff(string $target, #[SensitiveParameter] array $data): never
{
    // Without JSON_UNESCAPED_UNICODE every character beyond ASCII becomes \uXXXX and every control byte is escaped,
    // so the text is a legal header value whatever the user typed. DEL is the one exception that json_encode leaves.
    // An object also where there is no data: the daemon does not take [] for it.
    $flags = JSON_UNESCAPED_SLASHES | JSON_PRESERVE_ZERO_FRACTION;
    $line = json_encode((object) $data, $flags);
    if ($line === false) { // not JSON_THROW_ON_ERROR, whose exception would have the data in its trace
        throw new JsonException('the data is no JSON: ' . json_last_error_msg(), json_last_error());
    }
    $how = 'X-Handoff-Data: ' . str_replace("\x7f", '\u007f', $line);
    $body = '';
    if (strlen($how) > HANDOFF_LINE_MAX) {
        $how = 'X-Handoff-Data-From: response-body';
        $body = json_encode((object) $data, $flags | JSON_UNESCAPED_UNICODE);
        if (strlen($body) > HANDOFF_DATA_MAX) {
            throw new LengthException(sprintf('%d bytes of data, at most %d fit', strlen($body), HANDOFF_DATA_MAX));
        }
    }
    if (headers_sent($file, $number)) {
        throw new LogicException("output started in $file:$number, too late to hand the connection off");
    }
    // The user's next request must not wait for a lock that this one still holds.
    session_write_close();
    if ($body !== '') {
        // The body is the data and nothing else: not what was printed before, and not packed.
        while (ob_get_level() > 0 && ob_end_clean());
        ini_set('zlib.output_compression', '0');
    }
    header("X-Socket-Handoff: $target");
    header($how);
    // Cookies and other headers that were set before reach the browser; the daemon sends them with its answer.
    echo $body;
    exit;
}
