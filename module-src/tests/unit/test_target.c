/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_target.h"
#include "tap.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static void prefixes_are_parsed(void)
{
    static const struct {
        const char *text;
        handoff_path_verdict verdict;
        const char *below;
    } cases[] = {
        { "/run", HANDOFF_PATH_OK, "" },
        { "/run/", HANDOFF_PATH_OK, "" },
        { "/var/run", HANDOFF_PATH_OK, "" },
        { "/var/run/", HANDOFF_PATH_OK, "" },
        { "/run/llm", HANDOFF_PATH_OK, "llm" },
        { "/var/run/llm/", HANDOFF_PATH_OK, "llm/" },
        { "/run/a.sock", HANDOFF_PATH_OK, "a.sock" },
        { "/run/...", HANDOFF_PATH_OK, "..." },
        { "/run/.hidden/..x", HANDOFF_PATH_OK, ".hidden/..x" },
        { "/run/a b", HANDOFF_PATH_OK, "a b" },
        { "", HANDOFF_PATH_EMPTY, NULL },
        { "run/llm", HANDOFF_PATH_RELATIVE, NULL },
        { "./run", HANDOFF_PATH_RELATIVE, NULL },
        { "/", HANDOFF_PATH_OUTSIDE_RUN, NULL },
        { "/tmp/", HANDOFF_PATH_OUTSIDE_RUN, NULL },
        { "/var", HANDOFF_PATH_OUTSIDE_RUN, NULL },
        { "/var/", HANDOFF_PATH_OUTSIDE_RUN, NULL },
        { "/runx", HANDOFF_PATH_OUTSIDE_RUN, NULL },
        { "/runx/a", HANDOFF_PATH_OUTSIDE_RUN, NULL },
        { "//run/a", HANDOFF_PATH_OUTSIDE_RUN, NULL },
        { "/var//run/a", HANDOFF_PATH_OUTSIDE_RUN, NULL },
        { "/var/run/../x", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "/run/..", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "/run/a/../../tmp", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "/run/./a", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "/run/a/.", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "/run//a", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "/run//", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "/run/a//", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "/run/a\nb", HANDOFF_PATH_CONTROL_BYTE, NULL },
        { "/run/a\x7f", HANDOFF_PATH_CONTROL_BYTE, NULL },
        { "\t/run/a", HANDOFF_PATH_CONTROL_BYTE, NULL },
    };
    size_t i;

    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const char *below = NULL;
        handoff_path_verdict verdict = handoff_prefix_parse(cases[i].text, &below);

        ok(verdict == cases[i].verdict
           && (cases[i].below == NULL || (below != NULL && strcmp(below, cases[i].below) == 0)),
           "prefix case %zu %s", i, handoff_path_reason(cases[i].verdict));
    }
}

static handoff_path_verdict resolve(const char *prefix, const char *path, handoff_target *target)
{
    const char *below = NULL;
    handoff_target_policy policy = { &below, 1 };

    if (handoff_prefix_parse(prefix, &below) != HANDOFF_PATH_OK) {
        return (handoff_path_verdict)-1;
    }
    return handoff_target_resolve(path, &policy, target);
}

