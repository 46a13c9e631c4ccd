/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Connections of ztunnel's own that came back to ztunnel, because something in the pod redirects them as an application's.
 *
 * ztunnel would connect to the same destination again, and so for ever. accounting.bpf.c sees the first one by both ends,
 * reserve.bpf.c refuses those that follow.
 */
#ifndef SLUICE_RETURNED_H
#define SLUICE_RETURNED_H

#include "account.h"

#define RETURNED_NS 1000000000ULL /* for so long the next ones are refused; then one may try whether the cause is gone */

/* The time when it happened last. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct destination);
	__type(value, __u64);
} returned SEC(".maps");

#endif
