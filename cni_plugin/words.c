/* SPDX-License-Identifier: Apache-2.0 */
#include "words.h"

#include <string.h>

#include <jansson.h>

/* Not <ctype.h>: it depends on the locale and is undefined for negative chars. */
static bool is_lower_or_digit(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
}

static bool is_alphanumeric(char c)
{
    return is_lower_or_digit(c) || (c >= 'A' && c <= 'Z');
}

bool is_dns_label(const char *word, size_t length)
{
    if (length < 1 || length > 63 || word[0] == '-' || word[length - 1] == '-')
        return false;
    for (size_t i = 0; i < length; i++)
        if (!is_lower_or_digit(word[i]) && word[i] != '-')
            return false;
    return true;
}

bool is_pod_name(const char *word, size_t length)
{
    if (length < 1 || length > 253 || !is_lower_or_digit(word[0]))
        return false;
    for (size_t i = 1; i < length; i++)
        if (!is_lower_or_digit(word[i]) && word[i] != '-' && word[i] != '.')
            return false;
    return true;
}

bool is_identifier(const char *word, size_t most)
{
    size_t length = strlen(word);
    if (length < 1 || length > most || !is_alphanumeric(word[0]))
        return false;
    for (size_t i = 1; i < length; i++)
        if (!is_alphanumeric(word[i]) && !strchr("_.-", word[i]))
            return false;
    return true;
}

bool is_interface_name(const char *word)
{
    size_t length = strlen(word);
    if (length < 1 || length > 15 || !strcmp(word, ".") || !strcmp(word, ".."))
        return false;
    return word[strcspn(word, "/: \t\n\v\f\r")] == '\0' && is_utf8(word);
}

bool is_utf8(const char *word)
{
    json_t *probe = json_string(word);
    json_decref(probe);
    return probe != NULL;
}
