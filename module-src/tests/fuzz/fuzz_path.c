/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/* Two lines: a prefix as an operator writes it, and a path as an application names it. Whatever is
 * accepted lies below /run, goes nowhere else on the way, and is covered by the prefix. */

#define _POSIX_C_SOURCE 200809L

#include "fuzz.h"

#include "handoff_target.h"

/* By another way than the parser's: cut at slashes, look at each part. */
static void promise_harmless(const char *below)
{
    char *copy = strdup(below);
    char *part = copy;
    char *slash;

    PROMISE(copy != NULL);
    PROMISE(below[0] != '\0' && below[0] != '/');
    do {
        slash = strchr(part, '/');
        if (slash != NULL) {
            *slash = '\0';
        }
        PROMISE(strcmp(part, ".") != 0 && strcmp(part, "..") != 0 && strcmp(part, "") != 0);
        PROMISE(strlen(part) <= 255);
        for (; *part != '\0'; part++) {
            PROMISE((unsigned char)*part >= 0x20 && *part != 0x7f);
        }
        part = slash != NULL ? slash + 1 : NULL;
    } while (part != NULL);
    free(copy);
}

static void promise_below_run(const char *text, const char *below)
{
    PROMISE(is_within(below, text));
    PROMISE(strncmp(text, "/run/", 5) == 0 ? below == text + 5
            : strncmp(text, "/var/run/", 9) == 0 && below == text + 9);
}

static void promise_covered(const char *prefix, const char *path)
{
    size_t length = strlen(prefix);

    while (length > 0 && prefix[length - 1] == '/') {
        length--;
    }
    PROMISE(strncmp(prefix, path, length) == 0);
    PROMISE(length == 0 || path[length] == '\0' || path[length] == '/');
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *everywhere[] = { "" };
    fuzz_input in = { data, size };
    char *prefix = take_line(&in);
    char *text = take_line(&in);
    const char *below = NULL;
    const char *path = NULL;
    handoff_target target = { NULL };
    handoff_target address = { NULL };
    handoff_target_policy policy = { everywhere, 1 };
    int good;

    if (handoff_prefix_parse(prefix, &below) == HANDOFF_PATH_OK) {
        PROMISE(is_within(below, prefix));
        policy.prefixes = &below;
    }
    if (handoff_target_resolve(text, &policy, &target) == HANDOFF_PATH_OK) {
        promise_below_run(text, target.below);
        promise_harmless(target.below);
        promise_covered(policy.prefixes[0], target.below);
    }

    /* The policy only takes away. */
    good = handoff_socket_parse(text, &target) == HANDOFF_PATH_OK;
    if (good) {
        promise_below_run(text, target.below);
        promise_harmless(target.below);
    }
    policy.prefixes = everywhere;
    PROMISE(good == (handoff_target_resolve(text, &policy, &address) == HANDOFF_PATH_OK));

    if (handoff_address_parse(text, &path, &address) == HANDOFF_PATH_OK) {
        PROMISE(strncmp(text, "unix:", 5) == 0 && path == text + 5);
        promise_below_run(path, address.below);
        promise_harmless(address.below);
    }
    if (handoff_name_is_good(text)) {
        PROMISE(text[0] != '\0' && strlen(text) <= 64);
        PROMISE(strspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
                == strlen(text));
        PROMISE(!good);         /* a name is never taken for a path, nor a path for a name */
    }
    free(prefix);
    free(text);
    return 0;
}
