/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* One of each kind that the wrapper of libbpf has to load, pin, attach and read. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#ifndef PORT
#define PORT 1 /* another build of the same programs */
#endif

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u64);
} table SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u32);
} counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

struct range {
	__u32 length;
	__u8 address[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 64);
	__type(key, struct range);
	__type(value, __u32);
} ranges SEC(".maps");

volatile const __u32 port = PORT; /* .rodata: a map of the compiler's */

static int count(__u32 which)
{
	__u32 *value = bpf_map_lookup_elem(&counts, &which);

	if (value)
		__sync_fetch_and_add(value, 1);
	return 1;
}

SEC("cgroup/connect4")
int on_connect4(struct bpf_sock_addr *ctx)
{
	__u32 key = port;
	__u64 *value = bpf_map_lookup_elem(&table, &key);

	if (value)
		__sync_fetch_and_add(value, PORT);
	return count(0);
}

SEC("sk_lookup")
int on_lookup(struct bpf_sk_lookup *ctx)
{
	__u32 key = 0;
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &key);

	if (!sk)
		return SK_DROP;
	bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	return SK_PASS;
}

SEC("tc")
int on_packet(struct __sk_buff *skb)
{
	struct range key = {.length = 32};

	count(1);
	return bpf_map_lookup_elem(&ranges, &key) ? 2 /* TC_ACT_SHOT */ : -1 /* TCX_NEXT */;
}

char LICENSE[] SEC("license") = "GPL";
