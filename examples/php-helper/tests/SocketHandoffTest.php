<?php
declare(strict_types=1);

use PHPUnit\Framework\Attributes\DataProvider;
use PHPUnit\Framework\TestCase;
use SocketHandoff\SocketHandoff;

require_once __DIR__ . '/../src/SocketHandoff.php';

/** What the class makes of its arguments. What Apache and the daemon make of that: tests/examples. */
final class SocketHandoffTest extends TestCase
{
    private const VECTORS = __DIR__ . '/../../../tests/vectors/plain.json';

    public function testSmallDataIsAHeaderAndThereIsNoBody(): void
    {
        $handoff = SocketHandoff::to('llm')->with(['prompt' => 'Hello', 'temperature' => 1.0]);
        self::assertSame(
            ['X-Socket-Handoff' => 'llm', 'X-Handoff-Data' => '{"prompt":"Hello","temperature":1.0}'],
            $handoff->headers(),
        );
        self::assertSame('', $handoff->body());
    }

    public function testNoDataIsAnObjectToo(): void
    {
        self::assertSame('{}', SocketHandoff::to('llm')->headers()['X-Handoff-Data']);
        self::assertSame('{}', SocketHandoff::to('llm')->with(['demo' => []])->headers()['X-Handoff-Data']);
    }

    public function testWithAddsReplacesAndTakesAwayWithoutChangingTheObject(): void
    {
        $first = SocketHandoff::to('llm')->with(['prompt' => 'a', 'user' => 'ada']);
        $second = $first->with(['prompt' => 'b', 'user' => null, 'model' => 'm']);
        self::assertSame('{"prompt":"b","model":"m"}', $second->headers()['X-Handoff-Data']);
        self::assertSame('{"prompt":"a","user":"ada"}', $first->headers()['X-Handoff-Data']);
    }

    /** @return array<string, array{string}> */
    public static function texts(): array
    {
        return [
            'a header of its own' => ["x\r\nX-Socket-Handoff: /run/other.sock\r\n\r\n<b>\"\\"],
            'all of latin-1' => [implode('', array_map(static fn (int $code): string => mb_chr($code), range(0, 255)))],
            'beyond the first plane' => ["naïve 日本語 🎉\u{2028}\u{10ffff}"],
            'DEL' => ["\x7f"],
            'what looks escaped' => ['\u007f \n \" \\\\'],
        ];
    }

    /** @dataProvider texts */
    #[DataProvider('texts')]
    public function testWhateverIsTypedIsAHeaderOfPrintableAsciiAndComesBack(string $text): void
    {
        $value = SocketHandoff::to('llm')->with(['prompt' => $text])->headers()['X-Handoff-Data'];
        self::assertMatchesRegularExpression('/^[\x20-\x7e]+$/D', $value);
        self::assertSame(['prompt' => $text], json_decode($value, true));
    }

    public function testALineThatWouldBeTooLongBecomesTheBodyExactlyThere(): void
    {
        $room = 6000 - strlen('X-Handoff-Data: {"prompt":""}');
        $last = SocketHandoff::to('llm')->with(['prompt' => str_repeat('x', $room)]);
        self::assertArrayHasKey('X-Handoff-Data', $last->headers());
        $first = $last->with(['prompt' => str_repeat('x', $room + 1)]);
        self::assertSame(['X-Socket-Handoff' => 'llm', 'X-Handoff-Data-From' => 'response-body'], $first->headers());
        self::assertSame(['prompt' => str_repeat('x', $room + 1)], json_decode($first->body(), true));
        // In a body a character takes its own bytes, not six.
        self::assertSame('{"prompt":"' . str_repeat('é', 3000) . '"}', $last->with(['prompt' => str_repeat('é', 3000)])->body());
    }

    public function testMoreThanFitsIsAnErrorWithBothNumbers(): void
    {
        $handoff = SocketHandoff::to('plain', 200000)->with(['prompt' => str_repeat('x', 200000 - strlen('{"prompt":""}'))]);
        self::assertSame(200000, strlen($handoff->body()));
        foreach (['headers', 'body'] as $method) {
            try {
                $handoff->with(['more' => 1])->$method();
                self::fail("$method() took too much");
            } catch (LengthException $error) {
                self::assertSame('200009 bytes of data, at most 200000 fit', $error->getMessage());
            }
        }
        $this->expectException(LengthException::class);
        SocketHandoff::to('llm')->with(['prompt' => str_repeat('x', 8388608)])->headers();
    }

    public function testTheLargestDataOfASmallTargetIsNotAHeaderEither(): void
    {
        $this->expectExceptionMessage('13 bytes of data, at most 12 fit');
        SocketHandoff::to('llm', 12)->with(['prompt' => ''])->headers();
    }

