/* SPDX-License-Identifier: Apache-2.0 */
/* The network configuration on standard input: the keys of CNI and of sluice-cni. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "failure.h"

#define DEFAULT_SOCKET "/run/sluice/cni.sock"
#define DEFAULT_SECONDS 15
#define MAX_CONFIG (1024 * 1024) /* bytes */

/* `root` owns the rest. `version` is a supported one; until it is read, the newest. */
struct config {
    json_t *root;
    json_t *prev_result; /* an object or NULL */
    const char *version;
    char socket[108]; /* sun_path with its NUL; empty if the key is invalid */
    int64_t timeout_ms;
};

/* Reads standard input to its end, by `deadline`. Fails with CNI_IO, CNI_UNDECODABLE or, for more than
 * MAX_CONFIG bytes, CNI_BAD_CONFIG. Also sets `version`, so that an error can be printed in that version. */
int config_read(struct config *config, int64_t deadline, struct failure *failure);

/* Checks the known keys; others are allowed, because runtimes add some. Socket and timeout are read first and
 * are usable (or empty) even if a later key is invalid. Fails with CNI_BAD_CONFIG, which names the key, or with
 * CNI_INCOMPATIBLE. */
int config_check(struct config *config, struct failure *failure);

/* Returns true if the configured version is at least `version`. */
bool config_at_least(const struct config *config, const char *version);

/* Returns true if excludeNamespaces contains `namespace`. */
bool config_excludes(const struct config *config, const char *namespace);

/* Returns true if exemptPods matches this pod: "namespace/name", where a trailing "*" matches any rest. */
bool config_exempts(const struct config *config, const char *namespace, const char *name);

/* Returns a new array of the supported versions, oldest first. */
json_t *supported_versions(void);
