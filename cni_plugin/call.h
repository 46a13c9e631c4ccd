/* SPDX-License-Identifier: Apache-2.0 */
/* The call of the runtime: the CNI_ variables of the environment. */
#pragma once

#include "failure.h"

enum verb { VERB_ADD, VERB_DEL, VERB_CHECK, VERB_STATUS, VERB_GC, VERB_VERSION };

/* Strings are never NULL; a string that the verb does not use is empty. `pod` is for messages. */
struct call {
    enum verb verb;
    const char *container_id, *netns, *ifname, *args;
    char namespace[64]; /* a DNS label, or empty if CNI_ARGS has no valid one */
    char name[254];     /* the pod's name in that namespace, or empty if CNI_ARGS has no valid one */
    char pod[400];      /* "namespace/name", or the container id outside Kubernetes */
};

/* Reads the verb. Fails with CNI_BAD_ENVIRONMENT. */
int call_verb(struct call *call, struct failure *failure);

/* Reads and checks the variables that the verb needs. DEL needs only the container id; its other strings may be
 * empty. Fails with CNI_BAD_ENVIRONMENT and names the variable. */
int call_read(struct call *call, struct failure *failure);

/* Returns the CNI name of the verb. */
const char *verb_name(enum verb verb);
