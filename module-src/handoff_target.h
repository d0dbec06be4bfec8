/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_TARGET_H
#define HANDOFF_TARGET_H

/*
 * Which sockets may be named, and how a named one is reached without a race.
 *
 * Rules of this room: plain libc, no httpd or APR type, no logging, no allocation, so that the
 * unit tests can link it alone. Everything here is pure or touches the file system through
 * descriptors only.
 *
 * /run/x has another spelling, /var/run/x (one is a symlink to the other on every system we
 * support). The canonical form of a path is the first without its leading slash ("run/x"), always
 * a pointer into the caller's string. All comparing and opening is done on the canonical form.
 */

#include <stddef.h>

#include "handoff_wire.h"

/* What SocketHandoffTarget permits. */
#define HANDOFF_NAME_MAX 64       /* bytes of a target's name                                     */
#define HANDOFF_HEADERS_MAX 32    /* names in headers=                                            */
#define HANDOFF_TARGET_SCHEME "unix:"

typedef enum {
    HANDOFF_PATH_OK,
    HANDOFF_PATH_EMPTY,           /* nothing there, or only the root directory                    */
    HANDOFF_PATH_RELATIVE,        /* does not begin with a slash                                   */
    HANDOFF_PATH_TOO_LONG,        /* longer than PATH_MAX, or a component longer than NAME_MAX     */
    HANDOFF_PATH_CONTROL_BYTE,    /* a byte below 0x20 or 0x7f                                     */
    HANDOFF_PATH_BAD_COMPONENT,   /* an empty, "." or ".." component                               */
    HANDOFF_PATH_NOT_PERMITTED,   /* well-formed, but below none of the allowed prefixes           */
    HANDOFF_PATH_NO_SCHEME        /* does not begin with unix:                                    */
} handoff_path_verdict;

/* What may be handed to. Lives as long as the configuration that owns the strings. */
typedef struct {
    const char *const *prefixes;  /* canonical forms, from handoff_prefix_parse */
    size_t count;
} handoff_target_policy;

/* One socket that a request may be handed to. */
typedef struct {
    const char *place;            /* canonical form, points into the string that was resolved */
} handoff_target;

/* The verdict in words that complete "the path ...". Static. */
const char *handoff_path_reason(handoff_path_verdict verdict);

/* Takes an operator's prefix apart. "/run", "/run/", "/srv/llm", "/run/llm/" and "/run/a.sock" are
 * all good; on HANDOFF_PATH_OK *place is the canonical form. */
handoff_path_verdict handoff_prefix_parse(const char *text, const char **place);

/* Whether a canonical form lies in the runtime directory of the system, where every directory
 * belongs to root or to one service. */
int handoff_place_is_run(const char *place);

/* Finds the target that an application named and checks that the policy permits it. */
handoff_path_verdict handoff_target_resolve(const char *text, const handoff_target_policy *policy,
                                            handoff_target *target);

/* Takes the address of a declared target apart, "unix:/run/llm.sock": on HANDOFF_PATH_OK *path is
 * the part behind "unix:" and *target the socket, both in the caller's string. */
handoff_path_verdict handoff_address_parse(const char *text, const char **path,
                                           handoff_target *target);

/* The same for a bare path, whatever the policy says. */
handoff_path_verdict handoff_socket_parse(const char *text, handoff_target *target);

/* Whether a target may be called that: a letter or digit, then up to 63 letters, digits, ".", "_"
 * and "-"; but neither "all" nor "none", which are words of SocketHandoffAllow. */
int handoff_name_is_good(const char *name);

/* What the key=value arguments of one SocketHandoffTarget say. The strings point into what was
 * parsed. */
typedef struct {
    handoff_transport transport;
    int envelope;
    int ack;
    const char *user;             /* a name or a number, NULL                                     */
    long long user_id;            /* the number, -1 where it is a name                            */
    int timeout_ms;               /* 0: not given                                                 */
    int retries;                  /* -1: not given                                                */
    const char *headers;          /* good names, separated by commas; NULL                        */
    const char *backup;           /* NULL                                                         */
    int max_fails;
    int retry_ms;
    unsigned int given;           /* a bit per key that was parsed                                */
} handoff_target_options;

/* What holds where nothing is given. */
void handoff_options_init(handoff_target_options *options);

/* Takes one key=value into the options. NULL, or what it must be instead and how to mend it:
 * static, completes `SocketHandoffTarget "key=value": ...`. The options are unchanged then. */
const char *handoff_option_parse(const char *text, handoff_target_options *options);

/* After the last one: NULL, or why they do not go together; static, like the above. */
const char *handoff_options_check(const handoff_target_options *options);

/* Opens the socket's name (O_PATH), following no symlink: in one call where the kernel has
 * openat2(2), otherwise component by component from the root. Either way what was checked is what gets
 * connected. Returns a descriptor for /proc/self/fd, or -1 with errno: ELOOP a symlink, ENOTDIR or
 * ENOTSOCK something of the wrong kind in the way, otherwise whatever open(2) says. */
int handoff_target_open(const handoff_target *target);

/* That walk, from an open directory. */
int handoff_target_open_at(int dirfd, const char *place);

#endif
