/* SPDX-License-Identifier: Apache-2.0 */
/* The protocol with the agent: over a unix stream socket, one frame in each direction. A frame is a length of
 * 4 bytes (big-endian) and JSON. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define MAX_REQUEST (1024 * 1024 + 64 * 1024) /* bytes of JSON; the agent has the same numbers */
#define MAX_REPLY (64 * 1024)
#define MAX_WHY 256

struct frame {
    size_t size; /* of header and payload */
    unsigned char bytes[4 + MAX_REQUEST];
};

/* Writes the header of a frame; the payload of `size` bytes is already in place. */
void frame_close(struct frame *frame, size_t size);

/* Sends `request`, with the descriptor `netns` (if not negative) attached to the first byte, and reads the reply
 * into `reply` (MAX_REPLY bytes). Returns the size of the reply; on failure -1, and `why` (MAX_WHY bytes) holds
 * the operation and the kernel's error text. */
ptrdiff_t agent_ask(const char *path, const struct frame *request, int netns, int64_t deadline, char *reply,
                    char *why);
