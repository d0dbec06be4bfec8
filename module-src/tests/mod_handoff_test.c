/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * Plays the application in the integration tests: one handler, "handoff-test", whose query
 * arguments say what it does. In order:
 *
 *   rh=NAME      answer with the value of that request header, and nothing else of the below
 *   t=PATH       set X-Socket-Handoff
 *   d=DATA       set X-Handoff-Data          dn=N   to N bytes
 *   from=VALUE   set X-Handoff-Data-From
 *   set=NAME:VALUE  add a response header; may be given several times
 *   user=NAME    set r->user, as an authentication module does
 *   err=1        put all of these into err_headers_out, as CGI and FastCGI handlers do
 *   enc=NAME     set Content-Encoding
 *   status=N     set r->status
 *   read=1       read the request body to its end          read=copy   and write it
 *   text=TEXT    write that
 *   ctl=N        write N control bytes (0x01)
 *   bin=N        write N bytes that are no UTF-8 (0xff)
 *   body=N       write N bytes ('b'); a body of 2 bytes is written where neither t nor body is given
 *   flush=1      flush after them
 *   sleep=MS     work for so long afterwards
 *   fail=N       end with an error bucket of that status instead of the end of the stream
 *   ret=N        return that status instead of ending the output
 *   after=N      end the output, and return that status all the same, as mod_proxy_fcgi does
 *   crash=N      send itself that signal
 *   silent=1     write nothing, not even the end: leave that to httpd, as simple handlers do
 */

#include "httpd.h"
#include "http_config.h"
#include "http_protocol.h"
#include "util_filter.h"

#include "apr_lib.h"
#include "apr_strings.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

static const char *arg(request_rec *r, const char *name)
{
    char *rest = apr_pstrdup(r->pool, r->args != NULL ? r->args : "");
    char *last = NULL;
    char *pair;

    for (pair = apr_strtok(rest, "&", &last); pair != NULL; pair = apr_strtok(NULL, "&", &last)) {
        size_t len = strlen(name);

        if (strncmp(pair, name, len) == 0 && pair[len] == '=') {
            char *value = pair + len + 1;

            ap_unescape_urlencoded(value);
            return value;
        }
    }
    return NULL;
}

static long number(request_rec *r, const char *name)
{
    const char *value = arg(r, name);

    return value != NULL ? atol(value) : 0;
}

static char *fill(request_rec *r, char byte, long count)
{
    char *text = apr_palloc(r->pool, (apr_size_t)count + 1);

    memset(text, byte, (size_t)count);
    text[count] = '\0';
    return text;
}

/* All arguments of that name, each "NAME:VALUE", as headers. */
static void set_headers(request_rec *r, apr_table_t *headers)
{
    char *rest = apr_pstrdup(r->pool, r->args != NULL ? r->args : "");
    char *last = NULL;
    char *pair;

    for (pair = apr_strtok(rest, "&", &last); pair != NULL; pair = apr_strtok(NULL, "&", &last)) {
        if (strncmp(pair, "set=", 4) == 0) {
            char *name = pair + 4;
            char *value;

            ap_unescape_urlencoded(name);
            value = strchr(name, ':');
            if (value != NULL) {
                *value++ = '\0';
                apr_table_add(headers, name, value);
            }
        }
    }
}

static void read_body(request_rec *r, int copy)
{
    char buffer[8192];
    long length;

    if (ap_setup_client_block(r, REQUEST_CHUNKED_DECHUNK) == OK && ap_should_client_block(r)) {
        while ((length = ap_get_client_block(r, buffer, sizeof(buffer))) > 0) {
            if (copy) {
                ap_rwrite(buffer, (int)length, r);
            }
        }
    }
}

