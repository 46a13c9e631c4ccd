/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* How a connection becomes a record, and records become totals: what the programs that account share. */
#ifndef SLUICE_ACCOUNTING_H
#define SLUICE_ACCOUNTING_H

#include "account_maps.h"
#include "kernel.h"
#include "pod.h"

#define ENDED (1ULL << 63) /* on what is counted of a connection: the iterator, which may be at it, counts no more */

static __always_inline void lose(__u32 cause)
{
	__u64 *found = bpf_map_lookup_elem(&losses, &cause);
	if (found)
		(*found)++;
}

static __always_inline struct share *share_of(__u64 pod, __u32 of)
{
	struct share_key key = {.pod = pod, .of = of};
	struct share none = {}, *found = bpf_map_lookup_elem(&shares, &key);
	if (found || !pod)
		return found;
	bpf_map_update_elem(&shares, &key, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&shares, &key);
}

/* Adds an entry to `map` on behalf of a pod, within its share. Returns whether there is no entry. */
static __always_inline int refused(void *map, const void *key, const void *value, __u64 pod, __u32 of)
{
	struct share *mine = share_of(pod, of), *most = share_of(0, of);
	int full = mine && most && most->taken && (__s64)mine->taken >= (__s64)most->taken;
	if (!full && !bpf_map_update_elem(map, key, value, BPF_NOEXIST)) {
		if (mine)
			__sync_fetch_and_add(&mine->taken, 1);
		return 0;
	}
	if (bpf_map_lookup_elem(map, key)) /* of another CPU at the same moment */
		return 0;
	if (mine)
		__sync_fetch_and_add(&mine->refused, 1);
	return 1;
}

static __always_inline void forget(const struct handshake *key)
{
	if (bpf_map_delete_elem(&begun, key))
		return;
	struct share *mine = share_of(key->pod, SHARE_HANDSHAKES);
	if (mine)
		__sync_fetch_and_sub(&mine->taken, 1);
}

static __always_inline struct sock *sock_of(struct tcp_sock *tp)
{
	return &tp->inet_conn.icsk_inet.sk;
}

/* What was acknowledged counts our SYN, where we connected, and our FIN. */
static __always_inline __u64 sent_by(const struct account *account, struct tcp_sock *tp, int state)
{
	__u64 bytes = tp->bytes_acked;
	if (account->direction == OUTBOUND && account->established && bytes)
		bytes--;
	int finished = state == TCP_FIN_WAIT2 || ((state == TCP_CLOSING || state == TCP_LAST_ACK) && tp->snd_una == tp->write_seq);
	return finished && bytes ? bytes - 1 : bytes;
}

static __always_inline __u64 received_by(struct tcp_sock *tp)
{
	__u64 bytes = tp->bytes_received;
	return sock_of(tp)->__sk_common.skc_flags & 1 << SOCK_DONE && bytes ? bytes - 1 : bytes;
}

/* The record of a connection as it is now. Where capture has changed its addresses, those that the application sees. */
static __always_inline void record_of(struct record *r, const struct account *account, struct tcp_sock *tp, const struct memory *memory,
				      int state)
{
	__builtin_memset(r, 0, sizeof(*r));
	r->local = account->local;
	r->remote = account->remote;
	r->remote_port = account->remote_port;
	if (memory && (memory->kind == MEMORY_ASKED || memory->kind == MEMORY_CLIENT)) {
		r->peer = account->remote;
		r->peer_port = account->remote_port;
		r->remote = memory->address;
		r->remote_port = memory->port;
		__u64 cookie = account->pod;
		struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
		if (pod && is_loopback(&r->local))
			r->local = is_ipv4(&r->local) ? pod->own4 : pod->own6;
	}
	r->local_port = account->local_port;
	r->pod = account->pod;
	r->socket = account->socket;
	r->opened = account->opened;
	r->sent = sent_by(account, tp, state);
	r->received = received_by(tp);
	r->segments_out = tp->segs_out;
	r->segments_in = tp->segs_in;
	r->retransmitted = tp->total_retrans;
	r->rtt = tp->srtt_us >> 3;
	r->user = account->user;
	r->process = account->process;
	__builtin_memcpy(r->command, account->command, sizeof(r->command));
	r->direction = account->direction;
	r->fate = account->fate;
	r->reason = account->reason;
	r->closer = account->closer;
	r->established = account->established != 0;
}

/* Undecided: it should be captured, and nothing shows yet whether it was.
 *
 * ztunnel's end is made before anything but the SYN is acknowledged; until then it may well be missing, for as long as
 * ztunnel's queue of connections to be accepted is full.
 */
