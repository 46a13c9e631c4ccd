/* The network configuration on standard input: CNI's keys and ours. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "failure.h"

#define DEFAULT_SOCKET "/run/sluice/cni.sock"
#define DEFAULT_SECONDS 15
#define MAX_CONFIG (1024 * 1024) /* bytes */

/* `root` owns the rest. `version` is one that we support, the newest before that is known. */
struct config {
    json_t *root;
    json_t *prev_result; /* an object, or NULL */
    const char *version;
    char socket[108]; /* sun_path with its NUL; empty when the key cannot be used */
    int64_t timeout_ms;
};

/* Reads standard input to its end, by `deadline`. Fails with CNI_IO, CNI_UNDECODABLE or, when it is larger
 * than MAX_CONFIG, CNI_BAD_CONFIG. Takes over `version` already, so that an error can be told in it. */
int config_read(struct config *config, int64_t deadline, struct failure *failure);

/* Checks all keys that we know; others are allowed, as runtimes inject some. Socket and timeout come first
 * and are usable (or empty) also when a later key is bad. Fails with CNI_BAD_CONFIG, naming the key, or
 * CNI_INCOMPATIBLE. */
int config_check(struct config *config, struct failure *failure);

/* Whether the configured version is at least `version`. */
bool config_at_least(const struct config *config, const char *version);

/* Whether `namespace` is one of excludeNamespaces. */
bool config_excludes(const struct config *config, const char *namespace);

/* Whether exemptPods has this pod: "namespace/name", where "*" at the end stands for any rest of the name. */
bool config_exempts(const struct config *config, const char *namespace, const char *name);

/* A new array of the versions we support, oldest first. */
json_t *supported_versions(void);
