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
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static void prefixes_are_parsed(void)
{
    static const struct {
        const char *text;
        handoff_path_verdict verdict;
        const char *place;
    } cases[] = {
        { "/run", HANDOFF_PATH_OK, "run" },
        { "/run/", HANDOFF_PATH_OK, "run/" },
        { "/var/run", HANDOFF_PATH_OK, "run" },
        { "/var/run/", HANDOFF_PATH_OK, "run/" },
        { "/run/llm", HANDOFF_PATH_OK, "run/llm" },
        { "/var/run/llm/", HANDOFF_PATH_OK, "run/llm/" },
        { "/run/a.sock", HANDOFF_PATH_OK, "run/a.sock" },
        { "/run/...", HANDOFF_PATH_OK, "run/..." },
        { "/run/.hidden/..x", HANDOFF_PATH_OK, "run/.hidden/..x" },
        { "/run/a b", HANDOFF_PATH_OK, "run/a b" },
        { "", HANDOFF_PATH_EMPTY, NULL },
        { "run/llm", HANDOFF_PATH_RELATIVE, NULL },
        { "./run", HANDOFF_PATH_RELATIVE, NULL },
        { "/srv/llm/", HANDOFF_PATH_OK, "srv/llm/" },
        { "/var", HANDOFF_PATH_OK, "var" },
        { "/var/runx/a", HANDOFF_PATH_OK, "var/runx/a" },
        { "/runx", HANDOFF_PATH_OK, "runx" },
        { "/", HANDOFF_PATH_EMPTY, NULL },
        { "//", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "//run/a", HANDOFF_PATH_BAD_COMPONENT, NULL },
        { "/var//run/a", HANDOFF_PATH_BAD_COMPONENT, NULL },
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
        const char *place = NULL;
        handoff_path_verdict verdict = handoff_prefix_parse(cases[i].text, &place);

        ok(verdict == cases[i].verdict
           && (cases[i].place == NULL || (place != NULL && strcmp(place, cases[i].place) == 0)),
           "prefix case %zu %s", i, handoff_path_reason(cases[i].verdict));
    }
}

