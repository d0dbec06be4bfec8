/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_target.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdint.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

const char *handoff_path_reason(handoff_path_verdict verdict)
{
    switch (verdict) {
    case HANDOFF_PATH_OK:            return "is permitted";
    case HANDOFF_PATH_EMPTY:         return "names no socket";
    case HANDOFF_PATH_RELATIVE:      return "is not absolute";
    case HANDOFF_PATH_TOO_LONG:      return "is too long";
    case HANDOFF_PATH_CONTROL_BYTE:  return "contains a control byte";
    case HANDOFF_PATH_BAD_COMPONENT: return "has an empty, \".\" or \"..\" component";
    case HANDOFF_PATH_NOT_PERMITTED: return "is below no SocketHandoffAllowedPrefix";
    case HANDOFF_PATH_NO_SCHEME:     return "does not begin with " HANDOFF_TARGET_SCHEME;
    }
    return "is not understood";
}

/* Whether path is prefix itself or lies below it; a match ends at a component's border. */
static int covers(const char *prefix, const char *path)
{
    size_t len = strlen(prefix);

    if (strncmp(path, prefix, len) != 0) {
        return 0;
    }
    return prefix[len - 1] == '/' || path[len] == '\0' || path[len] == '/';
}

static handoff_path_verdict check_components(const char *place)
{
    const char *part = place;

    for (;;) {
        size_t len = strcspn(part, "/");

        if (len == 0
            || (len == 1 && part[0] == '.')
            || (len == 2 && part[0] == '.' && part[1] == '.')) {
            return HANDOFF_PATH_BAD_COMPONENT;
        }
        if (len > NAME_MAX) {
            return HANDOFF_PATH_TOO_LONG;
        }
        if (part[len] == '\0') {
            return HANDOFF_PATH_OK;
        }
        part += len + 1;
        if (*part == '\0') {
            return HANDOFF_PATH_OK;     /* a trailing slash: the caller says whether it may be */
        }
    }
}

static handoff_path_verdict parse(const char *text, const char **place)
{
    static const char alias[] = "/var/run";
    const char *byte;

    if (text[0] == '\0') {
        return HANDOFF_PATH_EMPTY;
    }
    if (strlen(text) >= PATH_MAX) {
        return HANDOFF_PATH_TOO_LONG;
    }
    for (byte = text; *byte != '\0'; byte++) {
        if ((unsigned char)*byte < 0x20 || *byte == 0x7f) {
            return HANDOFF_PATH_CONTROL_BYTE;
        }
    }
    if (text[0] != '/') {
        return HANDOFF_PATH_RELATIVE;
    }
    if (text[1] == '\0') {
        return HANDOFF_PATH_EMPTY;
    }
    *place = text + (covers(alias, text) ? strlen("/var/") : strlen("/"));
    return check_components(*place);
}

handoff_path_verdict handoff_prefix_parse(const char *text, const char **place)
{
    return parse(text, place);
}

int handoff_place_is_run(const char *place)
{
    return covers("run", place);
}

handoff_path_verdict handoff_socket_parse(const char *text, handoff_target *target)
{
    const char *place = NULL;
    handoff_path_verdict verdict = parse(text, &place);

    if (verdict != HANDOFF_PATH_OK) {
        return verdict;
    }
    if (place[strlen(place) - 1] == '/') {
        return HANDOFF_PATH_BAD_COMPONENT;
    }
    target->place = place;
    return HANDOFF_PATH_OK;
}

handoff_path_verdict handoff_address_parse(const char *text, const char **path,
                                           handoff_target *target)
{
    size_t len = strlen(HANDOFF_TARGET_SCHEME);
    handoff_path_verdict verdict;

    if (strncmp(text, HANDOFF_TARGET_SCHEME, len) != 0) {
        return HANDOFF_PATH_NO_SCHEME;
    }
    verdict = handoff_socket_parse(text + len, target);
    if (verdict == HANDOFF_PATH_OK) {
        *path = text + len;
    }
    return verdict;
}

handoff_path_verdict handoff_target_resolve(const char *text, const handoff_target_policy *policy,
                                            handoff_target *target)
{
    handoff_target found = { NULL };
    handoff_path_verdict verdict = handoff_socket_parse(text, &found);
    size_t i;

    if (verdict != HANDOFF_PATH_OK) {
        return verdict;
    }
    for (i = 0; i < policy->count; i++) {
        if (covers(policy->prefixes[i], found.place)) {
            *target = found;
            return HANDOFF_PATH_OK;
        }
    }
    return HANDOFF_PATH_NOT_PERMITTED;
}

/* --- names and options --------------------------------------------------------------------- */

