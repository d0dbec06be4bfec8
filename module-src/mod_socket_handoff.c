/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * mod_socket_handoff: an application authorises a request and then gives the client's connection,
 * a file descriptor, to a local daemon; the worker is free for the next request.
 *
 * This file is the table of contents:
 *   handoff_config   the directives
 *   handoff_filter   one request: take the headers, swallow the body, act at its end
 *   handoff_request  who may ask, which connections can be given away, what has to be read before
 *   handoff_origin   whose headers they are, by the names of handlers
 *   handoff_deliver  one client to one target or its backup, and what went wrong
 *   handoff_describe the message, from httpd's view of the request
 *   handoff_envelope the message, as bytes
 *   handoff_payload  data beside the message
 *   handoff_target   which sockets may be named, and how to open one without a race
 *   handoff_wire     connect and send
 *   handoff_detach   how the connection is taken away from httpd
 *   handoff_status   counters, and which target failed lately; handoff_counters in plain C,
 *                    handoff_status_page as it is shown
 *   handoff_result   the words for what became of a handoff
 */

#include "httpd.h"
#include "http_config.h"
#include "http_core.h"
#include "http_log.h"
#include "http_protocol.h"
#include "http_request.h"

#include "handoff_config.h"
#include "handoff_filter.h"
#include "handoff_status.h"
#include "handoff_version.h"

#if !AP_MODULE_MAGIC_AT_LEAST(20120211, 102)
#error "mod_socket_handoff needs Apache httpd 2.4.48 or later (ap_ssl_conn_is_ssl)"
#endif

APLOG_USE_MODULE(socket_handoff);

/* Readable in the binary: strings mod_socket_handoff.so | grep ^mod_socket_handoff/ */
static const char version[] = "mod_socket_handoff/" HANDOFF_VERSION;

static int say_version(apr_pool_t *pconf, apr_pool_t *plog, apr_pool_t *ptemp, server_rec *s)
{
    (void)pconf;
    (void)plog;
    (void)ptemp;

    /* httpd reads its configuration twice at startup; once is enough to be told. */
    if (ap_state_query(AP_SQ_MAIN_STATE) != AP_SQ_MS_CREATE_PRE_CONFIG) {
        ap_log_error(APLOG_MARK, APLOG_INFO, 0, s, "%s is loaded", version);
    }
    return OK;
}

static void register_hooks(apr_pool_t *p)
{
    (void)p;
    handoff_config_register();
    handoff_filter_register();
    handoff_status_register();
    ap_hook_post_config(say_version, NULL, NULL, APR_HOOK_MIDDLE);
    ap_hook_post_read_request(handoff_forget_request_headers, NULL, NULL, APR_HOOK_FIRST);

    /* Last, so that what others set while inserting their filters is forgotten too. */
    ap_hook_insert_filter(handoff_insert_filters, NULL, NULL, APR_HOOK_LAST);
    ap_hook_insert_error_filter(handoff_insert_error_filter, NULL, NULL, APR_HOOK_LAST);
}

/* The only symbol that the binary exports (the build hides the rest): httpd loads modules into one
 * name space. */
module AP_MODULE_DECLARE_DATA socket_handoff_module __attribute__((visibility("default"))) = {
    STANDARD20_MODULE_STUFF,
    handoff_create_dir_config,
    handoff_merge_dir_config,
    handoff_create_server_config,
    handoff_merge_server_config,
    handoff_directives,
    register_hooks,
#if defined(AP_MODULE_FLAG_NONE)
    AP_MODULE_FLAG_NONE
#endif
};