    /** @return array<string, array{string, bool}> */
    public static function targets(): array
    {
        return [
            'a name' => ['llm', true],
            'all that a name may have' => ['0a.B_c-d', true],
            '64 characters' => [str_repeat('a', 64), true],
            'a path' => ['/run/streaming-daemon.sock', true],
            'nothing' => ['', false],
            '65 characters' => [str_repeat('a', 65), false],
            'a dash first' => ['-llm', false],
            'a space' => ['the llm', false],
            'a line more' => ["llm\r\nX-Evil: 1", false],
            'a newline last' => ["llm\n", false],
            'no absolute path' => ['run/x.sock', false],
            'a path with a space' => ['/run/a b', false],
            'longer than a socket address' => ['/' . str_repeat('a', 107), false],
            'no ASCII' => ["ll\xff", false],
        ];
    }

    /** @dataProvider targets */
    #[DataProvider('targets')]
    public function testATargetIsANameOrAPath(string $target, bool $right): void
    {
        if (!$right) {
            $this->expectException(InvalidArgumentException::class);
            $this->expectExceptionMessage('the target "');
        }
        self::assertSame($target, SocketHandoff::to($target)->headers()['X-Socket-Handoff']);
    }

    /** @return array<string, array{array<mixed>, string}> */
    public static function mistakes(): array
    {
        return [
            'a list' => [['hello'], 'with() takes members by their names; 0 is a position'],
            'a number for a text' => [['prompt' => 5], 'prompt is 5; allowed is a string'],
            'bytes' => [['prompt' => "\xff"], 'prompt is not valid UTF-8'],
            'bytes far inside' => [['messages' => [['role' => 'user', 'content' => "a\xc3"]]], 'messages[0].content is not valid UTF-8'],
            'a name that would be a line of the log' => [
                ['messages' => [['role' => 'user', "a\r\nroot: b\xff\x1b[2J" . str_repeat('x', 200) => "\xff"]]],
                'messages[0].a?root:?b?[2J' . str_repeat('x', 73) . ' is not valid UTF-8',
            ],
            'a name alone' => [["a\nb" => "\xff"], 'a?b is not valid UTF-8'],
            'too many tokens' => [['max_tokens' => 0], 'max_tokens is 0; allowed is an integer from 1 to 1000000000'],
            'tokens as text' => [['max_tokens' => '5'], 'max_tokens is a string of 1 bytes; allowed is an integer'],
            'a hot model' => [['temperature' => 2.5], 'temperature is 2.5; allowed is a number from 0 to 2'],
            'not a number' => [['temperature' => NAN], 'temperature is NAN; allowed is a number from 0 to 2'],
            'one message' => [['messages' => ['role' => 'user', 'content' => 'a']], 'messages is an array; allowed is an array of'],
            'no role' => [['messages' => [['content' => 'a']]], 'messages[0].role is missing; allowed is a string'],
            'no content' => [['messages' => [['role' => 'user']]], 'messages[0].content is missing; allowed is'],
            'a boolean user' => [['user_id' => true], 'user_id is bool; allowed is a string or an integer'],
            'a long request id' => [['request_id' => str_repeat('a', 129)], 'request_id is a string of 129 bytes; allowed is 1 to 128'],
            'a short resume id' => [['resume' => ['id' => 'short']], 'resume.id is a string of 5 bytes; allowed is 16 to 128'],
            'a resume list' => [['resume' => ['a']], 'resume is a list; allowed is an array with "id"'],
            'before the first event' => [
                ['resume' => ['id' => '0123456789abcdef', 'after' => -1]],
                'resume.after is -1; allowed is an integer from 0 to',
            ],
            'a demo without pace' => [['demo' => ['tokens_per_second' => 0]], 'demo.tokens_per_second is 0; allowed is a number from 0.1'],
            'infinity' => [['x' => INF], 'the data is no JSON: Inf and NaN cannot be JSON encoded'],
            'too deep' => [['x' => self::nested(100)], 'the data is no JSON: Maximum stack depth exceeded; allowed are 100 levels'],
            'too many objects' => [['x' => array_fill(0, 50000, new ArrayObject([1]))], 'the data has more than the 100000 values'],
            'too many values' => [['x' => array_fill(0, 100000, 1)], 'the data has more than the 100000 values'],
        ];
    }

    /** @param array<mixed> $members @dataProvider mistakes */
    #[DataProvider('mistakes')]
    public function testAMistakeIsNamedWithWhatIsAllowed(array $members, string $message): void
    {
        $this->expectException(InvalidArgumentException::class);
        $this->expectExceptionMessage($message);
        SocketHandoff::to('llm')->with($members)->headers();
    }

    public function testWhatIsJustNotTooMuchIsTaken(): void
    {
        self::assertNotSame('', SocketHandoff::to('llm')->with(['x' => array_fill(0, 99998, 1)])->body());
        $object = json_decode(json_encode(['x' => array_fill(0, 99998, 1)], JSON_THROW_ON_ERROR));
        self::assertNotSame('', SocketHandoff::to('llm')->with(get_object_vars($object))->body());
        self::assertNotEmpty(SocketHandoff::to('llm')->with(['x' => self::nested(99)])->headers());
    }

