/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* DNS over unconnected sockets: each query goes to ztunnel, and each answer appears to come from the resolver.
 *
 * ztunnel distinguishes queries by their source address and port. A socket that asks several resolvers gets a loopback address
 * for each resolver after the first (IPv4 only: IPv6 has one). An answer from that address is shown as that resolver's; an
 * answer from 127.0.0.1 as that of the resolver that was asked last.
 */
#include "socket.h"

#define REFUSED 0

static __always_inline int by_flow(struct bpf_sock_addr *ctx, __u64 cookie, const struct address *to)
{
	struct flow flow = flow_to(ctx, cookie, to);
	return bpf_map_lookup_elem(&flows, &flow) != NULL;
}

/* Returns 1 and leaves `through` alone, or fills it, or returns 0 for EPERM. */
static __always_inline int sending(struct bpf_sock_addr *ctx, const struct address *to, int bound, struct address *through,
				   struct address *source)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	struct bpf_sock *sk = ctx->sk;
	if (!pod || !sk || ctx->protocol != IPPROTO_UDP)
		return 1;
	__u16 asked = ctx->user_port;
	if (by_ztunnel(sk)) {
		count(EXIT_ZTUNNEL);
		return remember(sk, MEMORY_ZTUNNEL, to, asked);
	}
	struct answer answer = outbound(pod, IPPROTO_UDP, to, asked, bpf_get_current_uid_gid());
	if (answer.verdict == TO_DNS && answers_client(ctx, cookie, to))
		answer = ANSWER(PASS, EXIT_NOT_TCP);
	if (answer.cause == EXIT_NOT_TCP && pod->flags & POD_REFUSE && !by_flow(ctx, cookie, to)) {
		count_non_tcp(cookie, OUTBOUND, 0); /* its size is not known here */
		count(EXIT_NOT_TCP_REFUSED);
		return REFUSED;
	}
	count(answer.cause);
	if (answer.cause == EXIT_EXCLUDED_USER)
		return remember(sk, MEMORY_USER, to, asked);
	if (answer.verdict != TO_DNS)
		return 1;
	struct memory *before = remembered(sk);
	int another = before && before->kind == MEMORY_ASKED && (before->port != asked || !same(&before->address, to));
	if (!remember(sk, MEMORY_ASKED, to, asked))
		return REFUSED;
	struct query query = {.cookie = cookie, .port = bpf_htons(sk->src_port), .protocol = IPPROTO_UDP};
	struct resolver resolver = {.address = *to, .port = asked};
	*source = is_ipv4(to) ? pod->own4 : pod->own6;
	if (another && is_ipv4(to) && pod->flags & POD_LOOPBACK4 && !bound) {
		*source = loopback_for(to, asked);
		query.source = source->word[3];
	}
	bpf_map_update_elem(&resolvers, &query, &resolver, BPF_ANY);
	*through = localhost(is_ipv4(to));
	return 1;
}

SEC("cgroup/sendmsg4") int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct address to = address4(ctx->user_ip4), through = {}, source = {};
	int bound = FIELD(ctx->msg_src_ip4) != 0, result = sending(ctx, &to, bound, &through, &source);
	if (through.word[3]) {
		write4(ctx, &through, bpf_htons(DNS_PORT));
		if (!bound && source.word[3])
			FIELD(ctx->msg_src_ip4) = source.word[3];
	}
	return result;
}

SEC("cgroup/sendmsg6") int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct address to = address6(ctx), through = {}, source = {};
	int result = sending(ctx, &to, 1, &through, &source);
	if (through.word[3]) {
		write6(ctx, &through, bpf_htons(DNS_PORT));
		if (!(ctx->msg_src_ip6[0] | ctx->msg_src_ip6[1] | ctx->msg_src_ip6[2] | ctx->msg_src_ip6[3]) && source.word[3]) {
			FIELD(ctx->msg_src_ip6[0]) = source.word[0];
			FIELD(ctx->msg_src_ip6[1]) = source.word[1];
			FIELD(ctx->msg_src_ip6[2]) = source.word[2];
			FIELD(ctx->msg_src_ip6[3]) = source.word[3];
		}
	}
	return result;
}

static __always_inline int answered(struct bpf_sock_addr *ctx, const struct address *from, struct resolver *by)
{
	struct memory *memory;
	if (ctx->user_port != bpf_htons(DNS_PORT) || !is_loopback(from) || !ctx->sk)
		return 0;
	memory = remembered(ctx->sk);
	if (!memory || memory->kind != MEMORY_ASKED)
		return 0;
	by->address = memory->address;
	by->port = memory->port;
	if (is_localhost(from))
		return 1;
	struct query query = {
		.cookie = bpf_get_netns_cookie(ctx),
		.port = bpf_htons(ctx->sk->src_port),
		.protocol = IPPROTO_UDP,
		.source = from->word[3],
	};
	struct resolver *asked = bpf_map_lookup_elem(&resolvers, &query);
	if (asked)
		*by = *asked;
	return 1;
}

SEC("cgroup/recvmsg4") int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct address from = address4(ctx->user_ip4);
	struct resolver by;
	if (answered(ctx, &from, &by))
		write4(ctx, &by.address, by.port);
	return 1;
}

SEC("cgroup/recvmsg6") int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct address from = address6(ctx);
	struct resolver by;
	if (answered(ctx, &from, &by))
		write6(ctx, &by.address, by.port);
	return 1;
}

char _license[] SEC("license") = "GPL";
