/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The maps of the programs that capture: one in all objects, by their pins. Sizes are settings of the agent. */
#ifndef SLUICE_MAPS_H
#define SLUICE_MAPS_H

#include "pod_maps.h"

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 16384);
	__type(key, struct listener);
	__type(value, __u64);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct connection);
	__type(value, struct memory);
} handover SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct query);
	__type(value, struct resolver);
} resolvers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct flow);
	__type(value, __u32);
} flows SEC(".maps");

#define ASKED_SECONDS 30 /* as long as conntrack waits for an answer (nf_conntrack_udp_timeout) */

static __always_inline __u32 seconds(void)
{
	return bpf_ktime_get_ns() / 1000000000;
}

/* Whether what is sent by this flow answers a question that came by it; sets `asked`. */
static __always_inline int answers(struct flow *flow)
{
	flow->asked = 1;
	__u32 *when = bpf_map_lookup_elem(&flows, flow);
	return when && seconds() - *when <= ASKED_SECONDS;
}

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct non_tcp_key);
	__type(value, struct traffic);
} beside SEC(".maps");

static __always_inline void count_non_tcp(__u64 cookie, __u32 direction, __u64 bytes)
{
	struct non_tcp_key key = {.cookie = cookie, .direction = direction};
	struct traffic none = {}, *counts = bpf_map_lookup_elem(&beside, &key);
	if (!counts) {
		bpf_map_update_elem(&beside, &key, &none, BPF_NOEXIST);
		counts = bpf_map_lookup_elem(&beside, &key);
	}
	if (counts) {
		counts->packets++;
		counts->bytes += bytes;
	}
}

#endif
