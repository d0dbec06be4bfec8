/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_detach.h"

#include "apr_portable.h"
#include "http_core.h"

#include "handoff_config.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

/* Of the client's family if that can be had, so that TCP options set on it later still apply. */
static int make_dead_socket(void)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (fd < 0 && errno == EAFNOSUPPORT) {
        fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    }
    return fd;
}

apr_status_t handoff_detach_prepare(handoff_detach *detach, conn_rec *c)
{
    apr_socket_t *sock = ap_get_conn_socket(c);
    apr_os_sock_t fd = -1;
    apr_status_t rv;

    if (sock == NULL) {
        return APR_ENOTSOCK;
    }
    rv = apr_os_sock_get(&fd, sock);
    if (rv != APR_SUCCESS) {
        return rv;
    }
    if (fd < 0) {
        return APR_ENOTSOCK;
    }
    detach->c = c;
    detach->client_fd = fd;
    detach->dead_fd = make_dead_socket();
    return detach->dead_fd < 0 ? APR_FROM_OS_ERROR(errno) : APR_SUCCESS;
}

/* apr_os_sock_put into an apr_socket_t that is there already changes its number and nothing else that
 * matters: APR asks for the addresses again when somebody wants them. */
static void show_number(const handoff_detach *detach, int fd)
{
    apr_socket_t *sock = ap_get_conn_socket(detach->c);
    apr_os_sock_t number = fd;

    apr_os_sock_put(&sock, &number, detach->c->pool);
}

/* Reading from an unconnected TCP socket fails (ENOTCONN) and reads nothing. */
void handoff_detach_hide(const handoff_detach *detach)
{
    show_number(detach, detach->dead_fd);
}

void handoff_detach_show(const handoff_detach *detach)
{
    show_number(detach, detach->client_fd);
}

apr_status_t handoff_detach_commit(handoff_detach *detach)
{
    apr_status_t rv = APR_SUCCESS;

    /* O_CLOEXEC, because dup2 would clear it and CGI children would inherit the number. EBUSY is
     * what Linux says while another thread is in the middle of opening that very number. */
    while (dup3(detach->dead_fd, detach->client_fd, O_CLOEXEC) < 0) {
        if (errno != EINTR && errno != EBUSY) {
            /* Never seen. The daemon owns the client now, so keep httpd from writing to it by the
             * one switch that all its filters obey. */
            rv = APR_FROM_OS_ERROR(errno);
            detach->c->aborted = 1;
            break;
        }
    }
    close(detach->dead_fd);
    detach->dead_fd = -1;
    ap_set_module_config(detach->c->conn_config, &socket_handoff_module, detach->c);

    /* Also keeps httpd from discarding a request body or looking for a pipelined request. */
    detach->c->keepalive = AP_CONN_CLOSE;
    return rv;
}

int handoff_is_detached(conn_rec *c)
{
    return ap_get_module_config(c->conn_config, &socket_handoff_module) != NULL;
}

void handoff_detach_abandon(handoff_detach *detach)
{
    close(detach->dead_fd);
    detach->dead_fd = -1;
}
