/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What is to become of a connection or a query: the rules, in the order of the NAT chains of the other backends. */
#ifndef SLUICE_POD_H
#define SLUICE_POD_H

#include "kernel.h"
#include "pod_maps.h"

#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ICMPV6 58
#define AF_INET 2
#define AF_INET6 10
#define MAPPED bpf_htonl(0xffff)

/* The fields of contexts and sockets are read and written one by one: clang would merge neighbours, which the verifier refuses. */
#define FIELD(place) (*(volatile __typeof__(place) *)&(place))

enum verdict { PASS, TO_ZTUNNEL, TO_INBOUND, TO_DNS };

static __always_inline void count(__u32 cause)
{
	__u64 *found = bpf_map_lookup_elem(&exits, &cause);
	if (found)
		(*found)++;
}

/* By map ztunnels. A worker of ztunnel's is a child of the process there, and has executed no other program. */
static __always_inline int called_by_ztunnel(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct ztunnel who = {.cgroup = task->cgroups->dfl_cgrp->kn->id, .tgid = task->tgid};
	if (bpf_map_lookup_elem(&ztunnels, &who))
		return 1;
	who.tgid = 0;
	if (bpf_map_lookup_elem(&ztunnels, &who))
		return 1;
	who.tgid = task->real_parent->tgid;
	return task->flags & PF_FORKNOEXEC && bpf_map_lookup_elem(&ztunnels, &who) != NULL;
}

static __always_inline struct address address4(__u32 ip)
{
	/* Else clang makes one load of this one and its IPv6 neighbour, through a pointer that the verifier refuses. */
	asm volatile("" : "+r"(ip));
	return (struct address){{0, 0, MAPPED, ip}};
}

static __always_inline int is_ipv4(const struct address *a)
{
	return a->word[2] == MAPPED && !a->word[0] && !a->word[1];
}

static __always_inline int same(const struct address *a, const struct address *b)
{
	return a->word[3] == b->word[3] && a->word[2] == b->word[2] && a->word[1] == b->word[1] && a->word[0] == b->word[0];
}

/* 127.0.0.0/8, ::1, and 0.0.0.0 and ::, by which a connect means them. */
static __always_inline int is_loopback(const struct address *a)
{
	if (is_ipv4(a))
		return (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) || !a->word[3];
	return !a->word[0] && !a->word[1] && !a->word[2] && (a->word[3] == bpf_htonl(1) || !a->word[3]);
}

