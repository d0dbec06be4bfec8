<?php
declare(strict_types=1);

namespace SocketHandoff;

use InvalidArgumentException;
use LengthException;
use LogicException;
use SensitiveParameter;
use stdClass;

/**
 * Gives this request's connection to a daemon, by the response headers that Apache's mod_socket_handoff acts on.
 *
 *     SocketHandoff::to('llm')->with(['prompt' => $prompt, 'user' => $user])->send();
 *
 * An object does not change: to() and with() return new ones. Whatever Apache or the daemon would refuse is an exception
 * here, where the mistake is: it names the member, never a text that a user typed. send() ends the request; a framework
 * that sends responses itself takes headers() and body() instead.
 *
 * What the members are is kept out of stack traces too, which end in logs where zend.exception_ignore_args is off.
 *
 * What the members mean is said in docs/wire-protocol.md, "What the application and our daemon agreed on".
 */
final class SocketHandoff
{
    /**
     * Bytes of the header line. mod_proxy_fcgi reads PHP-FPM's headers into an 8192-byte buffer, and a longer line is a
     * "500 Premature end of script headers"; larger data goes as the response body, which has no such limit.
     */
    private const HEADER_LINE_MAX = 6000;
    /** Apache's SocketHandoffMaxPayload and the daemon's listen.max_payload, both by default: bytes of a body. */
    private const BODY_MAX = 8388608;
    /** Arrays and objects inside one another, and values altogether, that the daemon reads. */
    private const DEPTH_MAX = 100;
    private const VALUES_MAX = 100000;
    /** The largest number of an event: what JavaScript holds exactly. */
    private const EVENT_MAX = 9007199254740991;

    /** @param array<string, mixed> $members */
    private function __construct(
        private readonly string $target,
        #[SensitiveParameter] private readonly array $members,
        private readonly int $most,
    ) {
    }

    /**
     * @param string $target the name of Apache's SocketHandoffTarget, or the path of its socket
     * @param int    $most   bytes of data; for a target without envelope=on, which takes one message, 200000
     * @throws InvalidArgumentException if no target can be called so
     */
    public static function to(string $target, int $most = self::BODY_MAX): self
    {
        if (!preg_match('~^(?:[A-Za-z0-9][A-Za-z0-9._-]{0,63}|/[\x21-\x7e]{1,106})$~D', $target)) {
            throw new InvalidArgumentException('the target ' . json_encode($target, JSON_INVALID_UTF8_SUBSTITUTE)
                . ' is neither a name (1 to 64 letters, digits, ".", "_" and "-", the first a letter or digit)'
                . ' nor the absolute path of a socket');
        }
        if ($most < 2) {
            throw new InvalidArgumentException("at most $most bytes of data are none; allowed is 2 or more");
        }
        return new self($target, [], $most);
    }

