/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The names of sockets: the application sees the destination that it asked for, ztunnel the original destination and client. */
#include "socket.h"

#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80 /* linux/netfilter_ipv4.h, and at level IPv6 */
#define SOCKADDR_IN 16
#define SOCKADDR_IN6 28

/* The pod's own address, where the socket has one of lo, because its peer has: to both ends of a captured connection. */
static __always_inline int own_instead(struct bpf_sock_addr *ctx, const struct address *now, struct address *shown)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = is_loopback(now) ? bpf_map_lookup_elem(&pods, &cookie) : NULL;
	if (!pod)
		return 0;
	*shown = is_ipv4(now) ? pod->own4 : pod->own6;
	return shown->word[3] != 0;
}

static __always_inline int at_ztunnel(struct bpf_sock *sk)
{
	return sk->src_port == OUTBOUND_PORT || sk->src_port == DNS_PORT;
}

/* ztunnel spoke for a client and took a port of its own: both ends show the client's address with that port. */
static __always_inline int peer(struct bpf_sock_addr *ctx, const struct address *now, struct address *shown, __u16 *port)
{
	struct memory *memory = ctx->sk ? remembered(ctx->sk) : NULL;
	if (!memory || memory->kind == MEMORY_ORIGINAL)
		return ctx->sk && at_ztunnel(ctx->sk) ? own_instead(ctx, now, shown) : 0;
	if (memory->kind != MEMORY_ASKED && memory->kind != MEMORY_CLIENT)
		return 0;
	*shown = memory->address;
	*port = memory->port;
	return 1;
}

static __always_inline int self(struct bpf_sock_addr *ctx, const struct address *now, struct address *shown)
{
	struct memory *memory = ctx->sk ? remembered(ctx->sk) : NULL;
	if (!memory)
		return 0;
	if (memory->kind == MEMORY_ASKED)
		return own_instead(ctx, now, shown);
	if (memory->kind != MEMORY_SPEAKS_AS)
		return 0;
	*shown = memory->address;
	return 1;
}

SEC("cgroup/getpeername4") int getpeername4(struct bpf_sock_addr *ctx)
{
	struct address now = address4(ctx->user_ip4), shown;
	__u16 port = ctx->user_port;
	if (peer(ctx, &now, &shown, &port))
		write4(ctx, &shown, port);
	return 1;
}

SEC("cgroup/getpeername6") int getpeername6(struct bpf_sock_addr *ctx)
{
	struct address now = address6(ctx), shown;
	__u16 port = ctx->user_port;
	if (peer(ctx, &now, &shown, &port))
		write6(ctx, &shown, port);
	return 1;
}

SEC("cgroup/getsockname4") int getsockname4(struct bpf_sock_addr *ctx)
{
	struct address now = address4(ctx->user_ip4), shown;
	if (self(ctx, &now, &shown))
		FIELD(ctx->user_ip4) = shown.word[3];
	return 1;
}

SEC("cgroup/getsockname6") int getsockname6(struct bpf_sock_addr *ctx)
{
	struct address now = address6(ctx), shown;
	if (self(ctx, &now, &shown))
		write6(ctx, &shown, ctx->user_port);
	return 1;
}

static __always_inline struct address peer_address(struct bpf_sock *sk)
{
	if (FIELD(sk->family) == AF_INET)
		return address4(FIELD(sk->dst_ip4));
	return (struct address){{FIELD(sk->dst_ip6[0]), FIELD(sk->dst_ip6[1]), FIELD(sk->dst_ip6[2]), FIELD(sk->dst_ip6[3])}};
}

static __always_inline struct address own_address(struct bpf_sock *sk)
{
	if (FIELD(sk->family) == AF_INET)
		return address4(FIELD(sk->src_ip4));
	return (struct address){{FIELD(sk->src_ip6[0]), FIELD(sk->src_ip6[1]), FIELD(sk->src_ip6[2]), FIELD(sk->src_ip6[3])}};
}

/* What the kernel leaves zero says that the peer's address is one of loopback, and another is shown (`own_instead`):
 * the first byte of sin_zero, and the bits of the flow's word outside the flow label.
 */