static handoff_path_verdict resolve(const char *prefix, const char *path, handoff_target *target)
{
    const char *place = NULL;
    handoff_target_policy policy = { &place, 1 };

    if (handoff_prefix_parse(prefix, &place) != HANDOFF_PATH_OK) {
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
        { "/run", "/run", HANDOFF_PATH_OK },
        { "/run/", "/run", HANDOFF_PATH_NOT_PERMITTED },
        { "/run", "/run/", HANDOFF_PATH_BAD_COMPONENT },
        { "/run", "/var/run/", HANDOFF_PATH_BAD_COMPONENT },
        { "/run", "/", HANDOFF_PATH_EMPTY },
        { "/srv/llm", "/srv/llm/h.sock", HANDOFF_PATH_OK },
        { "/srv/llm", "/run/srv/llm/h.sock", HANDOFF_PATH_NOT_PERMITTED },
        { "/srv/run", "/run", HANDOFF_PATH_NOT_PERMITTED },
        { "/var", "/var/h.sock", HANDOFF_PATH_OK },
        { "/var", "/var/run/h.sock", HANDOFF_PATH_NOT_PERMITTED },
        { "/run", "", HANDOFF_PATH_EMPTY },
        { "/run", "h.sock", HANDOFF_PATH_RELATIVE },
        { "/run", "../run/h.sock", HANDOFF_PATH_RELATIVE },
        { "/run", "/tmp/h.sock", HANDOFF_PATH_NOT_PERMITTED },
        { "/run", "/tmp/../run/h.sock", HANDOFF_PATH_BAD_COMPONENT },
        { "/run", "/RUN/h.sock", HANDOFF_PATH_NOT_PERMITTED },
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
    const char *const prefixes[] = { "run/one.sock", "run/two/" };
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

static void addresses_of_targets_are_taken_apart(void)
{
    static const struct {
        const char *text;
        handoff_path_verdict verdict;
        const char *path;
        const char *place;
    } cases[] = {
        { "unix:/run/a.sock", HANDOFF_PATH_OK, "/run/a.sock", "run/a.sock" },
        { "unix:/var/run/llm/a.sock", HANDOFF_PATH_OK, "/var/run/llm/a.sock", "run/llm/a.sock" },
        { "unix:/run/unix:/run", HANDOFF_PATH_OK, "/run/unix:/run", "run/unix:/run" },
        { "", HANDOFF_PATH_NO_SCHEME, NULL, NULL },
        { "/run/a.sock", HANDOFF_PATH_NO_SCHEME, NULL, NULL },
        { "UNIX:/run/a.sock", HANDOFF_PATH_NO_SCHEME, NULL, NULL },
        { "tcp:/run/a.sock", HANDOFF_PATH_NO_SCHEME, NULL, NULL },
        { "unix:", HANDOFF_PATH_EMPTY, NULL, NULL },
        { "unix:/", HANDOFF_PATH_EMPTY, NULL, NULL },
        { "unix:/run/", HANDOFF_PATH_BAD_COMPONENT, NULL, NULL },
        { "unix:/srv/a.sock", HANDOFF_PATH_OK, "/srv/a.sock", "srv/a.sock" },
        { "unix:run/a.sock", HANDOFF_PATH_RELATIVE, NULL, NULL },
        { "unix://run/a.sock", HANDOFF_PATH_BAD_COMPONENT, NULL, NULL },
        { "unix:/run/a/", HANDOFF_PATH_BAD_COMPONENT, NULL, NULL },
        { "unix:/run/../a", HANDOFF_PATH_BAD_COMPONENT, NULL, NULL },
        { "unix:/run/a\n", HANDOFF_PATH_CONTROL_BYTE, NULL, NULL },
    };
    size_t i;

    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        handoff_target target = { NULL };
        const char *path = NULL;
        handoff_path_verdict verdict = handoff_address_parse(cases[i].text, &path, &target);

        ok(verdict == cases[i].verdict
           && (cases[i].path == NULL ? path == NULL && target.place == NULL
               : path != NULL && strcmp(path, cases[i].path) == 0
                 && strcmp(target.place, cases[i].place) == 0),
           "address case %zu %s", i, handoff_path_reason(cases[i].verdict));
    }
}

static void names_of_targets_are_plain_words(void)
{
    static const char *const good[] = {
        "a", "7", "llm", "LLM-standby_2.eu", "a.", "allow", "nones",
    };
    static const char *const bad[] = {
        "", ".", "-a", "_a", ".a", "a b", "a/b", "a,b", "a=b", "\"", "\xc3\xa4", "a\n", "all",
        "All", "none", "NONE", "/run/a.sock",
    };
    char name[HANDOFF_NAME_MAX + 2];
    size_t i;

    for (i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        ok(handoff_name_is_good(good[i]), "a target may be called %s", good[i]);
    }
    for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        ok(!handoff_name_is_good(bad[i]), "bad name case %zu is refused", i);
    }
    memset(name, 'n', sizeof(name));
    name[HANDOFF_NAME_MAX] = '\0';
    ok(handoff_name_is_good(name), "a name of 64 bytes is good");
    name[HANDOFF_NAME_MAX] = 'n';
    name[HANDOFF_NAME_MAX + 1] = '\0';
    ok(!handoff_name_is_good(name), "one byte more is too long");
}

static int takes(const char *text, handoff_target_options *options)
{
    handoff_options_init(options);
    return handoff_option_parse(text, options) == NULL;
}