    /**
     * Adds members of the data; one that is there already is replaced, null takes it away.
     *
     * @param array<string, mixed> $members as the daemon reads them; others are the application's own
     * @throws InvalidArgumentException if the daemon would answer 400 to one of them
     */
    public function with(#[SensitiveParameter] array $members): self
    {
        foreach ($members as $name => $value) {
            if (!is_string($name)) {
                throw new InvalidArgumentException("with() takes members by their names; $name is a position");
            }
            if ($value !== null) {
                self::check($name, $value);
            }
        }
        $all = array_filter([...$this->members, ...$members], static fn (mixed $value): bool => $value !== null);
        if (($all['demo'] ?? null) === []) {
            unset($all['demo']); // it would be written as a list, which it is not
        }
        return new self($this->target, $all, $this->most);
    }

    /**
     * The response headers that hand the connection off, of which Apache shows none to the client.
     *
     * @return array<string, string>
     * @throws InvalidArgumentException if the data cannot be written as the JSON that the daemon reads
     * @throws LengthException          if it is larger than $most
     */
    public function headers(): array
    {
        return $this->response()[0];
    }

    /**
     * The response body that goes with these headers: the data, where it is too large for one, otherwise nothing.
     *
     * @throws InvalidArgumentException as headers() does
     * @throws LengthException          as headers() does
     */
    public function body(): string
    {
        return $this->response()[1];
    }

    /**
     * Sends the headers and ends the request.
     *
     * @throws LogicException if output was sent before, so that headers can no longer be set; and as headers() does
     */
    public function send(): never
    {
        [$headers, $body] = $this->response();
        if (headers_sent($file, $line)) {
            throw new LogicException("output started in $file:$line, too late to hand the connection off");
        }
        // The user's next request must not wait for a lock that this one still holds.
        session_write_close();
        if ($body !== '') {
            // The body is the data and nothing else: not what was printed before, and not packed.
            while (ob_get_level() > 0 && ob_end_clean());
            ini_set('zlib.output_compression', '0');
        }
        foreach ($headers as $name => $value) {
            header("$name: $value");
        }
        echo $body;
        exit;
    }

    /** @return array{array<string, string>, string} the headers and the body */
    private function response(): array
    {
        $headers = ['X-Socket-Handoff' => $this->target];
        // Without JSON_UNESCAPED_UNICODE every character beyond ASCII becomes \uXXXX, and control bytes are escaped: a
        // legal header value whatever the user typed. DEL is the one exception that json_encode leaves.
        $line = str_replace("\x7f", '\u007f', $this->encode(0));
        if (strlen("X-Handoff-Data: $line") <= self::HEADER_LINE_MAX && strlen($line) <= $this->most) {
            return [$headers + ['X-Handoff-Data' => $line], ''];
        }
        $body = $this->encode(JSON_UNESCAPED_UNICODE);
        if (strlen($body) > $this->most) {
            throw new LengthException(sprintf('%d bytes of data, at most %d fit', strlen($body), $this->most));
        }
        // Each value takes two bytes at least, so most data need not be counted.
        if (strlen($body) > 2 * self::VALUES_MAX && self::values($this->members) > self::VALUES_MAX) {
            $most = self::VALUES_MAX;
            throw new InvalidArgumentException("the data has more than the $most values that the daemon reads");
        }
        return [$headers + ['X-Handoff-Data-From' => 'response-body'], $body];
    }

    private function encode(int $flags): string
    {
        $flags |= JSON_UNESCAPED_SLASHES | JSON_PRESERVE_ZERO_FRACTION;
        // An object also where it is empty: the daemon does not take [] for no members. And no JSON_THROW_ON_ERROR,
        // whose exception would have them in its trace.
        $json = json_encode((object) $this->members, $flags, self::DEPTH_MAX);
        if ($json === false) {
            $what = 'the data is no JSON: ' . json_last_error_msg();
            throw new InvalidArgumentException($what . '; allowed are ' . self::DEPTH_MAX . ' levels');
        }
        return $json;
    }

    /** How many the daemon will read. Counted where they are: to decode them again would take their memory once more. */
    private static function values(#[SensitiveParameter] mixed $value): int
    {
        if (is_object($value) && !$value instanceof stdClass) {
            $value = json_decode((string) json_encode($value)); // it says itself what it is as JSON
        }
        $count = 1;
        foreach (is_array($value) || $value instanceof stdClass ? $value : [] as $member) {
            $count += self::values($member);
        }
        return $count;
    }

    private static function check(string $name, #[SensitiveParameter] mixed $value): void
    {
        self::checkText($name, $value);
        match ($name) {
            'prompt', 'model', 'user', 'backend' => self::expect(is_string($value), $name, $value, 'a string'),
            'messages' => self::checkMessages($value),
            'max_tokens' => self::checkInteger($name, $value, 1, 1000000000),
            'temperature' => self::checkNumber($name, $value, 0, 2),
            'user_id' => self::expect(is_string($value) || is_int($value), $name, $value, 'a string or an integer'),
            'request_id' => self::expect(
                is_string($value) && preg_match('/^[\x20-\x7e]{1,128}$/D', $value) === 1,
                $name,
                $value,
                '1 to 128 printable ASCII characters',
            ),
            'demo' => self::checkDemo($value),
            'resume' => self::checkResume($value),
            default => null,
        };
    }

    /** Finds the text that json_encode would only say is somewhere. */
    private static function checkText(string $name, #[SensitiveParameter] mixed $value): void
    {
        if (is_string($value) && preg_match('//u', $value) !== 1) {
            // A name inside may come from outside as well (messages[0][…] of a form), and must stay within its line of a log.
            $printable = preg_replace('/[^\x21-\x7e]+/', '?', substr($name, 0, 100));
            throw new InvalidArgumentException("$printable is not valid UTF-8");
        }
        foreach (is_array($value) || $value instanceof stdClass ? $value : [] as $key => $member) {
            self::checkText(is_int($key) ? "{$name}[$key]" : "$name.$key", $member);
        }
    }

    private static function checkMessages(#[SensitiveParameter] mixed $value): void
    {
        $form = 'an array of ["role" => string, "content" => string or parts]';
        self::expect(is_array($value) && array_is_list($value), 'messages', $value, $form);
        foreach ($value as $number => $given) {
            $here = "messages[$number]";
            $message = self::object($given);
            self::expect($message !== null, $here, $given, 'an array with "role" and "content"');
            self::expect(is_string($message['role'] ?? null), "$here.role", $message['role'] ?? null, 'a string');
            $content = $message['content'] ?? null;
            $parts = is_array($content) && array_is_list($content)
                && !in_array(null, array_map(self::object(...), $content), true);
            $called = $content === null && !empty($message['tool_calls']);
            $right = is_string($content) || $parts || $called;
            self::expect($right, "$here.content", $content, 'a string or a list of parts');
        }
    }

    /**
     * The members of what json_encode makes an object of, as far as PHP knows: [] may be either. Null: of nothing else.
     * A stdClass comes from json_decode, and is how an empty object, as in a tool's schema, stays one.
     *
     * @return array<mixed>|null
     */
    private static function object(#[SensitiveParameter] mixed $value): ?array
    {
        if ($value instanceof stdClass) {
            return get_object_vars($value);
        }
        return is_array($value) && ($value === [] || !array_is_list($value)) ? $value : null;
    }

    private static function checkDemo(#[SensitiveParameter] mixed $value): void
    {
        $given = $value;
        $value = self::object($given);
        self::expect($value !== null, 'demo', $given, 'an array with "tokens" and "tokens_per_second"');
        if (isset($value['tokens'])) {
            self::checkInteger('demo.tokens', $value['tokens'], 1, 100000);
        }
        if (isset($value['tokens_per_second'])) {
            self::checkNumber('demo.tokens_per_second', $value['tokens_per_second'], 0.1, 10000);
        }
    }

    private static function checkResume(#[SensitiveParameter] mixed $value): void
    {
        $given = $value;
        $value = self::object($given);
        self::expect($value !== null, 'resume', $given, 'an array with "id"');
        $id = $value['id'] ?? null;
        $form = '16 to 128 letters, digits, "-", ".", "_" and "~", impossible to guess: bin2hex(random_bytes(16))';
        self::expect(is_string($id) && preg_match('/^[A-Za-z0-9._~-]{16,128}$/D', $id) === 1, 'resume.id', $id, $form);
        if (isset($value['after'])) {
            self::checkInteger('resume.after', $value['after'], 0, self::EVENT_MAX);
        }
    }

    private static function checkInteger(
        string $name,
        #[SensitiveParameter] mixed $value,
        int $low,
        int $high,
    ): void {
        self::expect(is_int($value) && $value >= $low && $value <= $high, $name, $value, "an integer from $low to $high");
    }

    private static function checkNumber(
        string $name,
        #[SensitiveParameter] mixed $value,
        float $low,
        float $high,
    ): void {
        $number = is_int($value) || is_float($value);
        self::expect($number && $value >= $low && $value <= $high, $name, $value, "a number from $low to $high");
    }

    private static function expect(
        bool $right,
        string $name,
        #[SensitiveParameter] mixed $value,
        string $allowed,
    ): void {
        if (!$right) {
            // Texts may be a user's, and end in a log; numbers say what is wrong with them.
            $is = is_int($value) || is_float($value) ? var_export($value, true) : match (get_debug_type($value)) {
                'null' => 'missing',
                'string' => 'a string of ' . strlen($value) . ' bytes',
                'array' => array_is_list($value) ? 'a list' : 'an array',
                default => get_debug_type($value),
            };
            throw new InvalidArgumentException("$name is $is; allowed is $allowed");
        }
    }
}
