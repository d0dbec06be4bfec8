/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef FUZZ_H
#define FUZZ_H

/* What the fuzz targets share: an input that is taken apart, and a promise that must hold for every
 * input. Each piece is an allocation of its own size, so that ASan sees a read beyond it. */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROMISE(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: broken promise: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct {
    const uint8_t *data;
    size_t size;
} fuzz_input;

static inline unsigned int take_byte(fuzz_input *in)
{
    if (in->size == 0) {
        return 0;
    }
    in->size--;
    return *in->data++;
}

/* The next so many bytes and a NUL; the caller frees them. */
static inline char *take_bytes(fuzz_input *in, size_t length)
{
    char *copy;

    if (length > in->size) {
        length = in->size;
    }
    copy = malloc(length + 1);
    PROMISE(copy != NULL);
    if (length > 0) {
        memcpy(copy, in->data, length);
    }
    copy[length] = '\0';
    in->data += length;
    in->size -= length;
    return copy;
}

/* The next line, without its end. */
static inline char *take_line(fuzz_input *in)
{
    const uint8_t *end = in->size > 0 ? memchr(in->data, '\n', in->size) : NULL;
    char *line = take_bytes(in, end != NULL ? (size_t)(end - in->data) : in->size);

    if (end != NULL) {
        in->data++;
        in->size--;
    }
    return line;
}

/* Whether a pointer points into a string, its end included. */
static inline int is_within(const char *pointer, const char *text)
{
    return pointer >= text && pointer <= text + strlen(text);
}

#endif
