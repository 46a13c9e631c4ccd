/* SPDX-License-Identifier: Apache-2.0 */
/* sluice-cni: forwards the CNI request of the container runtime to the agent of the node and prints the reply.
 *
 * Two rules decide every branch: no pod of an enrolled namespace starts uncaptured, and no error in the plugin
 * prevents the removal of a pod. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "deadline.h"
#include "output.h"

enum { DEL_MS = 5000 }; /* the reply to DEL changes nothing, so the runtime must not wait long for it */

#define ANNOTATIONS "io.kubernetes.cri.pod-annotations"

/* Returns true if the pod asks for capture by an annotation. The agent's file for its namespace then does not apply. */
static bool enrols_itself(const struct config *config)
{
    json_t *runtime = json_object_get(config->root, "runtimeConfig");
    json_t *mode = json_object_get(json_object_get(runtime, ANNOTATIONS), "istio.io/dataplane-mode");
    return mode && (!json_is_string(mode) || strcmp(json_string_value(mode), "none"));
}

/* Returns true if the agent marked this namespace as not enrolled (file exempt/NAMESPACE next to the socket). */
static bool is_exempt(const struct call *call, const struct config *config)
{
    char path[sizeof config->socket + sizeof "/exempt/" + sizeof call->namespace];
    int directory = (int)(strrchr(config->socket, '/') - config->socket);
    struct stat status;
    if (!*call->namespace || enrols_itself(config))
        return false;
    snprintf(path, sizeof path, "%.*s/exempt/%s", directory, config->socket, call->namespace);
    return stat(path, &status) == 0 && S_ISREG(status.st_mode);
}

static int unreachable(const struct call *call, const char *why, struct failure *failure)
{
    failure->details = json_string("is the Sluice agent running on this node? See its log and `sluice status`. "
                                   "The runtime will retry.");
    if (call->verb == VERB_STATUS)
        return fail(failure, CNI_UNAVAILABLE, "%s", why);
    if (call->verb == VERB_GC)
        return fail(failure, CNI_TRY_AGAIN, "%s", why);
    return fail(failure, CNI_TRY_AGAIN, "pod %s: %s", call->pod, why);
}

static int open_netns(const char *path)
{
    return open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* non-blocking: the path may name a FIFO */
}

static void forget(struct call *call, struct config *config, int64_t start, struct failure *ignored)
{
    char why[MAX_WHY];
    config_check(config, ignored); /* ignore bad keys: they were good when the pod was added */
    if (!*config->socket || call_read(call, ignored))
        return;
    int64_t wait = config->timeout_ms < DEL_MS ? config->timeout_ms : DEL_MS;
    agent_answer(call, config, *call->netns ? open_netns(call->netns) : -1, start + wait, ignored, why);
}

/* ADD and CHECK. */
static int capture(const struct call *call, const struct config *config, int64_t deadline,
                   struct failure *failure)
{
    char why[MAX_WHY];
    if (!config->prev_result)
        return fail(failure, CNI_BAD_CONFIG, "prevResult: missing; chain sluice-cni after a primary plugin");
    /* This wins over the pod's annotations: the agent would not capture the pod either. */
    if (config_excludes(config, call->namespace) || config_exempts(config, call->namespace, call->name))
        return 0;
    int netns = open_netns(call->netns);
    if (netns < 0)
        return fail(failure, CNI_BAD_ENVIRONMENT, "CNI_NETNS: open %s: %s", call->netns, strerror(errno));
    switch (agent_answer(call, config, netns, deadline, failure, why)) {
    case ANSWER_YES:
        return 0;
    case ANSWER_NO:
        return -1;
    default:
        return is_exempt(call, config) ? 0 : unreachable(call, why, failure);
    }
}

/* STATUS and GC. */
static int ask(const struct call *call, const struct config *config, int64_t deadline,
               struct failure *failure)
{
    char why[MAX_WHY];
    enum answer answer = agent_answer(call, config, -1, deadline, failure, why);
    return answer == ANSWER_YES ? 0 : answer == ANSWER_NO ? -1 : unreachable(call, why, failure);
}

static int carry_out(struct call *call, struct config *config, int64_t start, struct failure *failure)
{
    static const char *const SINCE[] = {
        [VERB_ADD] = "0.3.0", [VERB_CHECK] = "0.4.0", [VERB_STATUS] = "1.1.0", [VERB_GC] = "1.1.0"};
    if (config_check(config, failure) || call_read(call, failure))
        return -1;
    if (!config_at_least(config, SINCE[call->verb]))
        return fail(failure, CNI_INCOMPATIBLE, "cniVersion: %s does not support %s; use %s or later", config->version,
                    verb_name(call->verb), SINCE[call->verb]);
    int64_t deadline = start + config->timeout_ms;
    if (call->verb == VERB_ADD || call->verb == VERB_CHECK)
        return capture(call, config, deadline, failure);
    return ask(call, config, deadline, failure);
}

/* Returns the exit code. */
static int answer(struct call *call, struct config *config, struct failure *failure)
{
    int64_t start = now_ms();
    if (call_verb(call, failure)) {
        struct failure second = {0}; /* read the configuration anyway: it says in which version to print the error */
        config_read(config, start + DEFAULT_SECONDS * 1000, &second);
        json_decref(second.msg);
        return print_failure(config, failure);
    }
    int64_t wait = call->verb == VERB_DEL ? DEL_MS : DEFAULT_SECONDS * 1000;
    int unreadable = config_read(config, start + wait, failure);
    if (call->verb == VERB_VERSION)
        return print_versions(config); /* in the newest version, if the input names no supported one */
    if (call->verb == VERB_DEL) {
        if (!unreadable)
            forget(call, config, start, failure);
        return 0;
    }
    if (unreadable || carry_out(call, config, start, failure))
        return print_failure(config, failure);
    return call->verb == VERB_ADD ? print_result(config) : 0;
}

int main(void)
{
    struct call call = {0};
    struct config config = {0};
    struct failure failure = {0};
    signal(SIGPIPE, SIG_IGN); /* write() reports a runtime that has exited */
    int code = answer(&call, &config, &failure);
    json_decref(failure.msg);
    json_decref(failure.details);
    json_decref(config.root);
    return code;
}