static __always_inline void answer(struct bpf_sockopt *ctx, const struct address *a, __u16 port, int substitute)
{
	__u32 scope = is_link_local(a) ? ctx->sk->bound_dev_if : 0;
	__u8 *at = ctx->optval, *end = ctx->optval_end;
	int size = 0;
	if (ctx->level == SOL_IP && is_ipv4(a)) {
		if (at + SOCKADDR_IN > end || ctx->optlen < SOCKADDR_IN)
			return;
		*(__u16 *)at = AF_INET;
		*(__u16 *)(at + 2) = port;
		*(__u32 *)(at + 4) = a->word[3];
		*(__u64 *)(at + 8) = substitute ? bpf_cpu_to_be64(1ULL << 56) : 0;
		size = SOCKADDR_IN;
	} else if (ctx->level == SOL_IPV6 && !is_ipv4(a)) {
		if (at + SOCKADDR_IN6 > end || ctx->optlen < SOCKADDR_IN6)
			return;
		*(__u16 *)at = AF_INET6;
		*(__u16 *)(at + 2) = port;
		*(__u32 *)(at + 4) = substitute ? bpf_htonl(1U << 28) : 0;
		for (int i = 0; i < 4; i++)
			*(__u32 *)(at + 8 + 4 * i) = a->word[i];
		*(__u32 *)(at + 24) = scope;
		size = SOCKADDR_IN6;
	}
	if (!size)
		return;
	FIELD(ctx->optlen) = size;
	FIELD(ctx->retval) = 0;
}

/* The source under which the destination may have been stored, if a rule of the pod has masqueraded the connection, which came
 * by lo. Then it kept its port, but has an address of the pod in place of 127.0.0.1; with IPv6 ::1 in place of what it had.
 */
static __always_inline int before_masquerade(struct connection *key)
{
	__u64 cookie = key->cookie;
	struct pod *pod = is_loopback(&key->destination) ? bpf_map_lookup_elem(&pods, &cookie) : NULL;
	int ipv4 = is_ipv4(&key->source);
	if (!pod || !(ipv4 ? is_own(pod, &key->source) : is_loopback(&key->source)))
		return 0;
	key->source = ipv4 ? localhost(1) : pod->own6;
	return 1;
}

static __always_inline int is_substituted(const struct connection *key)
{
	return is_loopback(&key->source) || same(&key->source, &key->destination);
}

/* What was handed over to ztunnel's socket. It moves there, so that nothing is left for a later connection to find. */
static __always_inline struct memory *original(struct bpf_sock *sk, struct connection *key)
{
	struct memory *memory = remembered(sk), *given;
	if (memory)
		return memory;
	given = bpf_map_lookup_elem(&handover, key);
	if (!given && before_masquerade(key))
		given = bpf_map_lookup_elem(&handover, key);
	if (!given || given->kind != MEMORY_ORIGINAL)
		return NULL;
	given->substituted = is_substituted(key);
	memory = bpf_sk_storage_get(&memories, sk, given, BPF_SK_STORAGE_GET_F_CREATE);
	if (!memory)
		return given;
	bpf_map_delete_elem(&handover, key);
	return memory;
}

/* SO_ORIGINAL_DST, as if conntrack had kept it. Runs after the kernel's own answer, which stands if we know none. */
SEC("cgroup/getsockopt") int getsockopt(struct bpf_sockopt *ctx)
{
	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6) || !ctx->sk)
		return 1;
	struct bpf_sock *sk = ctx->sk;
	int failed = FIELD(ctx->retval);
	/* Else clang keeps the field's place for the write to come, and the verifier knows no such pointer. */
	asm volatile("" : "+r"(ctx));
	struct connection key = {
		.cookie = bpf_get_netns_cookie(ctx),
		.source = peer_address(sk),
		.destination = own_address(sk),
		.source_port = sk->dst_port,
		.destination_port = bpf_htons(sk->src_port),
	};
	int substitute = is_substituted(&key);
	if (at_ztunnel(sk)) {
		struct memory *memory = original(sk, &key);
		if (!memory || memory->kind != MEMORY_ORIGINAL)
			return 1;
		key.destination = memory->address;
		key.destination_port = memory->port;
		substitute = memory->substituted;
	} else if (!failed || (sk->mark & MARK_MASK) != ZTUNNEL_MARK || !bpf_map_lookup_elem(&pods, &key.cookie)) {
		return 1;
	}
	/* Else a connection that came in: its own address is where it was going. */
	answer(ctx, &key.destination, key.destination_port, substitute);
	return 1;
}

char _license[] SEC("license") = "GPL";
