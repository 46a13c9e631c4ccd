/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Detects uncaptured connections that leave the pod, if rules capture: tcx egress on every interface but lo.
 *
 * A SYN that should have been captured and leaves is a leak: of a socket (its account then says so), or made by hand (packet
 * sockets bypass all rules), which no other program would see. Nothing is dropped. Loaded once for each pod.
 */
#include "packet.h"

#include "accounting.h"

#define TC_NEXT -1
#define SOCK_STREAM 1

const volatile __u64 own_cookie = 0;

/* Packets that were made by hand, so that one is counted once however often it is sent. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct flow);
	__type(value, __u32);
} crafted SEC(".maps");

static __always_inline void leaked(const struct packet *p, __u32 direction)
{
	struct flow flow = {
		.cookie = own_cookie,
		.remote = p->to,
		.local_port = p->from_port,
		.remote_port = p->to_port,
		.protocol = p->protocol,
	};
	struct record r = {
		.local = p->from,
		.remote = p->to,
		.pod = own_cookie,
		.opened = bpf_ktime_get_ns(),
		.user = ~0U,
		.local_port = p->from_port,
		.remote_port = p->to_port,
		.direction = direction,
		.fate = FATE_LEAKED,
		.reason = REASON_RAW,
		.how = HOW_UNKNOWN,
		.established = 1,
	};
	__u32 one = 1;
	if (bpf_map_update_elem(&crafted, &flow, &one, BPF_NOEXIST))
		return;
	r.closed = r.opened;
	struct tally *tally = tally_for(&r);
	if (tally) {
		__sync_fetch_and_add(&tally->opened, 1);
		__sync_fetch_and_add(&tally->closed, 1);
	}
	hand_over(&r);
}

SEC("tc") int watch(struct __sk_buff *skb)
{
	__u64 cookie = own_cookie;
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	struct packet p = {};
	if (!pod || goes_on(skb, pod, SYN) || skb->ingress_ifindex || !(pod->flags & POD_CAPTURED))
		return TC_NEXT;
	if (parse(skb, &p) <= 0 || p.protocol != IPPROTO_TCP || !(p.flags & SYN))
		return TC_NEXT;
	if (is_loopback(&p.to)) /* captured, of a socket bound to this interface while that has no local route: arrives nowhere */
		return TC_NEXT;
	struct bpf_sock *sk = skb->sk;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	int own = sk && sk->protocol == IPPROTO_TCP && sk->type == SOCK_STREAM;
	if (p.flags & ACK) {
		/* Answers of the kernel have no full socket. */
		if (sk && !own && inbound(pod, skb->ifindex, &p.to, &p.from, p.from_port).verdict != PASS)
			leaked(&p, INBOUND);
		return TC_NEXT;
	}
	struct account *account = own ? bpf_sk_storage_get(&accounts, sk, 0, 0) : NULL;
	if (account)
		account->left = account->owner == OWNER_APPLICATION;
	else if (!own && outbound(pod, IPPROTO_TCP, &p.to, p.to_port, ~0U).verdict != PASS)
		leaked(&p, OUTBOUND);
	return TC_NEXT;
}

char _license[] SEC("license") = "GPL";
