// SPDX-License-Identifier: Apache-2.0

// A whole streaming daemon in one file: a goroutine per stream, nothing but Go's standard library.
//
//  1. Apache connects to our SOCK_SEQPACKET socket once for every client, sends one message and hangs up.
//  2. With the message comes a descriptor (SCM_RIGHTS): the client's TCP connection, which is ours alone from then on.
//  3. Where the target says ack=on (here: -ack) we say one byte, 0x06, after accept; until then Apache sends nothing.
//  4. A plain message is the application's data, or one NUL byte. It says nothing of the request: never chunk then.
//  5. An envelope is a JSON object that begins {"handoff":2 and has the request, the application's headers and its data.
//  6. Data that is too large for it is in a second descriptor, a memfd: check its seals and length, then read it from 0.
//  7. We write the whole HTTP response, with Connection: close; chunked for HTTP/1.1 only; to HEAD the head only.
//  8. At the end: shutdown(SHUT_WR), read and forget what the client still sends, close. A bare close cuts the answer.
//  9. What is wrong with a message: 400 to the client who came with it, and every descriptor is closed.
//  10. recvmsg may say 0 while a message is queued, and ECONNRESET where our 0x06 was not read: receive once more.
//
// All of it is docs/wire-protocol.md. systemd gives us the socket (LISTEN_FDS), see systemd/ beside this file. To try it:
//
//	go build streaming_daemon.go
//	systemd-socket-activate --seqpacket -l /run/handoff-go.sock ./streaming_daemon
//
// It answers with the words of the data's "prompt"; replace words() by what your daemon is for. Its data is
// {"prompt": "…", "demo": {"tokens": n, "tokens_per_second": r}}: that many words, at that pace. All may be missing.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"
)

const (
	mostMessage    = 1 << 18
	mostPayload    = 8 << 20
	messageTimeout = 5 * time.Second  // for Apache to send what it connected for
	writeTimeout   = 30 * time.Second // for a client to take one event
	lingerTimeout  = 2 * time.Second  // for a client to hang up after the answer

	// From linux/fcntl.h; package syscall does not have them.
	fGetSeals = 1034
	seals     = 0x2 | 0x4 | 0x8 // F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE
)

var (
	beginsEnvelope = regexp.MustCompile(`^\{"handoff":-?[0-9]`)
	piece          = regexp.MustCompile(`[ \t\r\n]*[^ \t\r\n]+|[ \t\r\n]+$`)
	headerName     = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")
	// The application's headers go to the client, but for those that frame the response or describe another body.
	notCopied = regexp.MustCompile(`(?i)^(connection|content-length|content-type|date|keep-alive|proxy-connection|te|trailer|transfer-encoding|upgrade)$`)
)

// object is JSON's, by exact names: a struct would take "Handoff" for "handoff", and null for 0. Of a name that is there
// twice, the last counts.
type object map[string]json.RawMessage

func parse(text []byte, what string) (object, error) {
	var value object
	// encoding/json would replace what is not UTF-8.
	if !utf8.Valid(text) || json.Unmarshal(text, &value) != nil || value == nil {
		return nil, fmt.Errorf("%s must be a JSON object in UTF-8", what)
	}
	return value, nil
}

func isNull(raw json.RawMessage) bool { return raw == nil || string(raw) == "null" }

func text(raw json.RawMessage) (value string, ok bool) {
	return value, len(raw) > 0 && raw[0] == '"' && json.Unmarshal(raw, &value) == nil
}

func integer(raw json.RawMessage, low, high int64) (int64, bool) {
	value, err := strconv.ParseInt(string(raw), 10, 64)
	return value, err == nil && low <= value && value <= high
}

func end(raw json.RawMessage) bool {
	value, err := parse(raw, "")
	if err != nil {
		return false
	}
	_, addr := text(value["addr"])
	_, port := integer(value["port"], 0, 65535)
	return addr && port
}

type header struct{ name, value string }

func headers(raw json.RawMessage) (all []header, ok bool) {
	var pairs [][]json.RawMessage
	if isNull(raw) || json.Unmarshal(raw, &pairs) != nil {
		return nil, false
	}
	for _, pair := range pairs {
		if len(pair) != 2 {
			return nil, false
		}
		name, ok1 := text(pair[0])
		value, ok2 := text(pair[1])
		if !ok1 || !ok2 {
			return nil, false
		}
		all = append(all, header{name, value})
	}
	return all, true
}

// envelope is what we use of one.
type envelope struct {
	method, protocol string
	headers          []header
	data             []byte
}

