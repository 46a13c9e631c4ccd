/* SPDX-License-Identifier: Apache-2.0 */
/* The request to the agent, and its reply. */
#pragma once

#include <stdint.h>

#include "call.h"
#include "config.h"
#include "wire.h"

enum answer { ANSWER_YES, ANSWER_NO, ANSWER_NONE };

/* Sends `call` to the agent; `netns` is a descriptor to pass, or negative. ANSWER_NO: the agent refused, and
 * `failure` holds its error. ANSWER_NONE: no reply, or an invalid one; `why` says what failed. */
enum answer agent_answer(const struct call *call, const struct config *config, int netns, int64_t deadline,
                         struct failure *failure, char why[MAX_WHY]);