static void options_of_targets_are_taken(void)
{
    handoff_target_options o;

    handoff_options_init(&o);
    ok(o.transport == HANDOFF_TRANSPORT_AUTO && !o.envelope && !o.ack && o.user == NULL
       && o.user_id == -1 && o.timeout_ms == 0 && o.retries == -1 && o.headers == NULL
       && o.backup == NULL && o.max_fails == 5 && o.retry_ms == 2000, "the defaults are as said");
    ok(takes("transport=stream", &o) && o.transport == HANDOFF_TRANSPORT_STREAM,
       "transport=stream");
    ok(takes("TRANSPORT=SeqPacket", &o) && o.transport == HANDOFF_TRANSPORT_SEQPACKET,
       "keys and words in any case");
    ok(takes("transport=auto", &o) && o.transport == HANDOFF_TRANSPORT_AUTO, "transport=auto");
    ok(takes("envelope=on", &o) && o.envelope == 1, "envelope=on");
    ok(takes("envelope=off", &o) && o.envelope == 0, "envelope=off");
    ok(takes("ack=On", &o) && o.ack == 1, "ack=On");
    ok(takes("user=llm", &o) && strcmp(o.user, "llm") == 0 && o.user_id == -1, "user= by name");
    ok(takes("user=0", &o) && o.user_id == 0, "user= by number");
    ok(takes("user=4294967294", &o) && o.user_id == 4294967294LL, "the largest uid");
    ok(takes("user=7up", &o) && o.user_id == -1, "a name may begin with a digit");
    ok(takes("timeout=1ms", &o) && o.timeout_ms == 1, "the shortest timeout");
    ok(takes("timeout=10s", &o) && o.timeout_ms == 10000, "the longest timeout, in seconds");
    ok(takes("timeout=10000ms", &o) && o.timeout_ms == 10000, "and in milliseconds");
    ok(takes("retries=0", &o) && o.retries == 0, "no retry");
    ok(takes("retries=10", &o) && o.retries == 10, "ten retries");
    ok(takes("headers=Cookie", &o) && strcmp(o.headers, "Cookie") == 0, "one header");
    ok(takes("headers=Cookie,Accept-Language,X_y!", &o), "several headers");
    ok(takes("backup=llm-standby", &o) && strcmp(o.backup, "llm-standby") == 0, "a backup");
    ok(takes("maxfails=0", &o) && o.max_fails == 0, "never skipped");
    ok(takes("maxfails=1000", &o) && o.max_fails == 1000, "skipped after a thousand failures");
    ok(takes("retry=100ms", &o) && o.retry_ms == 100, "the shortest skipping");
    ok(takes("retry=60s", &o) && o.retry_ms == 60000, "the longest skipping");
}

static void nonsense_in_options_is_refused_and_changes_nothing(void)
{
    static const char *const bad[] = {
        "", "=", "transport", "transport=", "transport=tcp", "transport =auto", "transports=auto",
        "envelope=", "envelope=yes", "envelope=1", "ack=true", "user=", "user=4294967295",
        "timeout=", "timeout=0ms", "timeout=0s", "timeout=100", "timeout=1.5s",
        "timeout=-1s", "timeout=11s", "timeout=10001ms", "timeout=1m", "timeout=1 s", "timeout=ms",
        "timeout=99999999999999999999ms", "timeout=18446744073709551617ms", "retries=",
        "retries=11", "retries=-1", "retries=1x", "headers=", "headers=,", "headers=Cookie,",
        "headers=,Cookie", "headers=A,,B", "headers=A B", "headers=A:", "headers=A\n",
        "headers=\xc3\xa4", "headers=A,b,a", "backup=", "backup=/run/a.sock", "backup=all",
        "maxfails=", "maxfails=1001", "maxfails=0x5", "retry=99ms", "retry=61s", "retry=60001ms",
        "retry=2", "colour=red", "envelope", "path=/run/x",
    };
    handoff_target_options fresh;
    handoff_target_options o;
    char many[HANDOFF_HEADERS_MAX * 4 + 16];
    char *end;
    size_t i;

    handoff_options_init(&fresh);
    for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        const char *why;

        handoff_options_init(&o);
        why = handoff_option_parse(bad[i], &o);
        ok(why != NULL && strncmp(why, "must be ", 8) == 0 && strchr(why, ';') != NULL
           && memcmp(&o, &fresh, sizeof(o)) == 0,
           "option case %zu is refused with form and fix", i);
    }
    handoff_options_init(&o);
    ok(handoff_option_parse("ack=on", &o) == NULL && handoff_option_parse("ack=off", &o) != NULL
       && o.ack == 1, "a key that is given twice is refused");

    end = many + sprintf(many, "headers=");
    for (i = 0; i < HANDOFF_HEADERS_MAX; i++) {
        end += sprintf(end, "%sX%zu", i > 0 ? "," : "", i);
    }
    ok(takes(many, &o), "32 headers are good");
    sprintf(end, ",Y");
    ok(!takes(many, &o), "one more is too many");

    handoff_options_init(&o);
    ok(handoff_options_check(&o) == NULL, "nothing given goes together");
    ok(handoff_option_parse("headers=Cookie", &o) == NULL && handoff_options_check(&o) != NULL,
       "headers= without an envelope is refused");
    ok(handoff_option_parse("envelope=on", &o) == NULL && handoff_options_check(&o) == NULL,
       "headers= with an envelope is good, in any order");
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

