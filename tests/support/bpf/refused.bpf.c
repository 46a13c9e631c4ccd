/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The verifier refuses this: what a lookup found may be nothing. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u64);
} table SEC(".maps");

SEC("cgroup/connect4")
int refused(struct bpf_sock_addr *ctx)
{
	__u32 key = 1;
	__u64 *value = bpf_map_lookup_elem(&table, &key);

	return *value;
}

char LICENSE[] SEC("license") = "GPL";
