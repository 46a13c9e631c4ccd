/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Gives an inbound connection to ztunnel's own listener, which the agent took from ztunnel's process; other listeners do not count.
 *
 * sk_lookup runs once for each SYN that belongs to no connection of the namespace. SK_DROP makes the kernel answer with a RST,
 * so without a ztunnel connections are refused, never passed in plain text. Loaded once for each pod, with its cookie: this
 * kind of program cannot ask for the namespace that it runs in.
 */
#include "maps.h"
#include "pod.h"

const volatile __u64 own_cookie = 0;

static __always_inline int give(struct bpf_sk_lookup *ctx, __u32 role)
{
	for (__u32 slot = 0; slot < LISTENER_SLOTS; slot++) {
		struct listener key = {.cookie = own_cookie, .role = role, .slot = slot};
		struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &key);
		if (!sk)
			continue;
		/* Not another member of its SO_REUSEPORT group, which any process of the same user can join. */
		long failed = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_REPLACE | BPF_SK_LOOKUP_F_NO_REUSEPORT);
		bpf_sk_release(sk);
		if (!failed)
			return SK_PASS;
		count(EXIT_ASSIGN_FAILED);
	}
	count(EXIT_NO_LISTENER);
	return SK_DROP;
}

SEC("sk_lookup") int lookup(struct bpf_sk_lookup *ctx)
{
	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	__u64 cookie = own_cookie;
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return SK_PASS;
	__u32 port = ctx->local_port; /* host order */
	struct address from, to;
	if (FIELD(ctx->family) == AF_INET) {
		from = address4(FIELD(ctx->remote_ip4));
		to = address4(FIELD(ctx->local_ip4));
	} else {
		from = (struct address){{FIELD(ctx->remote_ip6[0]), FIELD(ctx->remote_ip6[1]), FIELD(ctx->remote_ip6[2]),
					 FIELD(ctx->remote_ip6[3])}};
		to = (struct address){{FIELD(ctx->local_ip6[0]), FIELD(ctx->local_ip6[1]), FIELD(ctx->local_ip6[2]),
				       FIELD(ctx->local_ip6[3])}};
	}
	/* What the pod sends to itself comes by lo, but for an address of eth0 ingress_ifindex says eth0. No host outside
	 * can speak with these addresses: the answers would not leave the pod.
	 */
	if (is_loopback(&from) || is_own(pod, &from))
		return port == OUTBOUND_PORT ? give(ctx, LISTEN_OUTBOUND) : SK_PASS;
	struct answer answer = inbound(pod, ctx->ingress_ifindex, &from, &to, bpf_htons(port));
	count(answer.cause);
	if (answer.verdict == PASS)
		return SK_PASS;
	return give(ctx, answer.verdict == TO_ZTUNNEL ? LISTEN_OUTBOUND : LISTEN_INBOUND);
}

char _license[] SEC("license") = "GPL";
