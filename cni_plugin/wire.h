/* The wire to the agent: a unix stream, each way one frame of 4 bytes length (big-endian) and JSON. */
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

/* Puts the header before a payload of `size` bytes that is already in place. */
void frame_close(struct frame *frame, size_t size);

/* Sends `request`, with `netns` (if not negative) riding on its first byte, and reads the answer into `reply`
 * (MAX_REPLY bytes). Returns the answer's size; or -1, and then `why` (MAX_WHY bytes) holds the operation and
 * the kernel's words. */
ptrdiff_t agent_ask(const char *path, const struct frame *request, int netns, int64_t deadline, char *reply,
                    char *why);
