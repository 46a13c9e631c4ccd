/* What we ask the agent, and what its answer means. */
#pragma once

#include <stdint.h>

#include "call.h"
#include "config.h"
#include "wire.h"

enum answer { ANSWER_YES, ANSWER_NO, ANSWER_NONE };

/* Asks the agent about `call`; `netns` is a descriptor to pass, or negative. ANSWER_NO: the agent refused and
 * `failure` holds its words. ANSWER_NONE: nobody answered, or not in the protocol; `why` says what failed. */
enum answer agent_answer(const struct call *call, const struct config *config, int netns, int64_t deadline,
                         struct failure *failure, char why[MAX_WHY]);
