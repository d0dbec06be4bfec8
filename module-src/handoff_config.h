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

/* Per server and virtual host; always merged, so every field has its effective value. */
typedef struct {
    apr_array_header_t *prefixes;   /* of const char *, canonical forms (handoff_target.h)        */
    int connect_timeout_ms;
    int send_timeout_ms;
    int max_retries;
    unsigned int prefixes_set : 1;
    unsigned int connect_timeout_set : 1;
    unsigned int send_timeout_set : 1;
    unsigned int max_retries_set : 1;
} handoff_server_config;

/* Per directory or location. */
typedef struct {
    int enabled;
    unsigned int enabled_set : 1;
} handoff_dir_config;

extern module AP_MODULE_DECLARE_DATA socket_handoff_module;
extern const command_rec handoff_directives[];

void *handoff_create_server_config(apr_pool_t *p, server_rec *s);
void *handoff_merge_server_config(apr_pool_t *p, void *base, void *add);
void *handoff_create_dir_config(apr_pool_t *p, char *dir);
void *handoff_merge_dir_config(apr_pool_t *p, void *base, void *add);

const handoff_server_config *handoff_server_config_of(const server_rec *s);
const handoff_dir_config *handoff_dir_config_of(const request_rec *r);

/* What this server permits, as a view on its configuration. */
handoff_target_policy handoff_policy_of(const handoff_server_config *config);

#endif
