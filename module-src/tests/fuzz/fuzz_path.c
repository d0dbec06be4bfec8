/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/* Two lines: a prefix as an operator writes it, and a path as an application names it. Whatever is
 * accepted goes nowhere else on the way and is covered by the prefix. */

#define _POSIX_C_SOURCE 200809L

#include "fuzz.h"

#include "handoff_target.h"

/* By another way than the parser's: cut at slashes, look at each part. */
static void promise_harmless(const char *place)
{
    char *copy = strdup(place);
    char *part = copy;
    char *slash;

    PROMISE(copy != NULL);
    PROMISE(place[0] != '\0' && place[0] != '/');
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

static void promise_canonical(const char *text, const char *place)
{
    int alias = strcmp(text, "/var/run") == 0 || strncmp(text, "/var/run/", 9) == 0;

    PROMISE(is_within(place, text));
    PROMISE(text[0] == '/' && place == text + (alias ? 5 : 1));
    PROMISE(handoff_place_is_run(place)
            == (strcmp(place, "run") == 0 || strncmp(place, "run/", 4) == 0));
}

static void promise_covered(const char *prefix, const char *path)
{
    size_t length = strlen(prefix);

    while (prefix[length - 1] == '/') {
        length--;
    }
    PROMISE(strncmp(prefix, path, length) == 0);
    PROMISE(path[length] == '\0' || path[length] == '/');
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = { data, size };
    char *prefix = take_line(&in);
    char *text = take_line(&in);
    const char *place = NULL;
    const char *path = NULL;
    handoff_target target = { NULL };
    handoff_target address = { NULL };
    handoff_target_policy policy = { NULL, 0 };
    int good;

    if (handoff_prefix_parse(prefix, &place) == HANDOFF_PATH_OK) {
        PROMISE(is_within(place, prefix));
        policy.prefixes = &place;
        policy.count = 1;
    }
    if (handoff_target_resolve(text, &policy, &target) == HANDOFF_PATH_OK) {
        PROMISE(policy.count == 1);
        promise_canonical(text, target.place);
        promise_harmless(target.place);
        promise_covered(policy.prefixes[0], target.place);
    }

    /* The policy only takes away. */
    good = handoff_socket_parse(text, &target) == HANDOFF_PATH_OK;
    if (good) {
        promise_canonical(text, target.place);
        promise_harmless(target.place);
        policy.prefixes = &target.place;
        policy.count = 1;
        PROMISE(handoff_target_resolve(text, &policy, &address) == HANDOFF_PATH_OK);
    }

    if (handoff_address_parse(text, &path, &address) == HANDOFF_PATH_OK) {
        PROMISE(strncmp(text, "unix:", 5) == 0 && path == text + 5);
        promise_canonical(path, address.place);
        promise_harmless(address.place);
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
