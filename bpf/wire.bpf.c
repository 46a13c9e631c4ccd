/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The guard at the pod's interfaces, per packet: tcx on every interface but lo.
 *
 * Counts, or refuses, what is neither TCP nor captured DNS. Outbound it is the last guard: it drops a SYN that should have been
 * captured and was not (MPTCP, raw sockets). Inbound it marks TCP that the pod would only forward (to a virtual machine) and
 * that should be captured: the policy rule of the mark delivers it to the pod. Loaded once for each pod.
 */
#include "maps.h"
#include "packet.h"

#define TC_NEXT -1
#define TC_DROP 2
#define LISTEN 10

const volatile __u64 own_cookie = 0;

static __always_inline struct flow flow_of(const struct packet *p, __u32 direction)
{
	struct flow flow = {
		.cookie = own_cookie,
		.remote = direction == OUTBOUND ? p->to : p->from,
		.local_port = direction == OUTBOUND ? p->from_port : p->to_port,
		.remote_port = direction == OUTBOUND ? p->to_port : p->from_port,
		.protocol = p->protocol,
	};
	return flow;
}

static __always_inline int has_flow(const struct packet *p, __u32 direction)
{
	struct flow flow = flow_of(p, direction);
	return bpf_map_lookup_elem(&flows, &flow) != NULL;
}

/* What passes one way is answered the other way. */
static __always_inline int pass_both_ways(const struct packet *p, __u32 direction)
{
	struct flow flow = flow_of(p, direction);
	__u32 one = 1;
	bpf_map_update_elem(&flows, &flow, &one, BPF_ANY);
	return TC_NEXT;
}

static __always_inline int rest(const struct packet *p, const struct pod *pod, __u32 direction)
{
	count_non_tcp(own_cookie, direction, p->bytes);
	if (!(pod->flags & POD_REFUSE))
		return TC_NEXT;
	count(EXIT_NOT_TCP_REFUSED);
	return TC_DROP;
}

static __always_inline __u16 kind_of(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct memory *memory;
	if (!sk || !(sk = bpf_sk_fullsock(sk)))
		return MEMORY_NONE;
	memory = bpf_sk_storage_get(&memories, sk, 0, 0);
	return memory ? memory->kind : MEMORY_NONE;
}

/* Only what this pod sends itself: skb_iif is that of what it forwards. */
static __always_inline int leaving_tcp(struct __sk_buff *skb, const struct pod *pod, const struct packet *p)
{
	if ((p->flags & (SYN | ACK)) != SYN || skb->ingress_ifindex)
		return TC_NEXT;
	struct answer answer = outbound(pod, IPPROTO_TCP, &p->to, p->to_port, ~0U);
	if (is_loopback(&p->to)) { /* a captured connection of a socket that is bound to this interface */
		count(EXIT_ESCAPE_REFUSED);
		return TC_DROP;
	}
	if (answer.verdict == PASS || listed_number(pod, POLICY_INTERFACE, bpf_htonl(skb->ifindex), 32) == ROLE_EXCLUDED)
		return TC_NEXT;
	__u16 kind = kind_of(skb);
	if (kind == MEMORY_ZTUNNEL || kind == MEMORY_SPEAKS_AS || kind == MEMORY_USER)
		return TC_NEXT;
	count(EXIT_ESCAPE_REFUSED);
	return TC_DROP;
}

SEC("tc") int egress(struct __sk_buff *skb)
{
	__u64 cookie = own_cookie;
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	struct packet p = {};
	if (!pod || goes_on(skb, pod, SYN | ACK))
		return TC_NEXT;
	int parsed = parse(skb, &p);
	if (parsed < 0)
		count(EXIT_MALFORMED);
	if (parsed <= 0)
		return parsed < 0 ? TC_DROP : TC_NEXT;
	if (p.protocol == IPPROTO_TCP)
		return leaving_tcp(skb, pod, &p);
	if (p.protocol == IPPROTO_ICMP || p.protocol == IPPROTO_ICMPV6 || p.later_fragment || !family_on(pod, &p.to))
		return TC_NEXT;
	__u16 kind = kind_of(skb);
	int udp = p.protocol == IPPROTO_UDP;
	struct flow flow = flow_of(&p, OUTBOUND);
	if (udp && pod->flags & POD_DNS && p.to_port == bpf_htons(53) && kind != MEMORY_ZTUNNEL && answers(&flow))
		return TC_NEXT;
	/* ztunnel's own, and what asks around it: the answers are known by the flow. */
	if (kind == MEMORY_ZTUNNEL || (udp && pod->flags & POD_DNS && p.to_port == bpf_htons(53) && is_resolver(pod, &p.to)))
		return pass_both_ways(&p, OUTBOUND);
	if (pod->flags & POD_REFUSE) {
		__u32 excluded = excluded_outbound(pod, &p.to, p.to_port, ~0U, udp);
		if (excluded || kind == MEMORY_USER ||
		    listed_number(pod, POLICY_INTERFACE, bpf_htonl(skb->ifindex), 32) == ROLE_EXCLUDED)
			return pass_both_ways(&p, OUTBOUND);
		if (has_flow(&p, OUTBOUND))
			return TC_NEXT;
	}
	return rest(&p, pod, OUTBOUND);
}