static void paths_are_matched_at_component_borders(void)
{
    static const struct {
        const char *prefix;
        const char *path;
        handoff_path_verdict verdict;
    } cases[] = {
        { "/run/a.sock", "/run/a.sock", HANDOFF_PATH_OK },
        { "/run/a.sock", "/var/run/a.sock", HANDOFF_PATH_OK },
        { "/var/run/a.sock", "/run/a.sock", HANDOFF_PATH_OK },
        { "/run/a.sock", "/run/a.sock2", HANDOFF_PATH_NOT_PERMITTED },
        { "/run/a.sock", "/run/a.soc", HANDOFF_PATH_NOT_PERMITTED },
        { "/run/llm", "/run/llm/h.sock", HANDOFF_PATH_OK },
        { "/run/llm/", "/run/llm/h.sock", HANDOFF_PATH_OK },
        { "/run/llm/", "/run/llm/deep/er/h.sock", HANDOFF_PATH_OK },
        { "/run/llm/", "/var/run/llm/h.sock", HANDOFF_PATH_OK },
        { "/var/run/", "/run/x.sock", HANDOFF_PATH_OK },
        { "/run", "/var/run/x.sock", HANDOFF_PATH_OK },
        { "/run/llm", "/run/llmx", HANDOFF_PATH_NOT_PERMITTED },
        { "/run/llm", "/run/llmx/h.sock", HANDOFF_PATH_NOT_PERMITTED },
        { "/run/llm/", "/run/llm", HANDOFF_PATH_NOT_PERMITTED },
        { "/run/llm/", "/run/other/h.sock", HANDOFF_PATH_NOT_PERMITTED },
        { "/run/llm/", "/run/llm/../docker.sock", HANDOFF_PATH_BAD_COMPONENT },
        { "/run/llm/", "/run/llm//h.sock", HANDOFF_PATH_BAD_COMPONENT },
        { "/run/llm/", "/run/llm/h.sock/", HANDOFF_PATH_BAD_COMPONENT },
        { "/run", "/run", HANDOFF_PATH_EMPTY },
        { "/run", "/run/", HANDOFF_PATH_EMPTY },
        { "/run", "/var/run/", HANDOFF_PATH_EMPTY },
        { "/run", "", HANDOFF_PATH_EMPTY },
        { "/run", "h.sock", HANDOFF_PATH_RELATIVE },
        { "/run", "../run/h.sock", HANDOFF_PATH_RELATIVE },
        { "/run", "/tmp/h.sock", HANDOFF_PATH_OUTSIDE_RUN },
        { "/run", "/tmp/../run/h.sock", HANDOFF_PATH_OUTSIDE_RUN },
        { "/run", "/RUN/h.sock", HANDOFF_PATH_OUTSIDE_RUN },
        { "/run", "/run/h\r.sock", HANDOFF_PATH_CONTROL_BYTE },
    };
    size_t i;

    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        handoff_target target = { NULL };
        handoff_path_verdict verdict = resolve(cases[i].prefix, cases[i].path, &target);

        ok(verdict == cases[i].verdict, "under %s a path case %zu %s", cases[i].prefix, i,
           handoff_path_reason(cases[i].verdict));
    }
}

static void several_prefixes_are_each_good(void)
{
    const char *const prefixes[] = { "one.sock", "two/" };
    handoff_target_policy policy = { prefixes, 2 };
    handoff_target_policy none = { prefixes, 0 };
    handoff_target target = { NULL };

    ok(handoff_target_resolve("/run/one.sock", &policy, &target) == HANDOFF_PATH_OK,
       "the first of two prefixes permits");
    ok(handoff_target_resolve("/run/two/x", &policy, &target) == HANDOFF_PATH_OK,
       "the second of two prefixes permits");
    ok(handoff_target_resolve("/run/three", &policy, &target) == HANDOFF_PATH_NOT_PERMITTED,
       "a third place is not permitted");
    ok(handoff_target_resolve("/run/one.sock", &none, &target) == HANDOFF_PATH_NOT_PERMITTED,
       "no prefix permits nothing");
}

static void lengths_are_bounded(void)
{
    char path[PATH_MAX + 8];
    handoff_target target = { NULL };

    memset(path, 'a', sizeof(path));
    memcpy(path, "/run/", 5);
    path[5 + NAME_MAX] = '\0';
    ok(resolve("/run", path, &target) == HANDOFF_PATH_OK, "a component of NAME_MAX bytes is good");
    path[5 + NAME_MAX] = 'a';
    path[6 + NAME_MAX] = '\0';
    ok(resolve("/run", path, &target) == HANDOFF_PATH_TOO_LONG, "one byte more is too long");
    memset(path, 'a', sizeof(path));
    memcpy(path, "/run/", 5);
    path[sizeof(path) - 1] = '\0';
    ok(resolve("/run", path, &target) == HANDOFF_PATH_TOO_LONG, "PATH_MAX bounds a path");
}

static int make_socket(int dirfd, const char *name)
{
    struct sockaddr_un address;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    int here = open(".", O_RDONLY | O_DIRECTORY);

    memset(&address, 0, sizeof(address));
    address.sun_family = AF_UNIX;
    strncpy(address.sun_path, name, sizeof(address.sun_path) - 1);
    if (fd < 0 || here < 0 || fchdir(dirfd) != 0
        || bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0 || fchdir(here) != 0) {
        perror("make_socket");
        exit(1);
    }
    close(here);
    return fd;
}

static int opens(int root, const char *below)
{
    int fd = handoff_target_open_at(root, below);
    int err = errno;

    if (fd >= 0) {
        close(fd);
        return 0;
    }
    return err;
}

/* Swaps "swap" between a directory with a socket and a symlink to a directory with another one. */
typedef struct {
    int root;
    atomic_int stop;
} swapper;

static void *swap_forever(void *baton)
{
    swapper *s = baton;

    while (!atomic_load(&s->stop)) {
        renameat2(s->root, "swap", s->root, "link", RENAME_EXCHANGE);
    }
    return NULL;
}

