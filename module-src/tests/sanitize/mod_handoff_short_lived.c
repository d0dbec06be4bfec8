/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * Mistakes that the lane with sanitizers exists to find, made on purpose. The main one: a handler
 * puts a socket of its own in the place of the connection's, and takes it from the request's pool.
 * The MPM uses the connection's socket after the request is gone. With APR as distributions build
 * it nothing is seen, because the pool's memory is still mapped and mostly not yet reused.
 *
 * "SetHandler handoff-short-lived", and as the query string:
 *   short      the socket from the request's pool
 *   long       the socket from the connection's pool, which is right
 *   undefined  no socket, but a shift that C does not define
 *
 * Never installed.
 */

#include "httpd.h"
#include "http_config.h"
#include "http_core.h"
#include "http_protocol.h"

#include "apr_network_io.h"

#include <string.h>

static int handler(request_rec *r)
{
    apr_socket_t *dead = NULL;
    int is_long;

    if (r->handler == NULL || strcmp(r->handler, "handoff-short-lived") != 0 || r->args == NULL) {
        return DECLINED;
    }
    if (strcmp(r->args, "undefined") == 0) {
        volatile int far = 32 + (int)strlen(r->args);

        ap_rprintf(r, "%d\n", 1 << far);
        return OK;
    }
    is_long = strcmp(r->args, "long") == 0;
    if (apr_socket_create(&dead, APR_INET, SOCK_STREAM, APR_PROTO_TCP,
                          is_long ? r->connection->pool : r->pool) != APR_SUCCESS) {
        return HTTP_INTERNAL_SERVER_ERROR;
    }
    ap_rputs("swapped\n", r);
    ap_rflush(r);
    r->connection->keepalive = AP_CONN_CLOSE;
    ap_set_core_module_config(r->connection->conn_config, dead);
    return OK;
}

static void register_hooks(apr_pool_t *p)
{
    (void)p;
    ap_hook_handler(handler, NULL, NULL, APR_HOOK_MIDDLE);
}

AP_DECLARE_MODULE(handoff_short_lived) = {
    STANDARD20_MODULE_STUFF, NULL, NULL, NULL, NULL, NULL, register_hooks,
#if defined(AP_MODULE_FLAG_NONE)
    AP_MODULE_FLAG_NONE
#endif
};