static int handler(request_rec *r)
{
    apr_bucket_brigade *bb;
    apr_bucket_alloc_t *list = r->connection->bucket_alloc;
    apr_table_t *headers;
    long body;

    if (r->handler == NULL || strcmp(r->handler, "handoff-test") != 0) {
        return DECLINED;
    }
    if (arg(r, "rh") != NULL) {
        const char *value = apr_table_get(r->headers_in, arg(r, "rh"));

        ap_set_content_type(r, "text/plain");
        ap_rprintf(r, "[%s]", value != NULL ? value : "");
        return OK;
    }

    headers = arg(r, "err") != NULL ? r->err_headers_out : r->headers_out;
    if (arg(r, "t") != NULL) {
        apr_table_set(headers, "X-Socket-Handoff", arg(r, "t"));
    }
    if (arg(r, "d") != NULL) {
        apr_table_set(headers, "X-Handoff-Data", arg(r, "d"));
    }
    if (arg(r, "dn") != NULL) {
        apr_table_setn(headers, "X-Handoff-Data", fill(r, 'd', number(r, "dn")));
    }
    if (arg(r, "from") != NULL) {
        apr_table_set(headers, "X-Handoff-Data-From", arg(r, "from"));
    }
    set_headers(r, headers);
    if (arg(r, "user") != NULL) {
        r->user = (char *)arg(r, "user");
    }
    if (arg(r, "enc") != NULL) {
        apr_table_set(headers, "Content-Encoding", arg(r, "enc"));
    }
    if (arg(r, "status") != NULL) {
        r->status = (int)number(r, "status");
    }
    ap_set_content_type(r, "text/plain");
    if (arg(r, "read") != NULL) {
        read_body(r, strcmp(arg(r, "read"), "copy") == 0);
    }
    if (arg(r, "crash") != NULL) {
        raise((int)number(r, "crash"));
    }
    if (arg(r, "silent") != NULL) {
        return OK;
    }

    body = arg(r, "body") != NULL ? number(r, "body") : arg(r, "t") != NULL ? 0 : 2;
    bb = apr_brigade_create(r->pool, list);
    if (body > 0) {
        APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_pool_create(fill(r, 'b', body), (apr_size_t)body,
                                                           r->pool, list));
    }
    if (arg(r, "text") != NULL) {
        APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_pool_create(arg(r, "text"), strlen(arg(r, "text")),
                                                           r->pool, list));
    }
    if (arg(r, "ctl") != NULL) {
        APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_pool_create(fill(r, 1, number(r, "ctl")),
                                                           (apr_size_t)number(r, "ctl"),
                                                           r->pool, list));
    }
    if (arg(r, "bin") != NULL) {
        APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_pool_create(fill(r, (char)0xff, number(r, "bin")),
                                                           (apr_size_t)number(r, "bin"),
                                                           r->pool, list));
    }
    if (arg(r, "flush") != NULL) {
        APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_flush_create(list));
    }
    if (!APR_BRIGADE_EMPTY(bb)) {
        ap_pass_brigade(r->output_filters, bb);
        apr_brigade_cleanup(bb);
    }
    if (arg(r, "sleep") != NULL) {
        apr_sleep(apr_time_from_msec(number(r, "sleep")));
    }
    if (arg(r, "ret") != NULL) {
        return (int)number(r, "ret");
    }
    if (arg(r, "fail") != NULL) {
        APR_BRIGADE_INSERT_TAIL(bb, ap_bucket_error_create((int)number(r, "fail"), NULL, r->pool,
                                                           list));
    }
    APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_eos_create(list));
    if (arg(r, "after") != NULL) {
        ap_pass_brigade(r->output_filters, bb);
        return (int)number(r, "after");
    }

    /* As mod_proxy_fcgi does: an error of the filters becomes an error of the handler's own. */
    return ap_pass_brigade(r->output_filters, bb) == APR_SUCCESS ? OK : HTTP_SERVICE_UNAVAILABLE;
}

static void register_hooks(apr_pool_t *p)
{
    (void)p;
    ap_hook_handler(handler, NULL, NULL, APR_HOOK_MIDDLE);
}

AP_DECLARE_MODULE(handoff_test) = {
    STANDARD20_MODULE_STUFF, NULL, NULL, NULL, NULL, NULL, register_hooks,
#if defined(AP_MODULE_FLAG_NONE)
    AP_MODULE_FLAG_NONE
#endif
};