/* The sockets that the packet could be for; returns the size. */
static __always_inline __u32 tuple_of(const struct packet *p, struct bpf_sock_tuple *tuple)
{
	if (is_ipv4(&p->to)) {
		tuple->ipv4.saddr = p->from.word[3];
		tuple->ipv4.daddr = p->to.word[3];
		tuple->ipv4.sport = p->from_port;
		tuple->ipv4.dport = p->to_port;
		return sizeof(tuple->ipv4);
	}
	__builtin_memcpy(tuple->ipv6.saddr, &p->from, sizeof(p->from));
	__builtin_memcpy(tuple->ipv6.daddr, &p->to, sizeof(p->to));
	tuple->ipv6.sport = p->from_port;
	tuple->ipv6.dport = p->to_port;
	return sizeof(tuple->ipv6);
}

/* Whether a connection of this namespace claims the packet: it has been captured then, or is the pod's own. */
static __always_inline int is_claimed(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = tuple_of(p, &tuple);
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return 0;
	int listens = sk->state == LISTEN;
	bpf_sk_release(sk);
	return !listens;
}

static __always_inline int coming_tcp(struct __sk_buff *skb, const struct pod *pod, const struct packet *p)
{
	if (!(pod->flags & POD_FORWARDS) || is_own(pod, &p->to))
		return TC_NEXT;
	int captured;
	if ((p->flags & (SYN | ACK)) == SYN)
		captured = inbound(pod, skb->ifindex, &p->from, &p->to, p->to_port).verdict != PASS;
	else
		captured = is_claimed(skb, p);
	if (captured)
		skb->mark = CONNECTION_MARK;
	return TC_NEXT;
}

/* A client may ask a DNS server of the pod from port 53: what goes back there is an answer. */
static __always_inline void note_asked(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = tuple_of(p, &tuple), now = seconds();
	struct bpf_sock *sk = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	struct flow flow = flow_of(p, INBOUND);
	if (!sk)
		return;
	bpf_sk_release(sk);
	flow.asked = 1;
	bpf_map_update_elem(&flows, &flow, &now, BPF_ANY);
}

SEC("tc") int ingress(struct __sk_buff *skb)
{
	__u64 cookie = own_cookie;
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	struct packet p = {};
	if (!pod || (!(pod->flags & POD_FORWARDS) && goes_on(skb, pod, SYN | ACK)))
		return TC_NEXT;
	int parsed = parse(skb, &p);
	if (parsed <= 0)
		return TC_NEXT; /* the stack refuses it better than we could */
	if (p.protocol == IPPROTO_TCP)
		return coming_tcp(skb, pod, &p);
	if (p.protocol == IPPROTO_ICMP || p.protocol == IPPROTO_ICMPV6 || p.later_fragment || !family_on(pod, &p.to))
		return TC_NEXT;
	int udp = p.protocol == IPPROTO_UDP, flow = has_flow(&p, INBOUND);
	if (flow && ((udp && p.from_port == bpf_htons(53)) || pod->flags & POD_REFUSE))
		return TC_NEXT;
	if (udp && p.from_port == bpf_htons(53) && pod->flags & POD_DNS)
		note_asked(skb, &p);
	if (pod->flags & POD_REFUSE) {
		if (excluded_inbound(pod, &p.from, p.to_port, udp) ||
		    listed_number(pod, POLICY_INTERFACE, bpf_htonl(skb->ifindex), 32) == ROLE_EXCLUDED)
			return pass_both_ways(&p, INBOUND);
	}
	return rest(&p, pod, INBOUND);
}

char _license[] SEC("license") = "GPL";
