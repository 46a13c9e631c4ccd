/* SPDX-License-Identifier: Apache-2.0 */
#include "agent.h"

#include <limits.h>
#include <stdio.h>

/* Returns -1 if the request is larger than the agent accepts. */
static int write_request(struct frame *frame, const struct call *call, const struct config *config)
{
    json_t *request = json_pack("{s:s, s:s, s:s, s:s, s:s, s:O}",
                                "verb", verb_name(call->verb), "container_id", call->container_id,
                                "ifname", call->ifname, "netns", call->netns,
                                "args", call->args, "config", config->root);
    size_t size = json_dumpb(request, (char *)frame->bytes + 4, MAX_REQUEST, JSON_COMPACT);
    json_decref(request);
    if (size == 0 || size > MAX_REQUEST)
        return -1;
    frame_close(frame, size);
    return 0;
}

/* Returns true for an absent value (NULL) and for a string. */
static int is_text(const json_t *value)
{
    return !value || json_is_string(value);
}

static enum answer read_reply(const json_t *reply, struct failure *failure)
{
    const json_t *code = json_object_get(reply, "code");
    json_t *msg = json_object_get(reply, "msg"), *details = json_object_get(reply, "details");
    json_int_t number = json_integer_value(code);
    if (!json_is_integer(code) || number < 0 || number > INT_MAX || !is_text(msg) || !is_text(details))
        return ANSWER_NONE;
    if (number == 0)
        return ANSWER_YES;
    failure->code = (int)number;
    failure->msg = json_incref(msg);
    failure->details = json_incref(details);
    return ANSWER_NO;
}

enum answer agent_answer(const struct call *call, const struct config *config, int netns, int64_t deadline,
                         struct failure *failure, char why[MAX_WHY])
{
    static struct frame request; /* static: untouched pages use no memory */
    static char bytes[MAX_REPLY];
    if (write_request(&request, call, config)) {
        snprintf(why, MAX_WHY, "send to %s: the request is larger than %d bytes", config->socket,
                 MAX_REQUEST);
        return ANSWER_NONE;
    }
    ptrdiff_t size = agent_ask(config->socket, &request, netns, deadline, bytes, why);
    if (size < 0)
        return ANSWER_NONE;
    json_t *reply = json_loadb(bytes, (size_t)size, JSON_ALLOW_NUL, NULL);
    enum answer answer = read_reply(reply, failure);
    json_decref(reply);
    if (answer == ANSWER_NONE)
        snprintf(why, MAX_WHY, "receive from %s: invalid reply from the agent", config->socket);
    return answer;
}
