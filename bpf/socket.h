/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the programs at the socket calls share: who calls, and what a socket remembers. */
#ifndef SLUICE_SOCKET_H
#define SLUICE_SOCKET_H

#include "maps.h"
#include "pod.h"

static __always_inline struct address address6(struct bpf_sock_addr *ctx)
{
	struct address made = {{FIELD(ctx->user_ip6[0]), FIELD(ctx->user_ip6[1]), FIELD(ctx->user_ip6[2]), FIELD(ctx->user_ip6[3])}};
	return made;
}

static __always_inline void write4(struct bpf_sock_addr *ctx, const struct address *a, __u16 port)
{
	FIELD(ctx->user_ip4) = a->word[3];
	FIELD(ctx->user_port) = port;
}

static __always_inline void write6(struct bpf_sock_addr *ctx, const struct address *a, __u16 port)
{
	FIELD(ctx->user_ip6[0]) = a->word[0];
	FIELD(ctx->user_ip6[1]) = a->word[1];
	FIELD(ctx->user_ip6[2]) = a->word[2];
	FIELD(ctx->user_ip6[3]) = a->word[3];
	FIELD(ctx->user_port) = port;
}

#define HASTY 1 /* in the unused port of a MEMORY_SPEAKS_AS: its connect has to fail soon without an answer */

/* The mark alone proves nothing: since Linux 5.17 an application can set it with CAP_NET_RAW. */
static __always_inline int by_ztunnel(struct bpf_sock *sk)
{
	if ((sk->mark & MARK_MASK) != ZTUNNEL_MARK)
		return 0;
	if (called_by_ztunnel())
		return 1;
	count(EXIT_FORGED_MARK);
	return 0;
}

/* 0 when the socket could not be given any storage: then nothing may depend on it. */
static __always_inline int remember(struct bpf_sock *sk, __u16 kind, const struct address *a, __u16 port)
{
	struct memory *memory = bpf_sk_storage_get(&memories, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!memory) {
		count(EXIT_MEMORY_FAILED);
		return 0;
	}
	memory->address = *a;
	memory->port = port;
	memory->kind = kind;
	return 1;
}

static __always_inline struct memory *remembered(struct bpf_sock *sk)
{
	return bpf_sk_storage_get(&memories, sk, 0, 0);
}

/* A socket may be used for one destination after the other. */
static __always_inline void forget(struct bpf_sock *sk)
{
	struct memory *memory = remembered(sk);
	if (memory)
		memory->kind = MEMORY_NONE;
}

/* An address of lo for the process at the other end: many, so that ports do not run out, and connections in
 * TIME_WAIT do not stand in the way (tcp_tw_reuse is on for loopback). IPv6 has but one.
 */
static __always_inline struct address loopback_for(const struct address *a, __u16 port)
{
	struct address made = {{0, 0, 0, bpf_htonl(1)}};
	if (is_ipv4(a)) {
		__u32 mixed = (bpf_ntohl(a->word[3]) ^ (__u32)bpf_ntohs(port) << 7) * 0x9e3779b1;
		made = address4(bpf_htonl(0x7f000001 | (mixed >> 8 & 0x7ffffe)));
	}
	return made;
}

static __always_inline struct flow flow_to(struct bpf_sock_addr *ctx, __u64 cookie, const struct address *to)
{
	struct flow flow = {
		.cookie = cookie,
		.remote = *to,
		.local_port = bpf_htons(ctx->sk->src_port),
		.remote_port = ctx->user_port,
		.protocol = IPPROTO_UDP,
	};
	return flow;
}

/* A client may ask a DNS server of the pod from port 53: what goes back there is no question to a resolver. */
static __always_inline int answers_client(struct bpf_sock_addr *ctx, __u64 cookie, const struct address *to)
{
	struct flow flow = flow_to(ctx, cookie, to);
	return answers(&flow);
}

static __always_inline struct address localhost(int ipv4)
{
	struct address made = {{0, 0, 0, bpf_htonl(1)}};
	return ipv4 ? address4(bpf_htonl(0x7f000001)) : made;
}

#endif
