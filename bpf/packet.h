/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* A packet on its way through an interface, read as far as the decisions need. */
#ifndef SLUICE_PACKET_H
#define SLUICE_PACKET_H

#include "pod.h"

#define ETH_P_IP bpf_htons(0x0800)
#define ETH_P_IPV6 bpf_htons(0x86dd)
#define SYN 2
#define ACK 16
#define MOST_EXTENSIONS 4

struct packet {
	struct address from, to;
	__u16 from_port, to_port;
	__u32 bytes; /* from the IP header on */
	__u8 protocol, flags, later_fragment;
};

/* From the IP header on: not every interface has a header in front of it (tun, WireGuard). */
static __always_inline long load(struct __sk_buff *skb, __u32 at, void *to, __u32 size)
{
	return bpf_skb_load_bytes_relative(skb, at, to, size, BPF_HDR_START_NET);
}

static __always_inline int read_ports(struct __sk_buff *skb, __u32 at, struct packet *p)
{
	if (p->later_fragment || (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP))
		return 0;
	struct {
		__u16 from, to;
	} ports;
	if (load(skb, at, &ports, sizeof(ports)))
		return -1;
	p->from_port = ports.from;
	p->to_port = ports.to;
	return p->protocol == IPPROTO_TCP ? load(skb, at + 13, &p->flags, 1) : 0;
}

/* Options for every hop, routing, fragment, options for the destination. */
static __always_inline int is_extension(__u8 protocol)
{
	return protocol == 0 || protocol == 43 || protocol == 44 || protocol == 60;
}

/* Offset of the transport header; -1 also behind more extension headers than any sender needs: they could hide a SYN. */
static __always_inline int past_extensions(struct __sk_buff *skb, __u32 at, struct packet *p)
{
	for (int i = 0; i < MOST_EXTENSIONS; i++) {
		struct {
			__u8 next, length;
			__u16 fragment;
		} extension;
		if (!is_extension(p->protocol))
			return at;
		if (load(skb, at, &extension, sizeof(extension)))
			return -1;
		if (p->protocol == 44 && extension.fragment & bpf_htons(0xfff8))
			p->later_fragment = 1;
		at += p->protocol == 44 ? 8 : (extension.length + 1) * 8;
		p->protocol = extension.next;
		if (p->later_fragment)
			return at; /* no headers follow */
	}
	return is_extension(p->protocol) ? -1 : at;
}

/* 1: a packet that concerns us; 0: another protocol; -1: too short. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *p)
{
	int at = 0;
	if (skb->protocol == ETH_P_IP) {
		struct {
			__u8 length, service;
			__u16 total, id, fragment;
			__u8 ttl, protocol;
			__u16 sum;
			__u32 from, to;
		} ip;
		if (load(skb, at, &ip, sizeof(ip)))
			return -1;
		p->from = address4(ip.from);
		p->to = address4(ip.to);
		p->protocol = ip.protocol;
		p->bytes = bpf_ntohs(ip.total);
		p->later_fragment = (ip.fragment & bpf_htons(0x1fff)) != 0;
		at += (ip.length & 15) * 4;
	} else if (skb->protocol == ETH_P_IPV6) {
		struct {
			__u32 flow;
			__u16 length;
			__u8 next, hops;
			struct address from, to;
		} ip;
		if (load(skb, at, &ip, sizeof(ip)))
			return -1;
		p->from = ip.from;
		p->to = ip.to;
		p->protocol = ip.next;
		p->bytes = sizeof(ip) + bpf_ntohs(ip.length);
		at = past_extensions(skb, at + sizeof(ip), p);
		if (at < 0)
			return -1;
	} else {
		return 0;
	}
	return read_ports(skb, at, p) ? -1 : 1;
}

/* True for TCP without IP options or extension headers that begins nothing: most packets, recognised without a copy. */
static __always_inline int goes_on(struct __sk_buff *skb, const struct pod *pod, __u8 mask)
{
	__u8 *at = (void *)(long)skb->data + 14, *end = (void *)(long)skb->data_end;
	if (!(pod->flags & POD_ETHERNET))
		return 0;
	if (skb->protocol == ETH_P_IP) {
		if (at + 34 > end || at[0] != 0x45 || at[9] != IPPROTO_TCP || at[6] & 0x1f || at[7])
			return 0;
		return (at[33] & mask) != SYN;
	}
	if (skb->protocol != ETH_P_IPV6 || at + 54 > end || at[6] != IPPROTO_TCP)
		return 0;
	return (at[53] & mask) != SYN;
}

#endif
