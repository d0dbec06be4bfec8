/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_ORIGIN_H
#define HANDOFF_ORIGIN_H

/*
 * Who has written the response headers of a request, as far as the names say by which httpd finds
 * its handler. Only an application of this host may give a client away.
 *
 * Rules of this room: plain libc, no httpd or APR type, no logging, no allocation.
 */

typedef enum {
    HANDOFF_ORIGIN_APPLICATION,   /* a handler of this host's, or a FastCGI application            */
    HANDOFF_ORIGIN_FILE,          /* mod_asis: a file's author, who also wrote its .htaccess      */
    HANDOFF_ORIGIN_CLIENT,        /* mod_reflector                                                */
    HANDOFF_ORIGIN_BACKEND        /* mod_proxy, but for FastCGI; and a balancer of whatever        */
} handoff_origin;

/* Strings may be NULL, as they are in a request_rec. */
typedef struct {
    const char *handler;          /* where none is set, httpd makes one of content_type           */
    const char *content_type;
    const char *filename;         /* "proxy:URL" for ProxyPass and [P]                            */
    int is_proxied;               /* r->proxyreq is not PROXYREQ_NONE                              */
    int is_forward;               /* it is PROXYREQ_PROXY: the client chose the server             */
} handoff_origin_names;

/* Nearly every request comes here, and goes no further than to its first characters. */
handoff_origin handoff_origin_of(const handoff_origin_names *names);

#endif