// open understands an envelope. Members that we do not know are ignored; one that is missing or of the wrong form spoils
// the whole; then only the method counts, as whoever asked by HEAD gets no body with the error either.
func open(message []byte, extra []int) (e envelope, err error) {
	value, err := parse(message, "the message")
	if err != nil {
		return e, err
	}
	var ok = map[string]bool{}
	for _, name := range []string{"id", "uri", "scheme", "target"} {
		_, ok[name] = text(value[name])
	}
	e.method, ok["method"] = text(value["method"])
	e.protocol, ok["protocol"] = text(value["protocol"])
	e.headers, ok["response_headers"] = headers(value["response_headers"])
	_, ok["headers"] = headers(value["headers"])
	_, ok["handoff"] = integer(value["handoff"], 2, 2)
	_, ok["status"] = integer(value["status"], 100, 999)
	_, ok["unread_body"] = integer(value["unread_body"], -1, math.MaxInt64)
	_, ok["prefetched"] = integer(value["prefetched"], 0, math.MaxInt64)
	ok["client"] = end(value["client"])
	ok["peer"] = end(value["peer"])
	for _, name := range []string{"host", "data"} {
		_, isText := text(value[name])
		_, there := value[name]
		ok[name] = isText || (there && isNull(value[name]))
	}
	if user, there := value["user"]; there {
		_, ok["user"] = text(user)
	}
	for name, fits := range ok {
		if !fits {
			return e, fmt.Errorf("%s is missing or wrong", name)
		}
	}
	e.data, err = dataOf(value, extra)
	return e, err
}

// dataOf is the application's data, from the envelope or from the memfd behind the client.
func dataOf(value object, extra []int) ([]byte, error) {
	raw, there := value["payload"]
	if !there {
		if len(extra) != 0 {
			return nil, errors.New("a descriptor too many")
		}
		data, _ := text(value["data"])
		return []byte(data), nil
	}
	payload, err := parse(raw, "payload")
	if err != nil || len(extra) != 1 || string(payload["memfd"]) != "true" || !isNull(value["data"]) {
		return nil, errors.New("payload is wrong")
	}
	length, ok := integer(payload["length"], 0, mostPayload)
	has, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(extra[0]), fGetSeals, 0)
	var stat syscall.Stat_t
	if !ok || errno != 0 || has&seals != seals || syscall.Fstat(extra[0], &stat) != nil || stat.Size != length {
		return nil, errors.New("payload is not a sealed memfd of that length")
	}
	data := make([]byte, length)
	for done := 0; done < len(data); {
		n, err := syscall.Pread(extra[0], data[done:], int64(done))
		if err != nil || n == 0 {
			return nil, errors.New("payload cannot be read")
		}
		done += n
	}
	return data, nil
}

// words is the answer: its pieces, how many of them, and the time from one to the next. Here your own daemon begins.
func words(data []byte) (pieces []string, tokens int, pause time.Duration, err error) {
	prompt, pace := "Hello from a daemon of one file.", 20.0
	asked, demo := object{}, object{}
	if data = bytes.Trim(data, "\x00 \t\r\n"); len(data) > 0 {
		if asked, err = parse(data, "the data"); err != nil {
			return
		}
	}
	if raw := asked["prompt"]; !isNull(raw) {
		value, ok := text(raw)
		if !ok {
			return nil, 0, 0, errors.New("prompt must be a string")
		}
		if value != "" {
			prompt = value
		}
	}
	if raw := asked["demo"]; !isNull(raw) {
		if demo, err = parse(raw, "demo"); err != nil {
			return
		}
	}
	pieces = piece.FindAllString(prompt, -1)
	tokens = len(pieces)
	if raw := demo["tokens"]; !isNull(raw) {
		value, ok := integer(raw, 1, 100_000)
		if !ok {
			return nil, 0, 0, errors.New("demo.tokens must be an integer from 1 to 100000")
		}
		tokens = int(value)
	}
	if raw := demo["tokens_per_second"]; !isNull(raw) {
		if json.Unmarshal(raw, &pace) != nil || pace < 0.1 || pace > 10_000 {
			return nil, 0, 0, errors.New("demo.tokens_per_second must be a number from 0.1 to 10000")
		}
	}
	return pieces, tokens, time.Duration(float64(time.Second) / pace), nil
}

// client is the connection of one client. One that does not read costs itself only: each write has a deadline.
type client struct {
	net.Conn
	chunked, headOnly bool
}

func (c *client) send(data []byte) error {
	c.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := c.Write(data)
	return err
}

func (c *client) event(data string) error {
	if c.chunked {
		return c.send([]byte(fmt.Sprintf("%x\r\n%s\r\n", len(data), data)))
	}
	return c.send([]byte(data))
}

func (c *client) refuse(reason error) error {
	body, _ := json.Marshal(map[string]any{"error": map[string]string{"type": "bad_request", "message": reason.Error()}})
	answer := fmt.Sprintf("HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"+
		"Cache-Control: no-store\r\nContent-Length: %d\r\n\r\n", len(body))
	if !c.headOnly {
		answer += string(body)
	}
	return c.send([]byte(answer))
}

// linger sends FIN and waits for the client's, because a close with unread bytes resets the connection.
func (c *client) linger() {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		c.SetReadDeadline(time.Now().Add(lingerTimeout))
		io.Copy(io.Discard, c.Conn)
	}
}

