/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/* Lines, each a key=value of SocketHandoffTarget. Whatever is accepted is within its documented
 * limits; whatever is refused changes nothing and says why. */

#include "fuzz.h"

#include "handoff_target.h"

#include <ctype.h>

#define MAX_LINES 16

static void promise_header_names(const char *names)
{
    const char *name = names;
    int count = 0;

    for (;;) {
        size_t length = strcspn(name, ",");
        size_t i;

        PROMISE(length > 0);
        PROMISE(++count <= 32);
        for (i = 0; i < length; i++) {
            PROMISE(isalnum((unsigned char)name[i]) || strchr("!#$%&'*+-.^_`|~", name[i]) != NULL);
        }
        if (name[length] == '\0') {
            return;
        }
        name += length + 1;
    }
}

static void promise_limits(const handoff_target_options *options, char **lines, int count)
{
    const char *strings[] = { options->user, options->headers, options->backup };
    size_t i;
    int line;

    PROMISE(options->timeout_ms >= 0 && options->timeout_ms <= 10000);
    PROMISE(options->retries >= -1 && options->retries <= 10);
    PROMISE(options->max_fails >= 0 && options->max_fails <= 1000);
    PROMISE(options->retry_ms >= 100 && options->retry_ms <= 60000);
    PROMISE(options->envelope == 0 || options->envelope == 1);
    PROMISE(options->ack == 0 || options->ack == 1);
    PROMISE(options->user_id >= -1 && options->user_id <= 0xffffffffLL);
    PROMISE(options->user_id == -1 || options->user != NULL);
    for (i = 0; i < sizeof(strings) / sizeof(strings[0]); i++) {
        int found = strings[i] == NULL;

        for (line = 0; line < count; line++) {
            found |= strings[i] != NULL && is_within(strings[i], lines[line]);
        }
        PROMISE(found);
        PROMISE(strings[i] == NULL || strings[i][0] != '\0');
    }
    if (options->headers != NULL) {
        promise_header_names(options->headers);
    }
    if (options->backup != NULL) {
        PROMISE(handoff_name_is_good(options->backup));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = { data, size };
    handoff_target_options options;
    char *lines[MAX_LINES];
    const char *error;
    int count;
    int i;

    memset(&options, 0, sizeof(options));
    handoff_options_init(&options);
    for (count = 0; count < MAX_LINES && in.size > 0; count++) {
        handoff_target_options before;

        memcpy(&before, &options, sizeof(before));
        lines[count] = take_line(&in);
        error = handoff_option_parse(lines[count], &options);
        if (error != NULL) {
            PROMISE(strlen(error) > 10);
            PROMISE(before.given == options.given && before.timeout_ms == options.timeout_ms
                    && before.retries == options.retries && before.user == options.user
                    && before.user_id == options.user_id && before.headers == options.headers
                    && before.backup == options.backup && before.max_fails == options.max_fails
                    && before.retry_ms == options.retry_ms && before.ack == options.ack
                    && before.envelope == options.envelope
                    && before.transport == options.transport);
        }
        else {
            PROMISE(options.given != before.given);
            PROMISE(handoff_option_parse(lines[count], &options) != NULL);     /* given twice */
        }
        promise_limits(&options, lines, count + 1);
    }
    error = handoff_options_check(&options);
    PROMISE(error == NULL || strlen(error) > 10);
    for (i = 0; i < count; i++) {
        free(lines[i]);
    }
    return 0;
}