static void names_are_opened_without_following_symlinks(const char *scratch)
{
    int root = open(scratch, O_RDONLY | O_DIRECTORY);
    int dir;
    int evil;
    int fds[4];
    struct stat good;
    struct stat st;
    int refused = 0;
    int opened = 0;
    int wrong = 0;
    int i;
    swapper s;
    pthread_t thread;

    mkdirat(root, "dir", 0700);
    mkdirat(root, "evil", 0700);
    dir = openat(root, "dir", O_RDONLY | O_DIRECTORY);
    evil = openat(root, "evil", O_RDONLY | O_DIRECTORY);
    fds[0] = make_socket(root, "a.sock");
    fds[1] = make_socket(dir, "b.sock");
    fds[2] = make_socket(evil, "b.sock");
    close(openat(root, "file", O_WRONLY | O_CREAT, 0600));
    if (symlinkat("a.sock", root, "to-socket") != 0 || symlinkat("dir", root, "to-dir") != 0
        || symlinkat("nowhere", root, "dangling") != 0) {
        perror("symlinkat");
        exit(1);
    }

    ok(opens(root, "a.sock") == 0, "a socket opens");
    ok(opens(root, "dir/b.sock") == 0, "a socket in a directory opens");
    ok(opens(root, "none.sock") == ENOENT, "a missing socket is ENOENT");
    ok(opens(root, "none/b.sock") == ENOENT, "a missing directory is ENOENT");
    ok(opens(root, "file") == ENOTSOCK, "a file is ENOTSOCK");
    ok(opens(root, "dir") == ENOTSOCK, "a directory is ENOTSOCK");
    ok(opens(root, "file/b.sock") == ENOTDIR, "a way through a file is ENOTDIR");
    ok(opens(root, "to-socket") == ELOOP, "a symlink to a socket is ELOOP");
    ok(opens(root, "to-dir/b.sock") == ELOOP, "a symlink to a directory is ELOOP");
    ok(opens(root, "dangling") == ELOOP, "a dangling symlink is ELOOP");
    ok(opens(root, "") == EINVAL, "no name at all is EINVAL");

    i = openat(root, "/", O_RDONLY);        /* the next free number, to see what leaks */
    close(i);
    for (refused = 0; refused < 100; refused++) {
        opens(root, "to-dir/b.sock");
        opens(root, "dir/b.sock");
    }
    fds[3] = openat(root, "/", O_RDONLY);
    ok(fds[3] == i, "opening and failing to open leak no descriptor");
    close(fds[3]);

    /* A symlink that is swapped in between any two steps: either refused, or the good socket. */
    mkdirat(root, "swap", 0700);
    i = openat(root, "swap", O_RDONLY | O_DIRECTORY);
    fds[3] = make_socket(i, "b.sock");
    fstatat(i, "b.sock", &good, AT_SYMLINK_NOFOLLOW);
    close(i);
    if (symlinkat("evil", root, "link") != 0) {
        perror("symlinkat");
        exit(1);
    }
    s.root = root;
    atomic_init(&s.stop, 0);
    pthread_create(&thread, NULL, swap_forever, &s);
    refused = 0;
    for (i = 0; i < 200000 && (i < 20000 || opened == 0 || refused == 0); i++) {
        int fd = handoff_target_open_at(root, "swap/b.sock");

        if (fd < 0) {
            refused += errno == ELOOP;
            wrong += errno != ELOOP;
        }
        else {
            opened++;
            fstat(fd, &st);
            wrong += st.st_ino != good.st_ino;
            close(fd);
        }
    }
    atomic_store(&s.stop, 1);
    pthread_join(thread, NULL);
    ok(opened > 0 && refused > 0, "the race was really run (%s)",
       opened > 0 && refused > 0 ? "both sides seen" : "one side only");
    ok(wrong == 0, "a symlink swapped in while opening never leads to its socket");

    for (i = 0; i < 4; i++) {
        close(fds[i]);
    }
    close(evil);
    close(dir);
    close(root);
}

int main(void)
{
    char scratch[] = "/tmp/handoff-target-XXXXXX";
    char command[sizeof(scratch) + 16];

    prefixes_are_parsed();
    paths_are_matched_at_component_borders();
    several_prefixes_are_each_good();
    lengths_are_bounded();
    if (mkdtemp(scratch) == NULL) {
        perror("mkdtemp");
        return 1;
    }
    names_are_opened_without_following_symlinks(scratch);
    snprintf(command, sizeof(command), "rm -rf %s", scratch);
    if (system(command) != 0) {
        return 1;
    }
    return tap_end();
}
