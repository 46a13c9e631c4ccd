/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Redirects the connect of an application to ztunnel, and stores the destination in the socket.
 *
 * cgroup/connect4 and connect6 run once for each connect, TCP Fast Open and connected UDP included, before anything
 * is sent. A connect for which they return 0 fails with EPERM.
 */
#include "socket.h"

#define UDP_TRIES 8
#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25
#define TCP_SYNCNT 7
#define LO 1 /* index of lo, in every namespace */

struct sockaddr4 {
	__u16 family, port;
	__u32 ip;
	__u8 none[8];
};

struct sockaddr6 {
	__u16 family, port;
	__u32 flow;
	struct address address;
	__u32 scope;
};

static __always_inline int bind_to(struct bpf_sock_addr *ctx, const struct address *a, __u16 port)
{
	if (is_ipv4(a) && ctx->family == AF_INET) {
		struct sockaddr4 to = {.family = AF_INET, .port = port, .ip = a->word[3]};
		return bpf_bind(ctx, (struct sockaddr *)&to, sizeof(to));
	}
	struct sockaddr6 to = {.family = AF_INET6, .port = port, .address = *a};
	return bpf_bind(ctx, (struct sockaddr *)&to, sizeof(to));
}

static __always_inline int is_bound(struct bpf_sock *sk)
{
	return sk->src_port || sk->src_ip4 || sk->src_ip6[0] || sk->src_ip6[2] || sk->src_ip6[3];
}

/* A socket that is bound to an interface would look for loopback behind it. Which one is used is ztunnel's to say now. The
 * kernel refuses it (0) to a process without CAP_NET_RAW.
 */
static __always_inline int by_any_interface(struct bpf_sock_addr *ctx)
{
	char none[16] = {};
	__u32 interface = ctx->sk->bound_dev_if;
	return !interface || interface == LO || !bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, none, sizeof(none));
}

/* ztunnel may ask by the port of a query which resolver it was for: so the port has to be known now. */
static __always_inline void note_query(struct bpf_sock_addr *ctx, const struct pod *pod, __u64 cookie, const struct address *to,
				       __u16 port, int ipv4)
{
	__u32 from = ctx->sk->src_port;
	const struct address *own = ipv4 ? &pod->own4 : &pod->own6;
	if (!from && own->word[3] && !is_bound(ctx->sk)) {
		for (int i = 0; i < UDP_TRIES && !from; i++) {
			__u32 port = 32768 + bpf_get_prandom_u32() % 28232;
			if (!bind_to(ctx, own, bpf_htons(port)))
				from = port;
		}
	}
	if (!from)
		return;
	struct query query = {.cookie = cookie, .port = bpf_htons(from), .protocol = IPPROTO_UDP};
	struct resolver resolver = {.address = *to, .port = port};
	bpf_map_update_elem(&resolvers, &query, &resolver, BPF_ANY);
}

/* No process seems to listen there, and the kernel sends no RST to ::1: it looks for a route by the interface of the pod's
 * address. So ztunnel's connect fails soon (events.bpf.c); a listener behind a rule of the pod's has answered long
 * before.
 */
static __always_inline void give_up_soon(struct bpf_sock_addr *ctx, struct memory *memory, const struct address *to, __u16 port)
{
	struct bpf_sock_tuple tuple = {.ipv6.saddr[3] = bpf_htonl(1), .ipv6.dport = port};
	__builtin_memcpy(tuple.ipv6.daddr, to, sizeof(*to));
	struct bpf_sock *listener = bpf_skc_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	if (listener) {
		bpf_sk_release(listener);
		return;
	}
	int once = 1;
	if (!bpf_setsockopt(ctx, IPPROTO_TCP, TCP_SYNCNT, &once, sizeof(once)))
		memory->port = HASTY;
}

static __always_inline int connecting(struct bpf_sock_addr *ctx, const struct address *to, struct address *through, __u16 *port)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	struct bpf_sock *sk = ctx->sk;
	__u32 protocol = ctx->protocol;
	if (!pod || !sk || (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP))
		return 1;
	__u16 asked = ctx->user_port;
	int ipv4 = is_ipv4(to);
	if (by_ztunnel(sk)) {
		struct memory *memory = remembered(sk);
		count(EXIT_ZTUNNEL);
		if (memory && memory->kind == MEMORY_SPEAKS_AS) {
			if (!ipv4 && protocol == IPPROTO_TCP)
				give_up_soon(ctx, memory, to, asked);
			return 1;
		}
		return remember(sk, MEMORY_ZTUNNEL, to, asked);
	}
	struct answer answer = outbound(pod, protocol, to, asked, bpf_get_current_uid_gid());
	if (answer.verdict == TO_DNS && protocol == IPPROTO_UDP && answers_client(ctx, cookie, to))
		answer = ANSWER(PASS, EXIT_NOT_TCP);
	/* Without a way the kernel says so itself, and the application takes the next address. Should it find one after all,
	 * the guard at the interface drops the SYN.
	 */
	if (answer.verdict == TO_ZTUNNEL && !listed(pod, POLICY_REACH, to, 128, 1)) {
		forget(sk);
		return 1;
	}
	count(answer.cause);
	if (answer.verdict == PASS) {
		if (answer.cause == EXIT_EXCLUDED_USER)
			return remember(sk, MEMORY_USER, to, asked);
		forget(sk);
		return 1;
	}
	if (!remember(sk, MEMORY_ASKED, to, asked))
		return 0;
	const struct address *own = ipv4 ? &pod->own4 : &pod->own6;
	int bound = !by_any_interface(ctx);
	if (bound && (!(pod->flags & POD_SINGLE) || !own->word[3])) {
		count(EXIT_INTERFACE_FAILED);
		return 0;
	}
	if (answer.verdict == TO_DNS) {
		if (protocol == IPPROTO_UDP)
			note_query(ctx, pod, cookie, to, asked, ipv4);
		else if (bound && !is_bound(sk))
			bind_to(ctx, own, 0); /* what is sent to 127.0.0.1 does not come in by its interface */
		*through = localhost(ipv4);
		*port = bpf_htons(DNS_PORT);
	} else {
		/* The pod's own address is behind its own interface, and still reached by lo. */
		*through = bound || (ipv4 && !(pod->flags & POD_LOOPBACK4)) ? *own : loopback_for(to, asked);
		*port = bpf_htons(OUTBOUND_PORT);
	}
	return 1;
}

SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *ctx)
{
	struct address to = address4(ctx->user_ip4), through;
	__u16 port = 0;
	int result = connecting(ctx, &to, &through, &port);
	if (port)
		write4(ctx, &through, port);
	return result;
}

SEC("cgroup/connect6") int connect6(struct bpf_sock_addr *ctx)
{
	struct address to = address6(ctx), through;
	__u16 port = 0;
	int result = connecting(ctx, &to, &through, &port);
	if (port)
		write6(ctx, &through, port);
	return result;
}

char _license[] SEC("license") = "GPL";
