/* SPDX-License-Identifier: Apache-2.0 */
#include "output.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Prints `value` and releases it. */
static int print(json_t *value)
{
    char *text = json_dumps(value, JSON_COMPACT);
    size_t size = text ? strlen(text) : 0, done = 0;
    while (done < size) {
        ssize_t count = write(STDOUT_FILENO, text + done, size - done);
        if (count < 0 && errno != EINTR)
            break;
        done += count > 0 ? (size_t)count : 0;
    }
    free(text);
    json_decref(value);
    return size && done == size ? 0 : 1;
}

int print_result(const struct config *config)
{
    /* The result must have the version of the configuration. In a correct chain it already has. */
    json_object_set_new(config->prev_result, "cniVersion", json_string(config->version));
    return print(json_incref(config->prev_result));
}

int print_versions(const struct config *config)
{
    return print(json_pack("{s:s, s:o}", "cniVersion", config->version, "supportedVersions",
                           supported_versions()));
}

int print_failure(const struct config *config, const struct failure *failure)
{
    json_t *object = json_pack("{s:s, s:i}", "cniVersion", config->version, "code", failure->code);
    json_t *msg = failure->msg ? json_incref(failure->msg) : json_string("unknown error");
    json_object_set_new(object, "msg", msg);
    json_object_set(object, "details", failure->details); /* adds no key for NULL */
    print(object);
    return 1;
}
