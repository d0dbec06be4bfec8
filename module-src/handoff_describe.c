/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_describe.h"

#include "apr_escape.h"
#include "apr_strings.h"
#include "http_core.h"
#include "http_log.h"
#include "http_protocol.h"
#include "util_filter.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "handoff_envelope.h"
#include "handoff_filter.h"
#include "handoff_payload.h"
#include "handoff_request.h"

APLOG_USE_MODULE(socket_handoff);

/* What an envelope takes beside its data, more often than not. */
#define ENVELOPE_GUESS 2048

/* More than any default lets through a socket as one message; the wire says what really fits. */
#define PLAIN_BODY_MAX ((apr_uint64_t)1024 * 1024)

/* --- what the client said ---------------------------------------------------------------------- */

/* What the client asked for is said by the first of a chain of internal redirects. */
static const request_rec *first_of(const request_rec *r)
{
    while (r->prev != NULL) {
        r = r->prev;
    }
    return r;
}

/* The other end of the TCP connection. Not c->client_addr: with the PROXY protocol mod_remoteip
 * puts there whom the load balancer speaks for. */
static void tell_peer(request_rec *r, handoff_envelope *envelope)
{
    apr_socket_t *socket = ap_get_conn_socket(r->connection);
    apr_sockaddr_t *address = NULL;
    char *ip = NULL;

    if (socket == NULL || apr_socket_addr_get(&address, APR_REMOTE, socket) != APR_SUCCESS
        || apr_sockaddr_ip_get(&ip, address) != APR_SUCCESS) {
        address = r->connection->client_addr;
        ip = r->connection->client_ip;
    }
    envelope->peer_addr = ip;
    envelope->peer_port = address->port;
}

/* One name for this request in both logs: mod_unique_id's where it is loaded. */
static const char *request_id(request_rec *r, handoff_wish *wish)
{
    if (wish->id == NULL) {
        wish->id = apr_table_get(r->subprocess_env, "UNIQUE_ID");
    }
    if (wish->id == NULL) {
        unsigned char bytes[16];

        if (getrandom(bytes, sizeof(bytes), GRND_NONBLOCK) != (ssize_t)sizeof(bytes)) {
            ap_random_insecure_bytes(bytes, sizeof(bytes));
        }
        wish->id = apr_pescape_hex(r->pool, bytes, sizeof(bytes), 0);
    }
    return wish->id;
}

static int collect_header(void *baton, const char *name, const char *value)
{
    handoff_header *header = apr_array_push(baton);

    header->name = name;
    header->value = value;
    return 1;
}

/* The request headers that the target asked for, in the order in which it did. */
static const apr_array_header_t *wanted_headers(request_rec *r,
                                                const handoff_declared_target *target)
{
    apr_array_header_t *found = apr_array_make(r->pool, target->headers->nelts + 1,
                                               sizeof(handoff_header));
    int i;

    for (i = 0; i < target->headers->nelts; i++) {
        apr_table_do(collect_header, found, r->headers_in,
                     APR_ARRAY_IDX(target->headers, i, const char *), NULL);
    }
    return found;
}

/* --- what the application said ------------------------------------------------------------------ */

/* Headers that say how the application's own response is transferred (RFC 9110 7.6.1), and those
 * that describe the body that was thrown away (RFC 9110 8). */
static int is_for_its_own_response(const char *name)
{
    static const char *const names[] = {
        "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
        "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade",
        "Accept-Ranges", "Content-Digest", "Content-Encoding", "Content-Language",
        "Content-Length", "Content-Location", "Content-MD5", "Content-Range", "Content-Type",
        "Digest", "ETag", "Last-Modified", "Repr-Digest",
        HANDOFF_HEADER_TARGET, HANDOFF_HEADER_DATA, HANDOFF_HEADER_DATA_FROM
    };
    size_t i;

    for (i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (!ap_cstr_casecmp(name, names[i])) {
            return 1;
        }
    }
    return 0;
}