static int opens(int root, const char *place)
{
    int fd = handoff_target_open_at(root, place);
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

static int opens_at(const char *place)
{
    handoff_target target = { place };
    int fd = handoff_target_open(&target);
    int err = errno;

    if (fd >= 0) {
        close(fd);
        return 0;
    }
    return err;
}

/* An exit status that no wrong answer makes. */
#define CANNOT_FORBID 77

/* From here on this process has no openat2(2), as in some sandboxes. */
static int forbid_openat2(void)
{
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat2, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof(rules) / sizeof(rules[0]), rules };

    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
           && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

static void targets_are_opened_the_same_with_and_without_openat2(void)
{
    char place[] = "/run/handoff-target-XXXXXX";
    char socket_name[64];
    char name[128];
    char command[sizeof(place) + 16];
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    int forbidden;

    if (mkdtemp(place) == NULL) {
        ok(1, "targets are opened the same with and without openat2 # SKIP /run is not writable");
        close(fd);
        return;
    }
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/d.sock", place);
    snprintf(name, sizeof(name), "%s/link.sock", place);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0
        || symlink("d.sock", name) != 0) {
        perror("bind");
    }
    for (forbidden = 0; forbidden < 2; forbidden++) {
        const char *how = forbidden ? "without" : "with";
        pid_t child = fork();
        int status = 0;

        if (child == 0) {
            int wrong = 0;

            if (forbidden && !forbid_openat2()) {
                _exit(CANNOT_FORBID);
            }
            snprintf(socket_name, sizeof(socket_name), "%s/d.sock", place + strlen("/"));
            wrong |= (opens_at(socket_name) != 0) << 1;
            snprintf(socket_name, sizeof(socket_name), "%s/link.sock", place + strlen("/"));
            wrong |= (opens_at(socket_name) != ELOOP) << 2;
            snprintf(socket_name, sizeof(socket_name), "%s/none.sock", place + strlen("/"));
            wrong |= (opens_at(socket_name) != ENOENT) << 3;
            wrong |= (opens_at(place + strlen("/")) != ENOTSOCK) << 4;
            _exit(wrong);
        }
        waitpid(child, &status, 0);
        if (WIFEXITED(status) && WEXITSTATUS(status) == CANNOT_FORBID) {
            ok(1, "without openat2 a socket is opened # SKIP no seccomp filter can be set here");
            continue;
        }
        ok(WIFEXITED(status) && WEXITSTATUS(status) == 0,
           "%s openat2 a socket is opened, a symlink, nothing and a directory are told (%d)", how,
           WEXITSTATUS(status));
    }
    close(fd);
    snprintf(command, sizeof(command), "rm -rf %s", place);
    ok(system(command) == 0, "and nothing is left in /run");
}

int main(void)
{
    char scratch[] = "/tmp/handoff-target-XXXXXX";
    char command[sizeof(scratch) + 16];

    prefixes_are_parsed();
    paths_are_matched_at_component_borders();
    several_prefixes_are_each_good();
    lengths_are_bounded();
    addresses_of_targets_are_taken_apart();
    names_of_targets_are_plain_words();
    options_of_targets_are_taken();
    nonsense_in_options_is_refused_and_changes_nothing();
    targets_are_opened_the_same_with_and_without_openat2();
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
