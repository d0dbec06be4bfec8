/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_origin.h"

#include <stddef.h>
#include <string.h>

#define PROXY "proxy:"

/* Without regard to ASCII case; not strncasecmp(3), which asks the locale. word is in lower case. */
static int begins_with(const char *text, const char *word)
{
    for (; *word != '\0'; text++, word++) {
        int c = *text >= 'A' && *text <= 'Z' ? *text + ('a' - 'A') : *text;

        if (c != *word) {
            return 0;
        }
    }
    return 1;
}

/* "proxy:fcgi://...", or "proxy:unix:/run/php/php-fpm.sock|fcgi://..." */
static int is_fastcgi(const char *name)
{
    const char *url = name + strlen(PROXY);

    if (begins_with(url, "unix:")) {
        url = strchr(url, '|');
        if (url == NULL) {
            return 0;
        }
        url++;
    }
    return begins_with(url, "fcgi://");
}

/* Whether that handler will run. Where httpd makes it of the content type, what follows the type is
 * not of its name. */
static int is_handler(const handoff_origin_names *names, const char *handler, const char *name)
{
    size_t length = strlen(name);

    return strncmp(handler, name, length) == 0
           && (handler[length] == '\0'
               || (names->handler == NULL && (handler[length] == ';' || handler[length] == ' ')));
}

/* What mod_proxy will connect to, or NULL where it has nothing to do with this request. It believes
 * a "proxy:" in the file name (ProxyPass, [P]) before one in the handler (SetHandler). */
static const char *proxied_backend(const handoff_origin_names *names)
{
    const char *filename = names->filename;
    const char *handler = names->handler;

    if (names->is_proxied
        || (filename != NULL && filename[0] == 'p' && strncmp(filename, PROXY, strlen(PROXY)) == 0)) {
        return filename != NULL ? filename : "";
    }
    if (handler != NULL && handler[0] == 'p'
        && (strncmp(handler, PROXY, strlen(PROXY)) == 0 || strcmp(handler, "proxy-server") == 0)) {
        return handler;
    }
    return NULL;
}

handoff_origin handoff_origin_of(const handoff_origin_names *names)
{
    const char *handler = names->handler != NULL ? names->handler
                          : names->content_type != NULL ? names->content_type : "";
    const char *backend;

    switch (handler[0]) {
    case 's':
    case 'h':
        if (is_handler(names, handler, "send-as-is")
            || is_handler(names, handler, "httpd/send-as-is")) {
            return HANDOFF_ORIGIN_FILE;
        }
        break;
    case 'r':
        if (is_handler(names, handler, "reflector")) {
            return HANDOFF_ORIGIN_CLIENT;
        }
        break;
    default:
        break;
    }
    backend = proxied_backend(names);
    if (backend == NULL) {
        return HANDOFF_ORIGIN_APPLICATION;
    }
    return !names->is_forward && strncmp(backend, PROXY, strlen(PROXY)) == 0 && is_fastcgi(backend)
           ? HANDOFF_ORIGIN_APPLICATION : HANDOFF_ORIGIN_BACKEND;
}
