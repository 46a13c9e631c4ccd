/* SPDX-License-Identifier: Apache-2.0 */
/* An error in the terms of CNI. */
#pragma once

#include <jansson.h>

/* Error codes of the CNI specification 1.1.0. */
enum {
    CNI_INCOMPATIBLE = 1,
    CNI_BAD_ENVIRONMENT = 4,
    CNI_IO = 5,
    CNI_UNDECODABLE = 6,
    CNI_BAD_CONFIG = 7,
    CNI_TRY_AGAIN = 11,
    CNI_UNAVAILABLE = 50,
};

/* Texts are JSON strings, because those of the agent may be long; NULL means none. */
struct failure {
    int code;
    json_t *msg, *details;
};

/* Fills `failure` and returns -1; so a check can end with `return fail(...)`. */
int fail(struct failure *failure, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