typedef struct {
    request_rec *r;
    apr_array_header_t *headers;  /* of handoff_header                                            */
    const char *connection;       /* what the application's Connection header names, or NULL      */
} response_headers;

static int collect_response_header(void *baton, const char *name, const char *value)
{
    response_headers *to = baton;

    if (is_for_its_own_response(name)
        || (to->connection != NULL
            && ap_find_token(to->r->pool, to->connection, name))) {
        return 1;
    }
    if (name[0] == '\0' || *ap_scan_http_token(name) != '\0'
        || *ap_scan_http_field_content(value) != '\0') {
        /* httpd would answer 500 for its own response; the name is safe to log, a value is not. */
        ap_log_rerror(APLOG_MARK, APLOG_WARNING, 0, to->r, "the application's response header "
                      "\"%s\" is not passed on: its name or value holds bytes that no header may "
                      "hold; correct the application", name);
        return 1;
    }
    return collect_header(to->headers, name, value);
}

/* Some modules do their work on the headers in a filter that the thrown-away response never reaches.
 * That filter is run once, with nothing to pass and nobody behind it. */
static void run_filter(request_rec *r, const char *name)
{
    ap_filter_rec_t sink_rec;
    ap_filter_t sink;
    ap_filter_t copy;
    apr_bucket_brigade *nothing;
    const ap_filter_t *f;

    for (f = r->output_filters; f != NULL; f = f->next) {
        if (!ap_cstr_casecmp(f->frec->name, name)) {
            break;
        }
    }
    if (f == NULL) {
        return;
    }
    /* A copy of it: it takes itself out of the chain when it is done, and is needed there still
     * where the handoff fails. */
    copy = *f;
    memset(&sink_rec, 0, sizeof(sink_rec));
    memset(&sink, 0, sizeof(sink));
    sink_rec.name = "socket_handoff_sink";
    sink_rec.filter_func.out_func = handoff_swallow;
    sink.frec = &sink_rec;
    sink.r = r;
    sink.c = r->connection;
    copy.next = &sink;
    nothing = apr_brigade_create(r->pool, r->connection->bucket_alloc);
    ap_pass_brigade(&copy, nothing);
    apr_brigade_destroy(nothing);
}

/* mod_session takes the new session out of a header of the application's (SessionHeader), which nobody
 * else must see, and makes a cookie of it or keeps it. */
void handoff_save_session(request_rec *r)
{
    run_filter(r, "mod_session_out");
}

/* What all the Connection headers of the application name, or NULL. */
static const char *all_connection_options(request_rec *r)
{
    const char *first = apr_table_getm(r->pool, r->err_headers_out, "Connection");
    const char *second = apr_table_getm(r->pool, r->headers_out, "Connection");

    if (first == NULL || second == NULL) {
        return first != NULL ? first : second;
    }
    return apr_pstrcat(r->pool, first, ",", second, NULL);
}

static const apr_array_header_t *application_headers(request_rec *r)
{
    apr_table_t *kept = r->headers_out;
    apr_table_t *err_kept = r->err_headers_out;
    const char *type_kept = r->content_type;
    response_headers to;

    /* On copies, so that an answer of our own is not given the operator's headers twice. */
    r->headers_out = apr_table_copy(r->pool, kept);
    r->err_headers_out = apr_table_copy(r->pool, err_kept);
    /* An operator's "Header set Access-Control-Allow-Origin" is meant for the stream too. */
    run_filter(r, "fixup_headers_out");

    to.r = r;
    to.headers = apr_array_make(r->pool, 8, sizeof(handoff_header));
    to.connection = all_connection_options(r);
    /* The order in which httpd writes them. */
    apr_table_do(collect_response_header, &to, r->err_headers_out, NULL);
    apr_table_do(collect_response_header, &to, r->headers_out, NULL);

    r->headers_out = kept;
    r->err_headers_out = err_kept;
    r->content_type = type_kept;
    return to.headers;
}

