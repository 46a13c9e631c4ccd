/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Connections of ztunnel's own that came back to ztunnel, because something in the pod redirects them as an application's.
 *
 * ztunnel would connect to the same destination again, and so for ever. accounting.bpf.c sees each of them by both ends,
 * reserve.bpf.c refuses those that follow. One alone proves no such cause: it may have met a stale entry of conntrack.
 */
#ifndef SLUICE_RETURNED_H
#define SLUICE_RETURNED_H

#include "account.h"

#define RETURNS 8 /* a destination with as many in RETURNED_NS is refused */
#define RETURNED_NS 1000000000ULL /* for so long; then some may try whether the cause is gone */

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct destination);
	__type(value, struct returns);
} returns SEC(".maps");

#endif
