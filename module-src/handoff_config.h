/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_CONFIG_H
#define HANDOFF_CONFIG_H

/*
 * The directives: parsed, checked and merged once at startup, read-only afterwards. All of it lives
 * in the configuration pool. docs/directives.md is the reference.
 */

#include "httpd.h"
#include "http_config.h"

#include "handoff_target.h"
#include "handoff_wire.h"

/* One SocketHandoffTarget. Read-only once the configuration is read. */
typedef struct handoff_declared_target handoff_declared_target;
struct handoff_declared_target {
    const char *name;
    const char *path;             /* as written, without "unix:"                                  */
    handoff_target socket;        /* the same, canonical                                          */
    handoff_transport transport;  /* transport=auto|seqpacket|stream                              */
    int envelope;                 /* envelope=on                                                  */
    int ack;                      /* ack=on                                                       */
    const char *user;             /* user=, NULL: anybody may listen                              */
    long long user_id;            /* its uid, -1                                                  */
    int timeout_ms;               /* timeout=, for finding, ACK and sending together; 0: what
                                   * SocketHandoffConnectTimeoutMs and …SendTimeoutMs say         */
    int retries;                  /* retries=, -1: what SocketHandoffMaxRetries says              */
    const apr_array_header_t *headers;  /* headers=A,B: of const char *, names of request headers
                                         * for the envelope; never NULL                           */
    const char *backup_name;      /* backup=, NULL                                                */
    const handoff_declared_target *backup;  /* the target of that name                            */
    int max_fails;                /* maxfails=, failures in a row until it is skipped; 0: never   */
    int retry_ms;                 /* retry=, for how long it is skipped then                      */
    int slot;                     /* its row in shared memory                                     */
};

/* Per server and virtual host; always merged, so every field has its effective value. */
typedef struct {
    apr_array_header_t *prefixes;   /* of const char *, canonical forms (handoff_target.h)        */
    const ap_directive_t *prefixes_line;  /* the line that they come from                         */
    int connect_timeout_ms;
    int send_timeout_ms;
    int max_retries;
    apr_off_t max_payload;          /* SocketHandoffMaxPayload, bytes of a response body as data  */
    unsigned int prefixes_set : 1;
    unsigned int connect_timeout_set : 1;
    unsigned int send_timeout_set : 1;
    unsigned int max_retries_set : 1;
    unsigned int max_payload_set : 1;
} handoff_server_config;

/* Per directory or location. */
typedef struct {
    int enabled;
    const apr_array_header_t *allowed;  /* of const char *, targets' names; NULL: none            */
    int all_allowed;              /* SocketHandoffAllow All                                       */
    unsigned int enabled_set : 1;
    unsigned int allowed_set : 1; /* both of the above                                            */
} handoff_dir_config;

extern module AP_MODULE_DECLARE_DATA socket_handoff_module;
extern const command_rec handoff_directives[];

/* Hooks: forgets the targets before the configuration is read, checks them together after. */
void handoff_config_register(void);

void *handoff_create_server_config(apr_pool_t *p, server_rec *s);
void *handoff_merge_server_config(apr_pool_t *p, void *base, void *add);
void *handoff_create_dir_config(apr_pool_t *p, char *dir);
void *handoff_merge_dir_config(apr_pool_t *p, void *base, void *add);

const handoff_server_config *handoff_server_config_of(const server_rec *s);
const handoff_dir_config *handoff_dir_config_of(const request_rec *r);

/* The declared targets, one list for the whole server and all its virtual hosts, in the order of
 * the configuration; never NULL. */
const apr_array_header_t *handoff_declared_targets(void);   /* of handoff_declared_target * */

/* The target that an application means by a name, or by the path of a declared target's socket in
 * either spelling; NULL. */
const handoff_declared_target *handoff_find_target(const char *name_or_path);

/* Whether SocketHandoffAllow of this directory names it. */
int handoff_may_use(const handoff_dir_config *config, const handoff_declared_target *target);

/* What this server permits, as a view on its configuration. */
handoff_target_policy handoff_policy_of(const handoff_server_config *config);

#endif