    public function testAUsersTextIsInNoError(): void
    {
        $mistakes = [
            ['max_tokens' => "my secret\n"],
            ['temperature' => 'my secret'],
            ['resume' => ['id' => 'my secret']],
            ['messages' => 'my secret'],
            ['messages' => [['role' => 'my secret']]],
            ['request_id' => "my secret\n"],
            ['demo' => 'my secret'],
            ['demo' => ['tokens' => 'my secret']],
            ['prompt' => "my secret \xff"],
            ['prompt' => 'my secret', 'x' => NAN],
            ['prompt' => 'my secret', 'x' => array_fill(0, 100000, 1)],
            ['prompt' => 'my secret', 'x' => str_repeat('x', 8388608)],
        ];
        // As a developer's php.ini has it: then a trace has the arguments of every call.
        $ini = ini_set('zend.exception_ignore_args', '0');
        try {
            foreach ($mistakes as $number => $members) {
                $here = static fn (): array => SocketHandoff::to('llm')->with($members)->headers();
                try {
                    $here();
                    self::fail("mistake $number was taken");
                } catch (InvalidArgumentException | LengthException $error) {
                    self::assertNoSecret($error, "mistake $number");
                }
            }
        } finally {
            ini_set('zend.exception_ignore_args', (string) $ini);
        }
    }

    public function testWhatJsonDecodeMadeStaysWhatItWas(): void
    {
        $json = '{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}],"tools":[{"parameters":{"properties":{}}}]'
            . ',"resume":{"id":"0123456789abcdef"},"demo":{}}';
        $members = get_object_vars(json_decode($json, false, 100, JSON_THROW_ON_ERROR));
        self::assertSame($json, SocketHandoff::to('llm')->with($members)->headers()['X-Handoff-Data']);
        $this->expectExceptionMessage('messages[0].content is missing');
        SocketHandoff::to('llm')->with(['messages' => [json_decode('{"role":"user"}')]]);
    }

    private static function assertNoSecret(Throwable $error, string $what): void
    {
        for (; $error !== null; $error = $error->getPrevious()) {
            self::assertStringNotContainsString('secret', $error->getMessage(), $what);
            $frames = 0;
            foreach ($error->getTrace() as $frame) {
                // Behind the class come this test and PHPUnit, with all that they know.
                if (($frame['class'] ?? SocketHandoff::class) !== SocketHandoff::class) {
                    break;
                }
                self::assertStringNotContainsString('secret', print_r($frame['args'] ?? [], true), "$what: {$frame['function']}");
                $frames += 1;
            }
            self::assertGreaterThan(0, $frames, $what);
        }
    }

    /** The vectors that the daemon's own tests read: what it refuses is refused here, by the same name, and nothing else. */
    public function testItAgreesWithTheDaemonAboutEveryVector(): void
    {
        $seen = ['refused' => 0, 'taken' => 0];
        foreach (json_decode((string) file_get_contents(self::VECTORS), true, 512, JSON_THROW_ON_ERROR) as $vector) {
            $members = json_decode(self::message($vector['message']), true);
            // An empty object or list is the same array in PHP, and what is no object cannot be given to with().
            if (!is_array($members) || $members === [] || array_is_list($members)) {
                continue;
            }
            $field = $vector['error']['field'] ?? null;
            if ($field === 'the handoff data') {
                continue; // of its bytes: a name that is there twice, too deep, no UTF-8. PHP cannot write them.
            }
            try {
                SocketHandoff::to('llm')->with($members)->headers();
                $error = null;
            } catch (InvalidArgumentException $refused) {
                $error = $refused->getMessage();
            }
            if ($field === null) {
                self::assertNull($error, $vector['name']);
            } else {
                self::assertStringStartsWith("$field ", (string) $error, $vector['name']);
            }
            $seen[$field === null ? 'taken' : 'refused'] += 1;
        }
        self::assertGreaterThan(20, $seen['refused']);
        self::assertGreaterThan(10, $seen['taken']);
    }

    /** @param array<string, mixed> $form */
    private static function message(array $form): string
    {
        $text = $form['utf8'] ?? base64_decode($form['base64'], true);
        if (isset($form['pad'])) {
            $text = str_replace('%', str_repeat('x', $form['pad']), $text);
        }
        return isset($form['nest']) ? str_replace('%', str_repeat('[', $form['nest']) . str_repeat(']', $form['nest']), $text) : $text;
    }

    /** @return array<mixed> */
    private static function nested(int $levels): array
    {
        $value = [];
        for ($level = 1; $level < $levels; $level += 1) {
            $value = [$value];
        }
        return $value;
    }
}
