/* SPDX-License-Identifier: Apache-2.0 */
#include "call.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "words.h"

static const char *const NAMES[] = {
    [VERB_ADD] = "ADD",       [VERB_DEL] = "DEL", [VERB_CHECK] = "CHECK",
    [VERB_STATUS] = "STATUS", [VERB_GC] = "GC",   [VERB_VERSION] = "VERSION",
};

static const char *variable(const char *name)
{
    const char *value = getenv(name);
    return value ? value : "";
}

const char *verb_name(enum verb verb)
{
    return NAMES[verb];
}

int call_verb(struct call *call, struct failure *failure)
{
    const char *word = variable("CNI_COMMAND");
    call->container_id = call->netns = call->ifname = call->args = "";
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        if (!strcmp(word, NAMES[i])) {
            call->verb = (enum verb)i;
            return 0;
        }
    }
    return fail(failure, CNI_BAD_ENVIRONMENT,
                "CNI_COMMAND: %s; must be ADD, DEL, CHECK, STATUS, GC or VERSION",
                *word ? "unknown verb" : "not set");
}

/* Returns the value of `key` in "K=V;K=V" (in any order); the last one if it occurs twice, as in the agent. */
static const char *argument(const char *args, const char *key, size_t *length)
{
    const char *found = NULL;
    size_t key_length = strlen(key);
    while (*args) {
        size_t pair = strcspn(args, ";");
        if (pair > key_length && args[key_length] == '=' && !strncmp(args, key, key_length)) {
            found = args + key_length + 1;
            *length = pair - key_length - 1;
        }
        args += pair + (args[pair] == ';');
    }
    return found;
}

/* Never fails: outside Kubernetes the keys are absent, and the agent validates them anyway. */
static void name_pod(struct call *call)
{
    size_t length = 0, name_length = 0;
    const char *namespace = argument(call->args, "K8S_POD_NAMESPACE", &length);
    const char *name = argument(call->args, "K8S_POD_NAME", &name_length);
    call->namespace[0] = call->name[0] = '\0';
    if (namespace && is_dns_label(namespace, length))
        snprintf(call->namespace, sizeof call->namespace, "%.*s", (int)length, namespace);
    if (*call->namespace && name && is_pod_name(name, name_length))
        snprintf(call->name, sizeof call->name, "%.*s", (int)name_length, name);
    if (*call->namespace && name && name_length <= 253)
        snprintf(call->pod, sizeof call->pod, "%s/%.*s", call->namespace, (int)name_length, name);
    else
        snprintf(call->pod, sizeof call->pod, "of container %s", call->container_id);
}

static int check(const char *name, const char *value, bool good, struct failure *failure)
{
    if (!*value)
        return fail(failure, CNI_BAD_ENVIRONMENT, "%s: not set", name);
    return good ? 0 : fail(failure, CNI_BAD_ENVIRONMENT, "%s: invalid value", name);
}

/* Clears invalid values: the agent finds the pod to remove by its container id. */
static void drop_bad(struct call *call)
{
    if (!is_interface_name(call->ifname))
        call->ifname = "";
    if (call->netns[0] != '/' || !is_utf8(call->netns))
        call->netns = "";
    if (!is_utf8(call->args))
        call->args = "";
}

int call_read(struct call *call, struct failure *failure)
{
    if (call->verb != VERB_ADD && call->verb != VERB_CHECK && call->verb != VERB_DEL)
        return 0;
    call->container_id = variable("CNI_CONTAINERID");
    call->ifname = variable("CNI_IFNAME");
    call->netns = variable("CNI_NETNS");
    call->args = variable("CNI_ARGS");
    if (call->verb == VERB_DEL)
        drop_bad(call); /* the second DEL of a pod has no network namespace anyway */
    if (check("CNI_CONTAINERID", call->container_id, is_identifier(call->container_id, 256), failure))
        return -1;
    if (call->verb != VERB_DEL &&
        (check("CNI_IFNAME", call->ifname, is_interface_name(call->ifname), failure) ||
         check("CNI_NETNS", call->netns, call->netns[0] == '/' && is_utf8(call->netns), failure)))
        return -1;
    if (*call->args && check("CNI_ARGS", call->args, is_utf8(call->args), failure))
        return -1;
    name_pod(call);
    return 0;
}
