/* SPDX-License-Identifier: Apache-2.0 */
#include "config.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "deadline.h"
#include "words.h"

static const char *const VERSIONS[] = {"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}; /* oldest first */
enum { VERSION_COUNT = sizeof VERSIONS / sizeof *VERSIONS };

static int version_index(const char *version)
{
    for (int i = 0; i < VERSION_COUNT; i++)
        if (!strcmp(version, VERSIONS[i]))
            return i;
    return -1;
}

/* Returns the text of a JSON string; NULL for other values and for a string that contains NUL. */
static const char *text(const json_t *value)
{
    const char *word = json_string_value(value);
    return word && strlen(word) == json_string_length(value) ? word : NULL;
}

/* Reads standard input to its end. Returns its size, or -1. */
static ssize_t read_input(char *buffer, size_t size, int64_t deadline, struct failure *failure)
{
    size_t have = 0;
    for (;;) {
        struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
        int ready = poll(&input, 1, left_ms(deadline));
        if (ready == 0)
            return fail(failure, CNI_IO, "read network configuration: timed out before the end of standard input");
        ssize_t count = ready < 0 ? -1 : read(STDIN_FILENO, buffer + have, size - have);
        if (count < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (count < 0)
            return fail(failure, CNI_IO, "read network configuration: %s", strerror(errno));
        have += (size_t)count;
        if (have == size)
            return fail(failure, CNI_BAD_CONFIG, "network configuration: larger than %d bytes", MAX_CONFIG);
        if (count == 0)
            return (ssize_t)have;
    }
}

int config_read(struct config *config, int64_t deadline, struct failure *failure)
{
    static char buffer[MAX_CONFIG + 1]; /* one byte more than allowed, to detect a configuration that is too large */
    config->version = VERSIONS[VERSION_COUNT - 1];
    ssize_t size = read_input(buffer, sizeof buffer, deadline, failure);
    if (size < 0)
        return -1;
    json_error_t error;
    /* An annotation may contain NUL; the keys of sluice-cni reject it one by one. */
    config->root = json_loadb(buffer, (size_t)size, JSON_ALLOW_NUL, &error);
    if (!json_is_object(config->root))
        return fail(failure, CNI_UNDECODABLE, "network configuration: %s",
                    config->root ? "not a JSON object" : error.text);
    const char *version = text(json_object_get(config->root, "cniVersion"));
    if (version && version_index(version) >= 0)
        config->version = VERSIONS[version_index(version)];
    return 0;
}

static int check_socket(struct config *config, struct failure *failure)
{
    json_t *value = json_object_get(config->root, "socket");
    const char *path = value ? text(value) : DEFAULT_SOCKET;
    config->socket[0] = '\0';
    if (!path || path[0] != '/' || strlen(path) >= sizeof config->socket)
        return fail(failure, CNI_BAD_CONFIG, "socket: not an absolute path of less than %zu bytes",
                    sizeof config->socket);
    memcpy(config->socket, path, strlen(path) + 1);
    return 0;
}

static int check_timeout(struct config *config, struct failure *failure)
{
    json_t *value = json_object_get(config->root, "timeoutSeconds");
    double seconds = value ? json_number_value(value) : DEFAULT_SECONDS; /* 0 if not a number */
    config->timeout_ms = DEFAULT_SECONDS * 1000;
    if (!(seconds >= 1 && seconds <= 120))
        return fail(failure, CNI_BAD_CONFIG, "timeoutSeconds: not a number from 1 to 120");
    config->timeout_ms = (int64_t)(seconds * 1000);
    return 0;
}

static int check_namespaces(const struct config *config, struct failure *failure)
{
    json_t *list = json_object_get(config->root, "excludeNamespaces"), *item;
    size_t i;
    if (list && !json_is_array(list))
        return fail(failure, CNI_BAD_CONFIG, "excludeNamespaces: not a list");
    json_array_foreach(list, i, item) {
        const char *word = text(item);
        if (!word || !is_dns_label(word, strlen(word)))
            return fail(failure, CNI_BAD_CONFIG, "excludeNamespaces[%zu]: not a valid namespace name", i);
    }
    return 0;
}

/* Returns the pod's name in "namespace/name" without a trailing "*"; NULL if one of the two is not a name. */
static const char *pod_name(const char *word, size_t *length, bool *open)
{
    const char *slash = word ? strchr(word, '/') : NULL;
    if (!slash || !is_dns_label(word, (size_t)(slash - word)))
        return NULL;
    *length = strlen(slash + 1);
    *open = *length && slash[*length] == '*';
    *length -= *open;
    return is_pod_name(slash + 1, *length) ? slash + 1 : NULL;
}

static int check_pods(const struct config *config, struct failure *failure)
{
    json_t *list = json_object_get(config->root, "exemptPods"), *item;
    size_t i, length;
    bool open;
    if (list && !json_is_array(list))
        return fail(failure, CNI_BAD_CONFIG, "exemptPods: not a list");
    json_array_foreach(list, i, item)
        if (!pod_name(text(item), &length, &open))
            return fail(failure, CNI_BAD_CONFIG,
                        "exemptPods[%zu]: not NAMESPACE/NAME, where NAME may end with *", i);
    return 0;
}

static int check_version(const struct config *config, struct failure *failure)
{
    json_t *value = json_object_get(config->root, "cniVersion");
    const char *version = value ? text(value) : "0.1.0"; /* the version of a configuration without this key */
    if (!version)
        return fail(failure, CNI_BAD_CONFIG, "cniVersion: not a string");
    if (version_index(version) < 0)
        return fail(failure, CNI_INCOMPATIBLE, "cniVersion: %s is not supported; use one from %s to %s",
                    version, VERSIONS[0], VERSIONS[VERSION_COUNT - 1]);
    return 0;
}

static int check_name(const struct config *config, struct failure *failure)
{
    const char *name = text(json_object_get(config->root, "name"));
    json_t *type = json_object_get(config->root, "type");
    if (!name || !is_identifier(name, 4096))
        return fail(failure, CNI_BAD_CONFIG, "name: not a valid network name");
    if (type && !text(type))
        return fail(failure, CNI_BAD_CONFIG, "type: not a string");
    return 0;
}

static int check_objects(struct config *config, struct failure *failure)
{
    static const char *const KEYS[] = {"prevResult", "runtimeConfig", "capabilities"};
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++) {
        json_t *value = json_object_get(config->root, KEYS[i]);
        if (value && !json_is_object(value))
            return fail(failure, CNI_BAD_CONFIG, "%s: not an object", KEYS[i]);
    }
    config->prev_result = json_object_get(config->root, "prevResult");
    return 0;
}

int config_check(struct config *config, struct failure *failure)
{
    int bad = check_socket(config, failure) | check_timeout(config, failure);
    if (bad || check_version(config, failure) || check_name(config, failure))
        return -1;
    if (check_objects(config, failure) || check_namespaces(config, failure))
        return -1;
    return check_pods(config, failure);
}

bool config_at_least(const struct config *config, const char *version)
{
    return version_index(config->version) >= version_index(version);
}

bool config_excludes(const struct config *config, const char *namespace)
{
    json_t *list = json_object_get(config->root, "excludeNamespaces"), *item;
    size_t i;
    json_array_foreach(list, i, item)
        if (*namespace && !strcmp(json_string_value(item), namespace))
            return true;
    return false;
}

bool config_exempts(const struct config *config, const char *namespace, const char *name)
{
    json_t *list = json_object_get(config->root, "exemptPods"), *item;
    size_t i, length, space = strlen(namespace);
    bool open;
    json_array_foreach(list, i, item) {
        const char *word = json_string_value(item), *wanted = pod_name(word, &length, &open);
        bool here = *namespace && !strncmp(word, namespace, space) && word[space] == '/';
        if (here && *name && !strncmp(name, wanted, length) && (open || !name[length]))
            return true;
    }
    return false;
}

json_t *supported_versions(void)
{
    json_t *list = json_array();
    for (int i = 0; i < VERSION_COUNT; i++)
        json_array_append_new(list, json_string(VERSIONS[i]));
    return list;
}