/* --- the data ------------------------------------------------------------------------------------ */

static int out_of_resources(request_rec *r, int error, handoff_result *result)
{
    ap_log_rerror(APLOG_MARK, APLOG_ERR, APR_FROM_OS_ERROR(error), r, "handoff failed: the data "
                  "could not be put into a memfd; raise Apache's LimitNOFILE or its memory");
    *result = HANDOFF_NO_RESOURCES;
    return HTTP_SERVICE_UNAVAILABLE;
}

/* Fetches a collected body back where it fits into a message. */
static int load_payload(request_rec *r, const handoff_wish *wish, const char **data,
                        handoff_result *result)
{
    char *bytes = apr_palloc(r->pool, (apr_size_t)wish->payload_length + 1);
    int error = handoff_payload_load(wish->payload_fd, bytes, (apr_size_t)wish->payload_length);

    if (error != 0) {
        return out_of_resources(r, error, result);
    }
    bytes[wish->payload_length] = '\0';
    *data = bytes;
    return 0;
}

/* --- the two messages ---------------------------------------------------------------------------- */

static int describe_plain(request_rec *r, const handoff_wish *wish, const handoff_detach *detach,
                          handoff_wire_message *message, handoff_result *result)
{
    const char *data = wish->data;
    apr_size_t length = wish->data_length;

    if (data == NULL && wish->payload_fd >= 0) {
        int status;

        if (wish->payload_length > PLAIN_BODY_MAX) {
            ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff to %s failed: the message is too "
                          "large: the application wrote %" APR_UINT64_T_FMT " bytes of data; let "
                          "the target say envelope=on", wish->asked, wish->payload_length);
            *result = HANDOFF_TOO_LARGE;
            return HTTP_INTERNAL_SERVER_ERROR;
        }
        status = load_payload(r, wish, &data, result);
        if (status != 0) {
            return status;
        }
        length = (apr_size_t)wish->payload_length;
    }
    handoff_wire_plain(message, data != NULL ? data : "", length, detach->client_fd);
    return 0;
}

/* Puts the data beside the envelope. */
static int place_outside(request_rec *r, handoff_wish *wish, handoff_envelope *envelope,
                         handoff_result *result)
{
    int error = 0;

    envelope->data = NULL;
    envelope->data_length = 0;
    if (wish->payload_fd < 0) {
        error = handoff_open_payload(r, wish);
        if (error == 0) {
            error = handoff_payload_append(wish->payload_fd, wish->data, wish->data_length);
            wish->payload_length = wish->data_length;
        }
    }
    if (error == 0) {
        error = handoff_payload_seal(wish->payload_fd);
    }
    if (error != 0) {
        return out_of_resources(r, error, result);
    }
    envelope->has_payload = 1;
    envelope->payload_length = wish->payload_length;
    return 0;
}

/* Decides where the data stands, in the envelope or beside it. */
static int place_data(request_rec *r, handoff_wish *wish, handoff_envelope *envelope,
                      handoff_result *result)
{
    envelope->data = wish->data;
    envelope->data_length = wish->data_length;
    if (envelope->data == NULL && wish->payload_fd < 0) {
        return 0;
    }
    if (envelope->data == NULL && wish->payload_length <= HANDOFF_INLINE_DATA_MAX) {
        int status = load_payload(r, wish, &envelope->data, result);

        if (status != 0) {
            return status;
        }
        envelope->data_length = (apr_size_t)wish->payload_length;
    }
    if (envelope->data != NULL && envelope->data_length <= HANDOFF_INLINE_DATA_MAX
        && handoff_is_utf8(envelope->data, envelope->data_length)) {
        return 0;
    }
    return place_outside(r, wish, envelope, result);
}

