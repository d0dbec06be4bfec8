/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * The application of the benchmarks: the cheapest dynamic response that httpd can give, and the
 * cheapest request for a handoff. One handler, "bench", told by its location what to do, so that
 * both cost the same up to the point where they differ:
 *
 *   BenchAnswer On                   answer; httpd looks for no file, as mod_proxy has it for its own
 *   BenchTarget NAME|PATH            ask for a handoff to it instead of answering
 *   BenchData BYTES [response-body]  with so much data, in X-Handoff-Data or as the response's body
 *
 * A second one, "bench-count", for an httpd under valgrind's callgrind: what was counted since the
 * last time is written to a file. (callgrind_control would do it from outside, but it traces the
 * process to do so, and has left it hanging.)
 *
 * Never installed.
 */

#include "httpd.h"
#include "http_config.h"
#include "http_protocol.h"
#include "http_request.h"

#include "apr_strings.h"

#include <stdlib.h>
#include <string.h>

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#endif

#include "answer.h"

#define MAX_DATA (8 * 1024 * 1024)

/* What an application server passes on at a time (AP_IOBUFSIZE). */
#define PIECE 8192

typedef struct {
    int is_ours;                  /* this location has nothing to do with files                   */
    const char *target;           /* NULL: answer                                                 */
    const char *data;             /* NUL-terminated; NULL: none                                   */
    apr_size_t length;
    int in_body;
} bench_config;

module AP_MODULE_DECLARE_DATA bench_module;

static void *create_config(apr_pool_t *p, char *dir)
{
    (void)dir;
    return apr_pcalloc(p, sizeof(bench_config));
}

static void *merge_config(apr_pool_t *p, void *base, void *add)
{
    (void)p;
    return ((bench_config *)add)->is_ours ? add : base;
}

static const char *set_target(cmd_parms *cmd, void *config, const char *name)
{
    (void)cmd;
    ((bench_config *)config)->is_ours = 1;
    ((bench_config *)config)->target = name;
    return NULL;
}

static const char *set_answer(cmd_parms *cmd, void *config, int on)
{
    (void)cmd;
    ((bench_config *)config)->is_ours = on;
    return NULL;
}

static const char *set_data(cmd_parms *cmd, void *config, const char *bytes, const char *how)
{
    bench_config *bench = config;
    long length = strtol(bytes, NULL, 10);
    char *data;

    if (length < 0 || length > MAX_DATA || (how != NULL && strcmp(how, "response-body") != 0)) {
        return "BenchData takes 0 to 8388608, and response-body or nothing";
    }
    data = apr_palloc(cmd->pool, (apr_size_t)length + 1);
    memset(data, 'd', (size_t)length);
    data[length] = '\0';
    bench->data = length > 0 ? data : NULL;
    bench->length = (apr_size_t)length;
    bench->in_body = how != NULL;
    return NULL;
}

static const command_rec directives[] = {
    AP_INIT_FLAG("BenchAnswer", set_answer, NULL, ACCESS_CONF, "answer here"),
    AP_INIT_TAKE1("BenchTarget", set_target, NULL, ACCESS_CONF, "a target's name or path"),
    AP_INIT_TAKE12("BenchData", set_data, NULL, ACCESS_CONF, "bytes, and response-body"),
    { NULL, { NULL }, NULL, 0, RAW_ARGS, NULL }
};

static void write_all(request_rec *r, const char *data, apr_size_t length)
{
    while (length > 0) {
        apr_size_t n = length < PIECE ? length : PIECE;

        if (ap_rwrite(data, (int)n, r) < 0) {
            return;
        }
        data += n;
        length -= n;
    }
}

static int answer(request_rec *r)
{
    ap_set_content_length(r, sizeof(ANSWER_BODY) - 1);
    write_all(r, ANSWER_BODY, sizeof(ANSWER_BODY) - 1);
    return OK;
}

static int count(request_rec *r)
{
#ifdef CALLGRIND_DUMP_STATS
    CALLGRIND_DUMP_STATS;
    return answer(r);
#else
    (void)r;
    return HTTP_NOT_IMPLEMENTED;
#endif
}

static int handler(request_rec *r)
{
    const bench_config *bench;

    if (r->handler != NULL && strcmp(r->handler, "bench-count") == 0) {
        return count(r);
    }
    if (r->handler == NULL || strcmp(r->handler, "bench") != 0) {
        return DECLINED;
    }
    bench = ap_get_module_config(r->per_dir_config, &bench_module);
    ap_set_content_type(r, "text/plain");
    apr_table_setn(r->headers_out, "Cache-Control", "no-cache");
    if (bench->target == NULL) {
        return answer(r);
    }
    apr_table_setn(r->headers_out, "X-Socket-Handoff", bench->target);
    if (bench->in_body) {
        apr_table_setn(r->headers_out, "X-Handoff-Data-From", "response-body");
        write_all(r, bench->data, bench->length);
    }
    else if (bench->data != NULL) {
        apr_table_setn(r->headers_out, "X-Handoff-Data", bench->data);
    }
    return OK;
}

/* Otherwise what is compared with mod_proxy_fdpass would also have to search the file system. */
static int skip_files(request_rec *r)
{
    const bench_config *bench = ap_get_module_config(r->per_dir_config, &bench_module);

    return bench != NULL && bench->is_ours ? OK : DECLINED;
}

static void register_hooks(apr_pool_t *p)
{
    (void)p;
    ap_hook_map_to_storage(skip_files, NULL, NULL, APR_HOOK_FIRST);
    ap_hook_handler(handler, NULL, NULL, APR_HOOK_MIDDLE);
}

AP_DECLARE_MODULE(bench) = {
    STANDARD20_MODULE_STUFF, create_config, merge_config, NULL, NULL, directives, register_hooks,
#if defined(AP_MODULE_FLAG_NONE)
    AP_MODULE_FLAG_NONE
#endif
};