/* fe80::/10 */
static __always_inline int is_link_local(const struct address *a)
{
	return (a->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* The one address that is loopback to the rules on DNS over TCP. */
static __always_inline int is_localhost(const struct address *a)
{
	if (is_ipv4(a))
		return a->word[3] == bpf_htonl(0x7f000001);
	return !a->word[0] && !a->word[1] && !a->word[2] && a->word[3] == bpf_htonl(1);
}

/* The verdict of the longest prefix that fits, or none. */
static __always_inline __u32 listed(const struct pod *pod, __u32 kind, const struct address *value, __u32 bits, __u32 none)
{
	if (!(pod->has & (1 << kind)))
		return none;
	struct policy_key key = {.prefix = 96 + bits, .kind = kind, .policy = pod->policy, .value = *value};
	struct policy_value *found = bpf_map_lookup_elem(&policies, &key);
	return found ? found->verdict : none;
}

static __always_inline __u32 listed_number(const struct pod *pod, __u32 kind, __u32 word, __u32 bits)
{
	struct address value = {{word, 0, 0, 0}};
	return listed(pod, kind, &value, bits, 0);
}

static __always_inline __u32 listed_port(const struct pod *pod, __u32 kind, __u16 port)
{
	return listed_number(pod, kind, bpf_htonl((__u32)bpf_ntohs(port) << 16), 16);
}

static __always_inline int family_on(const struct pod *pod, const struct address *a)
{
	return pod->flags & (is_ipv4(a) ? POD_IPV4 : POD_IPV6);
}

static __always_inline int is_own(const struct pod *pod, const struct address *a)
{
	if (is_ipv4(a) ? same(a, &pod->own4) : same(a, &pod->own6) || same(a, &pod->link6))
		return 1;
	return listed(pod, POLICY_OWN, a, 128, 0);
}

static __always_inline int is_probe(const struct pod *pod, const struct address *a)
{
	return same(a, is_ipv4(a) ? &pod->probe4 : &pod->probe6);
}

static __always_inline int is_resolver(const struct pod *pod, const struct address *a)
{
	return !(pod->has & (1 << POLICY_RESOLVER)) || listed(pod, POLICY_RESOLVER, a, 128, 0);
}

/* 0, or why what goes there is excluded. `ports`: the protocol has ports that exclusions are meant for. */
static __always_inline __u32 excluded_outbound(const struct pod *pod, const struct address *to, __u16 port, __u32 user, int ports)
{
	if (listed(pod, POLICY_ROUTE, to, 128, 0))
		return EXIT_EXCLUDED_INTERFACE;
	if (listed_number(pod, POLICY_USER, bpf_htonl(user), 32))
		return EXIT_EXCLUDED_USER;
	if (listed(pod, POLICY_TO, to, 128, 0))
		return EXIT_EXCLUDED_NETWORK;
	if (ports && listed_port(pod, POLICY_PORT_OUT, port))
		return EXIT_EXCLUDED_PORT;
	return 0;
}

static __always_inline __u32 excluded_inbound(const struct pod *pod, const struct address *from, __u16 port, int ports)
{
	if (listed(pod, POLICY_FROM, from, 128, 0))
		return EXIT_EXCLUDED_NETWORK;
	if (ports && listed_port(pod, POLICY_PORT_IN, port))
		return EXIT_EXCLUDED_PORT;
	return 0;
}

struct answer {
	enum verdict verdict;
	__u32 cause;
};

#define ANSWER(v, c) ((struct answer){.verdict = v, .cause = c})

/* What an application of the pod begins, TCP or UDP. The order is that of ISTIO_OUTPUT in nat. */
static __always_inline struct answer outbound(const struct pod *pod, __u8 protocol, const struct address *to, __u16 port, __u32 user)
{
	int tcp = protocol == IPPROTO_TCP, dns = port == bpf_htons(53) && pod->flags & POD_DNS;
	if (!family_on(pod, to))
		return ANSWER(PASS, EXIT_FAMILY);
	__u32 excluded = excluded_outbound(pod, to, port, user, 1);
	if (excluded)
		return ANSWER(PASS, excluded);
	if (tcp && is_probe(pod, to))
		return ANSWER(PASS, EXIT_PROBE);
	/* 127.0.0.2 and the pod's own address, asked by TCP, are captured as they are by the rules. */
	if (dns && tcp && (pod->has & (1 << POLICY_RESOLVER) ? is_resolver(pod, to) : !is_localhost(to)))
		return ANSWER(TO_DNS, EXIT_CAPTURED_DNS);
	if (is_loopback(to) || is_own(pod, to))
		return ANSWER(PASS, EXIT_LOOPBACK);
	if (dns && !tcp && is_resolver(pod, to))
		return ANSWER(TO_DNS, EXIT_CAPTURED_DNS);
	/* Only its interface makes it an address, which ztunnel does not know: no process could connect there. */
	if (tcp && is_link_local(to))
		return ANSWER(PASS, EXIT_EXCLUDED_NETWORK);
	return tcp ? ANSWER(TO_ZTUNNEL, EXIT_CAPTURED_OUTBOUND) : ANSWER(PASS, EXIT_NOT_TCP);
}

/* A TCP connection that comes in by an interface other than lo. The order is that of ISTIO_PRERT in nat. */
static __always_inline struct answer inbound(const struct pod *pod, __u32 interface, const struct address *from,
					     const struct address *to, __u16 port)
{
	__u32 excluded, role = listed_number(pod, POLICY_INTERFACE, bpf_htonl(interface), 32);
	if (role == ROLE_EXCLUDED)
		return ANSWER(PASS, EXIT_EXCLUDED_INTERFACE);
	if (!family_on(pod, to))
		return ANSWER(PASS, EXIT_FAMILY);
	if (role == ROLE_VIRTUAL) {
		if (listed(pod, POLICY_TO, to, 128, 0))
			return ANSWER(PASS, EXIT_EXCLUDED_NETWORK);
		if (listed_port(pod, POLICY_PORT_OUT, port))
			return ANSWER(PASS, EXIT_EXCLUDED_PORT);
		return ANSWER(TO_ZTUNNEL, EXIT_CAPTURED_VIRTUAL);
	}
	if (pod->flags & POD_INGRESS_ONLY)
		return ANSWER(PASS, EXIT_INGRESS_ONLY);
	if (is_probe(pod, from))
		return ANSWER(PASS, EXIT_PROBE);
	excluded = excluded_inbound(pod, from, port, 1);
	if (excluded)
		return ANSWER(PASS, excluded);
	if (port == bpf_htons(HBONE_PORT) && !(pod->flags & POD_NO_HBONE))
		return ANSWER(PASS, EXIT_HBONE);
	return ANSWER(TO_INBOUND, EXIT_CAPTURED_INBOUND);
}

#endif
