/* SPDX-License-Identifier: Apache-2.0 */
/* One deadline bounds the whole call: the runtime does not start the pod before the plugin returns. */
#pragma once

#include <limits.h>
#include <stdint.h>
#include <time.h>

/* Returns milliseconds of the monotonic clock. */
static inline int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Returns the milliseconds until `deadline` for poll(2); 0 if it has passed, never negative. */
static inline int left_ms(int64_t deadline)
{
    int64_t left = deadline - now_ms();
    return left <= 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left;
}