/* Not <ctype.h>: that asks the locale. */
static int is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static int is_alnum(char c)
{
    return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

int handoff_name_is_good(const char *name)
{
    size_t len = strlen(name);
    size_t i;

    if (len == 0 || len > HANDOFF_NAME_MAX || !is_alnum(name[0])) {
        return 0;
    }
    for (i = 1; i < len; i++) {
        if (!is_alnum(name[i]) && strchr("._-", name[i]) == NULL) {
            return 0;
        }
    }
    return strcasecmp(name, "all") != 0 && strcasecmp(name, "none") != 0;
}

/* Digits and nothing else at the beginning of text; returns what follows them, or NULL. */
static const char *parse_digits(const char *text, long long *number)
{
    *number = 0;
    if (!is_digit(*text)) {
        return NULL;
    }
    for (; is_digit(*text); text++) {
        if (*number > LLONG_MAX / 10 - 1) {
            return NULL;
        }
        *number = *number * 10 + (*text - '0');
    }
    return text;
}

static int parse_switch(const char *value, int *on)
{
    if (strcasecmp(value, "on") != 0 && strcasecmp(value, "off") != 0) {
        return 0;
    }
    *on = strcasecmp(value, "on") == 0;
    return 1;
}

static int parse_count(const char *value, int high, int *count)
{
    long long number;
    const char *rest = parse_digits(value, &number);

    if (rest == NULL || *rest != '\0' || number > high) {
        return 0;
    }
    *count = (int)number;
    return 1;
}

static int parse_duration(const char *value, int low_ms, int high_ms, int *ms)
{
    long long number;
    const char *rest = parse_digits(value, &number);

    if (rest == NULL || number > high_ms) {
        return 0;
    }
    if (strcmp(rest, "s") == 0) {
        number *= 1000;
    }
    else if (strcmp(rest, "ms") != 0) {
        return 0;
    }
    if (number < low_ms || number > high_ms) {
        return 0;
    }
    *ms = (int)number;
    return 1;
}

/* RFC 9110, 5.6.2. */
static int is_token_byte(char c)
{
    return is_alnum(c) || (c != '\0' && strchr("!#$%&'*+-.^_`|~", c) != NULL);
}

static int parse_headers(const char *value)
{
    const char *name = value;
    size_t count = 0;

    for (;;) {
        size_t len = strcspn(name, ",");
        const char *other;
        size_t i;

        if (len == 0 || ++count > HANDOFF_HEADERS_MAX) {
            return 0;
        }
        for (i = 0; i < len; i++) {
            if (!is_token_byte(name[i])) {
                return 0;
            }
        }
        for (other = value; other < name; other += strcspn(other, ",") + 1) {
            if (strcspn(other, ",") == len && strncasecmp(other, name, len) == 0) {
                return 0;
            }
        }
        if (name[len] == '\0') {
            return 1;
        }
        name += len + 1;
    }
}

static int take_transport(const char *value, handoff_target_options *options)
{
    static const struct {
        const char *word;
        handoff_transport transport;
    } words[] = {
        { "auto", HANDOFF_TRANSPORT_AUTO },
        { "seqpacket", HANDOFF_TRANSPORT_SEQPACKET },
        { "stream", HANDOFF_TRANSPORT_STREAM },
    };
    size_t i;

    for (i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        if (strcasecmp(value, words[i].word) == 0) {
            options->transport = words[i].transport;
            return 1;
        }
    }
    return 0;
}

static int take_envelope(const char *value, handoff_target_options *options)
{
    return parse_switch(value, &options->envelope);
}

static int take_ack(const char *value, handoff_target_options *options)
{
    return parse_switch(value, &options->ack);
}

static int take_user(const char *value, handoff_target_options *options)
{
    long long number;
    const char *rest = parse_digits(value, &number);

    if (*value == '\0') {
        return 0;
    }
    if (rest != NULL && *rest == '\0') {
        if (number >= (long long)UINT32_MAX) {      /* the last one means "nobody" to the kernel */
            return 0;
        }
        options->user_id = number;
    }
    options->user = value;
    return 1;
}

static int take_timeout(const char *value, handoff_target_options *options)
{
    return parse_duration(value, 1, 10000, &options->timeout_ms);
}

static int take_retries(const char *value, handoff_target_options *options)
{
    return parse_count(value, 10, &options->retries);
}

static int take_headers(const char *value, handoff_target_options *options)
{
    options->headers = parse_headers(value) ? value : NULL;
    return options->headers != NULL;
}

static int take_backup(const char *value, handoff_target_options *options)
{
    options->backup = handoff_name_is_good(value) ? value : NULL;
    return options->backup != NULL;
}

static int take_max_fails(const char *value, handoff_target_options *options)
{
    return parse_count(value, 1000, &options->max_fails);
}

static int take_retry(const char *value, handoff_target_options *options)
{
    return parse_duration(value, 100, 60000, &options->retry_ms);
}

static const struct {
    const char *key;
    int (*take)(const char *value, handoff_target_options *options);    /* 0: not like this */
    const char *form;
} option_keys[] = {
    { "transport", take_transport,
      "must be transport=auto, transport=seqpacket or transport=stream; leave it out to use what "
      "the daemon listens on" },
    { "envelope", take_envelope,
      "must be envelope=on or envelope=off; write on for a daemon that reads the JSON envelope, "
      "off for one that reads plain data" },
    { "ack", take_ack,
      "must be ack=on or ack=off; write on only for a daemon that answers one byte before it gets "
      "the message" },
    { "user", take_user,
      "must be user=NAME or user=UID; name the user who opens the socket: root where systemd "
      "does" },
    { "timeout", take_timeout,
      "must be a whole number with its unit, from timeout=1ms to timeout=10s; leave it out for the "
      "sum of SocketHandoffConnectTimeoutMs and SocketHandoffSendTimeoutMs" },
    { "retries", take_retries,
      "must be retries=0 to retries=10; leave it out for what SocketHandoffMaxRetries says" },
    { "headers", take_headers,
      "must be headers=NAME,NAME,... with 1 to 32 different names of request headers and no "
      "spaces; such as headers=Cookie,Accept-Language" },
    { "backup", take_backup,
      "must be backup=NAME; name another SocketHandoffTarget, to be tried when this one fails" },
    { "maxfails", take_max_fails,
      "must be maxfails=0 to maxfails=1000; 5 is the default, 0 never skips the target" },
    { "retry", take_retry,
      "must be a whole number with its unit, from retry=100ms to retry=60s; 2s is the default" },
};

void handoff_options_init(handoff_target_options *options)
{
    memset(options, 0, sizeof(*options));
    options->transport = HANDOFF_TRANSPORT_AUTO;
    options->user_id = -1;
    options->retries = -1;
    options->max_fails = 5;
    options->retry_ms = 2000;
}

const char *handoff_option_parse(const char *text, handoff_target_options *options)
{
    size_t i;

    for (i = 0; i < sizeof(option_keys) / sizeof(option_keys[0]); i++) {
        size_t len = strlen(option_keys[i].key);
        handoff_target_options changed = *options;

        if (strncasecmp(text, option_keys[i].key, len) != 0 || text[len] != '=') {
            continue;
        }
        if (options->given & (1u << i)) {
            return "must be given once; remove one of the two";
        }
        if (!option_keys[i].take(text + len + 1, &changed)) {
            return option_keys[i].form;
        }
        *options = changed;
        options->given |= 1u << i;
        return NULL;
    }
    return "must be one of transport=, envelope=, ack=, user=, timeout=, retries=, headers=, "
           "backup=, maxfails= and retry=, without spaces around \"=\"; correct or remove it";
}

const char *handoff_options_check(const handoff_target_options *options)
{
    if (options->headers != NULL && !options->envelope) {
        return "must be used with envelope=on, because plain data has no place for headers; add "
               "envelope=on or remove headers=";
    }
    return NULL;
}

/* --- opening --------------------------------------------------------------------------------- */

/* O_NOFOLLOW with O_PATH opens a symlink instead of failing, so the kind is checked on what was
 * opened: the answer cannot change between the check and the use. */
static int check_kind(int fd, int last)
{
    struct stat st;

    if (fstat(fd, &st) != 0) {
        return errno;
    }
    if (S_ISLNK(st.st_mode)) {
        return ELOOP;
    }
    if (last) {
        return S_ISSOCK(st.st_mode) ? 0 : ENOTSOCK;
    }
    return S_ISDIR(st.st_mode) ? 0 : ENOTDIR;
}

/* lead: "/" where the first component lies in the root directory, "" where it lies in dirfd. */
static int walk(int dirfd, const char *lead, const char *place)
{
    char name[NAME_MAX + 2];
    const char *part = place;
    int parent = -1;

    for (;;) {
        size_t len = strcspn(part, "/");
        int last = part[len] == '\0';
        int err;
        int fd;

        if (len == 0 || len > NAME_MAX) {
            err = EINVAL;
            fd = -1;
        }
        else {
            (void)snprintf(name, sizeof(name), "%s%.*s", parent < 0 ? lead : "", (int)len, part);
            fd = openat(parent < 0 ? dirfd : parent, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
            err = fd < 0 ? errno : check_kind(fd, last);
        }
        if (parent >= 0) {
            close(parent);
        }
        if (err != 0) {
            if (fd >= 0) {
                close(fd);
            }
            errno = err;
            return -1;
        }
        if (last) {
            return fd;
        }
        parent = fd;
        part += len + 1;
    }
}

int handoff_target_open_at(int dirfd, const char *place)
{
    return walk(dirfd, "", place);
}

/* The same in one call where the kernel can (openat2(2), Linux 5.6): no symlink anywhere on the way.
 * Returns -1 with ENOSYS where it cannot, or where a sandbox does not let us ask. */
static int open_at_once(const char *place)
{
    struct open_how how = { .flags = O_PATH | O_NOFOLLOW | O_CLOEXEC,
                            .resolve = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS };
    char path[PATH_MAX];
    int fd;
    int err;

    if (snprintf(path, sizeof(path), "/%s", place) >= (int)sizeof(path)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof(how));
    if (fd < 0) {
        if (errno == EPERM || errno == EINVAL || errno == EAGAIN) {
            errno = ENOSYS;
        }
        return -1;
    }
    err = check_kind(fd, 1);
    if (err != 0) {
        close(fd);
        errno = err;
        return -1;
    }
    return fd;
}

int handoff_target_open(const handoff_target *target)
{
    int fd = open_at_once(target->place);

    return fd >= 0 || errno != ENOSYS ? fd : walk(AT_FDCWD, "/", target->place);
}
