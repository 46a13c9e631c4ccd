/* How the runtime called us: the CNI_ variables of the environment. */
#pragma once

#include "failure.h"

enum verb { VERB_ADD, VERB_DEL, VERB_CHECK, VERB_STATUS, VERB_GC, VERB_VERSION };

/* Strings are never NULL; those that the verb does not use are empty. `pod` is for messages. */
struct call {
    enum verb verb;
    const char *container_id, *netns, *ifname, *args;
    char namespace[64]; /* a DNS label, or empty when CNI_ARGS names none that is one */
    char name[254];     /* the pod's name in that namespace, or empty when CNI_ARGS names none that is one */
    char pod[400];      /* "namespace/name", or the container id outside Kubernetes */
};

/* Finds the verb. Fails with CNI_BAD_ENVIRONMENT. */
int call_verb(struct call *call, struct failure *failure);

/* Reads and checks what the verb needs; for DEL that is the container id, and the rest may end up empty.
 * Fails with CNI_BAD_ENVIRONMENT, naming the variable. */
int call_read(struct call *call, struct failure *failure);

/* CNI's name of the verb. */
const char *verb_name(enum verb verb);
