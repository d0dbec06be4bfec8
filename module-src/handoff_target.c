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
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define RUN_DIRECTORY "/run"

static const char *const spellings[] = { "/run", "/var/run" };

const char *handoff_path_reason(handoff_path_verdict verdict)
{
    switch (verdict) {
    case HANDOFF_PATH_OK:            return "is permitted";
    case HANDOFF_PATH_EMPTY:         return "names no socket";
    case HANDOFF_PATH_RELATIVE:      return "is not absolute";
    case HANDOFF_PATH_TOO_LONG:      return "is too long";
    case HANDOFF_PATH_CONTROL_BYTE:  return "contains a control byte";
    case HANDOFF_PATH_OUTSIDE_RUN:   return "is not below /run or /var/run";
    case HANDOFF_PATH_BAD_COMPONENT: return "has an empty, \".\" or \"..\" component";
    case HANDOFF_PATH_NOT_PERMITTED: return "is below no SocketHandoffAllowedPrefix";
    }
    return "is not understood";
}

/* The part of text below one of the two spellings, without its slash; NULL when it is elsewhere. */
static const char *strip_run(const char *text)
{
    size_t i;

    for (i = 0; i < sizeof(spellings) / sizeof(spellings[0]); i++) {
        size_t len = strlen(spellings[i]);

        if (strncmp(text, spellings[i], len) == 0) {
            if (text[len] == '\0') {
                return text + len;
            }
            if (text[len] == '/') {
                return text + len + 1;
            }
        }
    }
    return NULL;
}

static handoff_path_verdict check_components(const char *below)
{
    const char *part = below;

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

static handoff_path_verdict parse(const char *text, const char **below)
{
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
    *below = strip_run(text);
    if (*below == NULL) {
        return HANDOFF_PATH_OUTSIDE_RUN;
    }
    if (**below == '\0') {
        return HANDOFF_PATH_OK;
    }
    return check_components(*below);
}

handoff_path_verdict handoff_prefix_parse(const char *text, const char **below)
{
    return parse(text, below);
}

/* Whether path is prefix itself or lies below it; a match ends at a component's border. */
static int covers(const char *prefix, const char *path)
{
    size_t len = strlen(prefix);

    if (len == 0) {
        return 1;
    }
    if (prefix[len - 1] == '/') {
        return strncmp(path, prefix, len) == 0;
    }
    return strncmp(path, prefix, len) == 0 && (path[len] == '\0' || path[len] == '/');
}

handoff_path_verdict handoff_target_resolve(const char *text, const handoff_target_policy *policy,
                                            handoff_target *target)
{
    const char *below = NULL;
    handoff_path_verdict verdict = parse(text, &below);
    size_t i;

    if (verdict != HANDOFF_PATH_OK) {
        return verdict;
    }
    if (below[0] == '\0') {
        return HANDOFF_PATH_EMPTY;
    }
    if (below[strlen(below) - 1] == '/') {
        return HANDOFF_PATH_BAD_COMPONENT;
    }
    for (i = 0; i < policy->count; i++) {
        if (covers(policy->prefixes[i], below)) {
            target->below = below;
            return HANDOFF_PATH_OK;
        }
    }
    return HANDOFF_PATH_NOT_PERMITTED;
}

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

int handoff_target_open_at(int dirfd, const char *below)
{
    char name[NAME_MAX + 1];
    const char *part = below;
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
            memcpy(name, part, len);
            name[len] = '\0';
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

int handoff_target_open(const handoff_target *target)
{
    int run = open(RUN_DIRECTORY, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int fd;
    int err;

    if (run < 0) {
        return -1;
    }
    fd = handoff_target_open_at(run, target->below);
    err = errno;
    close(run);
    errno = err;
    return fd;
}