static __always_inline __u32 fate_of(const struct account *account, struct tcp_sock *tp)
{
	if (account->fate)
		return account->fate;
	if (account->left)
		return FATE_LEAKED;
	int answered = *(volatile __u64 *)&tp->bytes_acked > 1 || *(volatile __u64 *)&tp->bytes_received;
	struct handshake key = account->handshake;
	struct begun *found = account->established ? bpf_map_lookup_elem(&begun, &key) : NULL;
	if (!found)
		return FATE_UNDECIDED;
	if (__sync_val_compare_and_swap(&found->reached, 1, 1)) /* a barrier: looked at after what has come */
		return FATE_CAPTURED;
	return answered ? FATE_LEAKED : FATE_UNDECIDED;
}

static __always_inline struct tally *added(void *map, const struct tally_key *key)
{
	struct tally none = {}, *found = bpf_map_lookup_elem(map, key);
	if (found)
		return found;
	bpf_map_update_elem(map, key, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(map, key);
}

static __always_inline struct tally *tally_for(const struct record *r)
{
	struct tally_key key = {
		.pod = r->pod,
		.remote = r->remote,
		.port = r->direction == OUTBOUND ? r->remote_port : r->local_port,
		.direction = r->direction,
		.fate = r->fate,
		.reason = r->reason,
	};
	struct tally none = {}, *found = bpf_map_lookup_elem(&tallies, &key);
	if (found)
		return found;
	if (!refused(&tallies, &key, &none, key.pod, SHARE_PEERS))
		return bpf_map_lookup_elem(&tallies, &key);
	lose(LOST_PEER);
	key.port = 0;
	__builtin_memset(&key.remote, 0, sizeof(key.remote));
	return added(&rest, &key);
}

static __always_inline __u32 bucket_of(__u64 value, const __u64 *bounds)
{
	__u32 bucket = 0;
#pragma unroll
	for (int i = 0; i < BOUNDS; i++)
		bucket += value > bounds[i];
	return bucket;
}

static const __u64 rtt_bounds[BOUNDS] = {100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 1000000};
static const __u64 duration_bounds[BOUNDS] = {10000,	50000,	  100000,    500000,	 1000000,    5000000,
					      10000000, 60000000, 300000000, 1800000000, 3600000000, 86400000000};

static __always_inline void add_quality(const struct record *r)
{
	struct quality_key key = {.pod = r->pod, .direction = r->direction};
	static const struct quality none;
	struct quality *q = bpf_map_lookup_elem(&qualities, &key);
	if (!q) {
		bpf_map_update_elem(&qualities, &key, &none, BPF_NOEXIST);
		q = bpf_map_lookup_elem(&qualities, &key);
	}
	if (!q)
		return;
	__u64 duration = (r->closed - r->opened) / 1000;
	__u32 bucket = bucket_of(r->rtt, rtt_bounds);
	if (r->rtt && bucket < BUCKETS) {
		__sync_fetch_and_add(&q->rtt[bucket], 1);
		__sync_fetch_and_add(&q->rtt_sum, r->rtt);
	}
	bucket = bucket_of(duration, duration_bounds);
	if (bucket < BUCKETS)
		__sync_fetch_and_add(&q->duration[bucket], 1);
	__sync_fetch_and_add(&q->duration_sum, duration);
	__sync_fetch_and_add(&q->retransmitted, r->retransmitted);
	__sync_fetch_and_add(&q->segments_out, r->segments_out);
	__sync_fetch_and_add(&q->segments_in, r->segments_in);
}

/* The reader is woken when a quarter of the buffer is full, not by one record alone: several CPUs may see the same
 * level. Otherwise it reads from time to time.
 */
static __always_inline void hand_over(const struct record *r)
{
	__u64 stride = (sizeof(*r) + 8 + 7) & ~7ULL;
	__u64 waiting = bpf_ringbuf_query(&records, BPF_RB_AVAIL_DATA), quarter = bpf_ringbuf_query(&records, BPF_RB_RING_SIZE) / 4;
	int wake = waiting >= quarter && waiting < quarter + 16 * stride;
	if (bpf_ringbuf_output(&records, (void *)r, sizeof(*r), wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP))
		lose(LOST_RECORD);
}

/* Reports a connection that has ended. `sent` and `received` are in no tally yet. */
static __always_inline void tell_ended(struct record *r, int opened, __u64 sent, __u64 received)
{
	struct tally *tally = tally_for(r);
	if (tally) {
		if (opened && r->established)
			__sync_fetch_and_add(&tally->opened, 1);
		__sync_fetch_and_add(r->established ? &tally->closed : &tally->failed, 1);
		__sync_fetch_and_add(&tally->sent, sent);
		__sync_fetch_and_add(&tally->received, received);
		if (opened)
			tally->socket = r->socket;
	}
	if (r->established)
		add_quality(r);
	hand_over(r);
}

static __always_inline void count_ztunnel(__u64 pod, __u32 direction)
{
	struct tally_key key = {.pod = pod, .direction = direction, .fate = FATE_EXEMPT, .reason = REASON_ZTUNNEL};
	struct tally *found = added(&rest, &key);
	if (found)
		__sync_fetch_and_add(&found->opened, 1);
}

#endif
