/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Refuses (EPERM) ztunnel's ports and mark to all other processes of captured pods, and to ztunnel what would come back to
 * it. cgroup/bind and cgroup/connect.
 *
 * ztunnel's listeners have SO_REUSEPORT: a process of the same user could join them, or bind a more specific address, and
 * get what the rules redirect. And the rules let a socket with ztunnel's mark pass, which takes no more than CAP_NET_RAW
 * since Linux 5.17. A process that was bound before is not seen here; the agent finds it.
 */
#include "pod.h"
#include "returned.h"

static __always_inline int is_reserved(__u32 protocol, __u16 port)
{
	if (port == bpf_htons(DNS_PORT))
		return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
	return protocol == IPPROTO_TCP &&
	       (port == bpf_htons(OUTBOUND_PORT) || port == bpf_htons(INBOUND_PORT) || port == bpf_htons(HBONE_PORT));
}

static __always_inline int is_allowed(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod || !(pod->flags & POD_KNOWN))
		return 1;
	struct ztunnel unmet = {}; /* the agent has met no ztunnel yet: another agent may have one */
	return bpf_map_lookup_elem(&ztunnels, &unmet) || called_by_ztunnel();
}

static __always_inline int binding(struct bpf_sock_addr *ctx)
{
	return is_reserved(ctx->protocol, ctx->user_port) ? is_allowed(ctx) : 1;
}

static __always_inline int comes_back(struct bpf_sock_addr *ctx, const struct address *to)
{
	struct destination key = {.pod = bpf_get_netns_cookie(ctx), .address = *to, .port = ctx->user_port};
	struct returns *found = bpf_map_lookup_elem(&returns, &key);
	return found && found->refused && bpf_ktime_get_ns() - found->refused < RETURNED_NS;
}

static __always_inline int connecting(struct bpf_sock_addr *ctx, struct address to)
{
	struct bpf_sock *sk = ctx->sk;
	if (!sk || (sk->mark & MARK_MASK) != ZTUNNEL_MARK)
		return 1;
	return is_allowed(ctx) && !(ctx->protocol == IPPROTO_TCP && comes_back(ctx, &to));
}

SEC("cgroup/bind4") int ports4(struct bpf_sock_addr *ctx)
{
	return binding(ctx);
}

SEC("cgroup/bind6") int ports6(struct bpf_sock_addr *ctx)
{
	return binding(ctx);
}

SEC("cgroup/connect4") int mark4(struct bpf_sock_addr *ctx)
{
	return connecting(ctx, address4(FIELD(ctx->user_ip4)));
}

SEC("cgroup/connect6") int mark6(struct bpf_sock_addr *ctx)
{
	struct address to = {{FIELD(ctx->user_ip6[0]), FIELD(ctx->user_ip6[1]), FIELD(ctx->user_ip6[2]), FIELD(ctx->user_ip6[3])}};
	return connecting(ctx, to);
}

char _license[] SEC("license") = "GPL";
