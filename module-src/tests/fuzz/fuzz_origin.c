/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/* A byte of flags, then a handler, a content type and a file name, each a line. Whatever mod_proxy will
 * connect to, only FastCGI is an application. */

#include "fuzz.h"

#include "handoff_origin.h"

#include <strings.h>

/* The URL that mod_proxy will use, read from behind and not from the beginning; NULL: none. */
static const char *url_of(const char *name)
{
    const char *url = name + strlen("proxy:");
    const char *bar;

    if (strncmp(name, "proxy:", strlen("proxy:")) != 0) {
        return NULL;
    }
    bar = strchr(url, '|');
    return strncasecmp(url, "unix:", 5) != 0 ? url : bar != NULL ? bar + 1 : "";
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = { data, size };
    unsigned int flags = take_byte(&in);
    char *lines[3] = { take_line(&in), take_line(&in), take_line(&in) };
    handoff_origin_names names = { flags & 1 ? lines[0] : NULL, flags & 2 ? lines[1] : NULL,
                                   flags & 4 ? lines[2] : NULL, (flags & 24) != 0, (flags & 16) != 0 };
    handoff_origin origin = handoff_origin_of(&names);
    const char *url = names.filename != NULL ? url_of(names.filename) : NULL;

    PROMISE(origin == HANDOFF_ORIGIN_APPLICATION || origin == HANDOFF_ORIGIN_FILE
            || origin == HANDOFF_ORIGIN_CLIENT || origin == HANDOFF_ORIGIN_BACKEND);
    if (url == NULL && !names.is_proxied && names.handler != NULL) {
        url = url_of(names.handler);
    }
    if (url != NULL) {
        int is_fastcgi = strncasecmp(url, "fcgi://", 7) == 0;

        PROMISE(origin != HANDOFF_ORIGIN_APPLICATION || (is_fastcgi && !names.is_forward));
        PROMISE(origin != HANDOFF_ORIGIN_BACKEND || !is_fastcgi || names.is_forward);
    }
    else {
        PROMISE(origin != HANDOFF_ORIGIN_APPLICATION || !names.is_proxied);
    }
    if (names.handler != NULL) {
        names.content_type = "httpd/send-as-is";
        PROMISE(handoff_origin_of(&names) == origin);
    }
    free(lines[0]);
    free(lines[1]);
    free(lines[2]);
    return 0;
}
