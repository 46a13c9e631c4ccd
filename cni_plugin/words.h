/* The shapes that words from outside must have. Pure. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

/* 1 to 63 of [a-z0-9-], no '-' at either end: a Kubernetes namespace. Safe as a file name. */
bool is_dns_label(const char *word, size_t length);

/* 1 to 253 of [a-z0-9.-] that begin with a letter or digit: the name of a pod, or how one begins. */
bool is_pod_name(const char *word, size_t length);

/* CNI's rule for container ids and network names: alphanumeric, then also '_', '.' and '-'; up to `most`. */
bool is_identifier(const char *word, size_t most);

/* CNI's rule for interface names, which is the kernel's: 1 to 15 bytes, none of '/', ':' and white space.
 * Also UTF-8, as it has to travel in JSON. */
bool is_interface_name(const char *word);

/* Whether JSON can carry it. */
bool is_utf8(const char *word);
