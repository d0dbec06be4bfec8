/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef BENCH_ANSWER_H
#define BENCH_ANSWER_H

/*
 * What every contender answers, so that the load generator can check each response to its last
 * byte. A server that writes the head itself writes about the same number of bytes.
 */

#define ANSWER_BODY \
    "0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz" \
    "0123456789abcdefghijklmnopq\n"

#define ANSWER_HEAD \
    "HTTP/1.1 200 OK\r\n" \
    "Date: Sun, 22 Nov 2026 12:00:00 GMT\r\n" \
    "Server: Apache\r\n" \
    "Cache-Control: no-cache\r\n" \
    "Connection: close\r\n" \
    "Content-Type: text/plain\r\n" \
    "\r\n"

#endif
