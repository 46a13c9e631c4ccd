/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* When ztunnel binds a client's address, its socket gets an address of lo, and the application sees the client's.
 *
 * So the replies of the application need no mark, rule or route. cgroup/bind4 and bind6.
 */
#include "socket.h"

static __always_inline int binding(struct bpf_sock_addr *ctx, const struct address *as, struct address *instead)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	struct bpf_sock *sk = ctx->sk;
	if (!pod || !sk || ctx->protocol != IPPROTO_TCP || is_loopback(as) || is_own(pod, as) || !by_ztunnel(sk))
		return 1;
	int ipv4 = is_ipv4(as);
	const struct address *own = ipv4 ? &pod->own4 : &pod->own6;
	if (!remember(sk, MEMORY_SPEAKS_AS, as, 0))
		return 0;
	count(EXIT_SPEAKS_AS);
	if (is_link_local(as)) /* an answer to ::1 would not come back by the interface that such a socket is bound to */
		*instead = pod->link6;
	else
		*instead = ipv4 && !(pod->flags & POD_LOOPBACK4) ? *own : loopback_for(as, 0);
	return 1;
}

SEC("cgroup/bind4") int bind4(struct bpf_sock_addr *ctx)
{
	struct address as = address4(ctx->user_ip4), instead = {};
	int result = binding(ctx, &as, &instead);
	if (instead.word[3])
		FIELD(ctx->user_ip4) = instead.word[3];
	return result;
}

SEC("cgroup/bind6") int bind6(struct bpf_sock_addr *ctx)
{
	struct address as = address6(ctx), instead = {};
	int result = binding(ctx, &as, &instead);
	if (instead.word[3])
		write6(ctx, &instead, ctx->user_port);
	return result;
}

char _license[] SEC("license") = "GPL";