// answer understands the message, with the descriptors that came behind the client's, and writes the response.
func (c *client) answer(message []byte, extra []int) error {
	var own []header
	data := message
	if beginsEnvelope.Match(message) {
		e, err := open(message, extra)
		c.headOnly = e.method == "HEAD"
		if err != nil {
			return c.refuse(err)
		}
		c.chunked = e.protocol == "HTTP/1.1" && !c.headOnly
		own, data = e.headers, e.data
	} else if len(extra) != 0 {
		return c.refuse(errors.New("a descriptor too many"))
	}
	pieces, tokens, pause, err := words(data)
	if err != nil {
		return c.refuse(err)
	}

	head, cache := "", "Cache-Control: no-cache\r\n"
	for _, h := range own {
		if headerName.MatchString(h.name) && !notCopied.MatchString(h.name) && !strings.ContainsAny(h.value, "\r\n\x00") {
			head += h.name + ": " + h.value + "\r\n"
		}
		if strings.EqualFold(h.name, "Cache-Control") {
			cache = ""
		}
	}
	if c.chunked {
		head += "Transfer-Encoding: chunked\r\n"
	}
	if err := c.send([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n" +
		"X-Accel-Buffering: no\r\n" + cache + head + "\r\n")); err != nil || c.headOnly {
		return err
	}
	for i := 0; i < tokens; i++ {
		// One event per piece, which is whole characters, never some bytes of one.
		content, _ := json.Marshal(map[string]string{"content": pieces[i%len(pieces)]})
		if err := c.event("data: " + string(content) + "\n\n"); err != nil {
			return err
		}
		time.Sleep(pause)
	}
	if err := c.event("data: [DONE]\n\n"); err != nil || !c.chunked {
		return err
	}
	return c.send([]byte("0\r\n\r\n"))
}

// receive gets the one message of this connection: bytes, descriptors, and whether some of either were cut off.
func receive(apache *net.UnixConn) (message []byte, fds []int, cut bool, err error) {
	buffer := make([]byte, mostMessage)
	// Room for as many descriptors as the kernel passes (253): those that are not expected are closed.
	control := make([]byte, syscall.CmsgSpace(4*253))
	for try := 0; try < 3; try++ {
		n, controls, flags, _, e := apache.ReadMsgUnix(buffer, control)
		if n <= 0 && controls <= 0 {
			err = e
			if errors.Is(e, io.EOF) || errors.Is(e, syscall.ECONNRESET) {
				continue
			}
			return
		}
		blocks, _ := syscall.ParseSocketControlMessage(control[:controls])
		for i := range blocks {
			more, _ := syscall.ParseUnixRights(&blocks[i])
			fds = append(fds, more...)
		}
		return buffer[:n], fds, flags&(syscall.MSG_TRUNC|syscall.MSG_CTRUNC) != 0, nil
	}
	return
}

// serve is one handoff, from Apache's connection to the client's end.
func serve(apache *net.UnixConn, ack bool) error {
	apache.SetDeadline(time.Now().Add(messageTimeout))
	if ack {
		apache.Write([]byte{6}) // an error only says that it was not waited for
	}
	message, fds, cut, err := receive(apache)
	apache.Close()
	defer func() {
		for _, fd := range fds {
			syscall.Close(fd)
		}
	}()
	if err != nil || len(fds) == 0 {
		if errors.Is(err, io.EOF) {
			return nil // it only looked whether we listen
		}
		return err
	}
	if kind, err := syscall.GetsockoptInt(fds[0], syscall.SOL_SOCKET, syscall.SO_TYPE); err != nil || kind != syscall.SOCK_STREAM {
		return errors.New("the descriptor is no stream socket")
	}
	// FileConn makes a copy for Go's poller, so the one that came is closed at once.
	file := os.NewFile(uintptr(fds[0]), "client")
	fds = fds[1:]
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		return err
	}
	defer conn.Close()
	c := &client{Conn: conn}
	if cut {
		err = c.refuse(errors.New("the message is too long"))
	} else {
		err = c.answer(message, fds)
	}
	if err == nil {
		c.linger()
	}
	return err
}

func main() {
	ack := flag.Bool("ack", false, "say one byte to every peer, for a target with ack=on")
	streams := flag.Int("streams", 1000, "how many at a time; more wait in the socket's queue, and LimitNOFILE= has to be above it")
	flag.Parse()
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) || os.Getenv("LISTEN_FDS") != "1" {
		log.Fatal("start me by a .socket unit with one ListenSequentialPacket=, or by systemd-socket-activate --seqpacket")
	}
	log.SetFlags(0)
	any, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		log.Fatal(err)
	}
	listener := any.(*net.UnixListener)
	slots := make(chan struct{}, *streams)
	for {
		slots <- struct{}{}
		apache, err := listener.AcceptUnix()
		if err != nil { // no descriptor left, for now
			log.Print("cannot accept: ", err)
			<-slots
			time.Sleep(100 * time.Millisecond)
			continue
		}
		go func() {
			defer func() { <-slots }()
			if err := serve(apache, *ack); err != nil {
				log.Print("handoff ended: ", err)
			}
		}()
	}
}