static int describe_envelope(request_rec *r, handoff_wish *wish,
                             const handoff_declared_target *target, const handoff_detach *detach,
                             handoff_wire_message *message, handoff_result *result)
{
    const request_rec *first = first_of(r);
    const apr_array_header_t *wanted = wanted_headers(r, target);
    const apr_array_header_t *said = application_headers(r);
    handoff_envelope envelope;
    apr_size_t room;
    apr_size_t size;
    char *bytes;
    int status;

    if (r->status < 100 || r->status > 999) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff to %s failed: the application set the "
                      "status %d, allowed are 100 to 999; correct the application", target->name,
                      r->status);
        *result = HANDOFF_APPLICATION_FAILED;
        return HTTP_INTERNAL_SERVER_ERROR;
    }
    memset(&envelope, 0, sizeof(envelope));
    envelope.id = request_id(r, wish);
    envelope.method = first->method;
    envelope.uri = first->unparsed_uri;
    envelope.protocol = r->proto_num >= HTTP_VERSION(1, 1) ? "HTTP/1.1" : "HTTP/1.0";
    envelope.host = r->hostname;
    envelope.client_addr = r->useragent_ip;
    envelope.client_port = r->useragent_addr->port;
    tell_peer(r, &envelope);
    envelope.scheme = ap_http_scheme(r);
    envelope.target = target->name;
    envelope.user = r->user;
    envelope.headers = (const handoff_header *)wanted->elts;
    envelope.header_count = (apr_size_t)wanted->nelts;
    envelope.response_headers = (const handoff_header *)said->elts;
    envelope.response_header_count = (apr_size_t)said->nelts;
    envelope.status = r->status;
    envelope.unread_body = handoff_unread_body(r);
    envelope.prefetched = handoff_prefetched(r, detach);
    status = place_data(r, wish, &envelope, result);
    if (status != 0) {
        return status;
    }
    /* Written once where a guess is enough, which it nearly always is. */
    room = envelope.data_length + ENVELOPE_GUESS;
    bytes = apr_palloc(r->pool, room);
    size = handoff_envelope_write(&envelope, bytes, room);
    if (envelope.data_length > 0 && size > HANDOFF_WIRE_ALWAYS_FITS
        && (size > HANDOFF_ENVELOPE_COMFORT || size > handoff_wire_limit())) {
        /* Control bytes are six in JSON: 64 KiB of them would fill more than a socket takes. And a
         * host may have sockets that take less than others do. */
        status = place_outside(r, wish, &envelope, result);
        if (status != 0) {
            return status;
        }
        size = handoff_envelope_write(&envelope, bytes, room);
    }

    ap_log_rerror(APLOG_MARK, APLOG_TRACE2, 0, r, "envelope %s: %d request and %d response headers, "
                  "%s, %" APR_INT64_T_FMT " bytes of a body to come, %" APR_SIZE_T_FMT " bytes read "
                  "ahead", envelope.id, wanted->nelts, said->nelts,
                  envelope.has_payload ? "data in a memfd" : envelope.data != NULL ? "data inside"
                                                                                   : "no data",
                  (apr_int64_t)envelope.unread_body, envelope.prefetched);

    if (size > room) {
        bytes = apr_palloc(r->pool, size);
        handoff_envelope_write(&envelope, bytes, size);
    }

    memset(message, 0, sizeof(*message));
    message->bytes = bytes;
    message->length = size;
    message->fds[message->fd_count++] = detach->client_fd;
    if (envelope.has_payload) {
        message->fds[message->fd_count++] = wish->payload_fd;
    }
    return 0;
}

int handoff_describe(request_rec *r, handoff_wish *wish, const handoff_declared_target *target,
                     const handoff_detach *detach, handoff_wire_message *message, handoff_result *result)
{
    int status;

    if (target == NULL || !target->envelope) {
        handoff_note(r, HANDOFF_NOTE_ID, NULL);
        return describe_plain(r, wish, detach, message, result);
    }
    status = describe_envelope(r, wish, target, detach, message, result);
    handoff_note(r, HANDOFF_NOTE_ID, wish->id);
    return status;
}
