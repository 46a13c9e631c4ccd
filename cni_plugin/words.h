/* SPDX-License-Identifier: Apache-2.0 */
/* Checks for strings from outside. Pure. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

/* 1 to 63 of [a-z0-9-], no '-' at either end: a Kubernetes namespace. Safe as a file name. */
bool is_dns_label(const char *word, size_t length);

/* 1 to 253 of [a-z0-9.-], the first a letter or digit: a pod name or the beginning of one. */
bool is_pod_name(const char *word, size_t length);

/* CNI's rule for container ids and network names: an alphanumeric, then also '_', '.' and '-'; at most `most`. */
bool is_identifier(const char *word, size_t most);

/* CNI's and the kernel's rule for interface names: 1 to 15 bytes without '/', ':' and white space. The name must
 * also be UTF-8, because it is sent as JSON. */
bool is_interface_name(const char *word);

/* Returns true if JSON can carry the string. */
bool is_utf8(const char *word);
