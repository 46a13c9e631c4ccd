/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the iterators do with each socket: count the bytes of live connections and those with a decided fate, list live
 * connections, or list the sockets with an account.
 *
 * An iterator runs when the agent reads it, at the same time as the programs that see connections end. The program that changes
 * a count first reports it.
 */
#ifndef SLUICE_LIVE_H
#define SLUICE_LIVE_H

#include "accounting.h"

/* For so long the kernel tries to complete what ztunnel has not accepted yet (tcp_synack_retries: 63 s). */
#define PATIENCE (75 * 1000000000ULL)

struct found {
	struct account *account;
	struct tcp_sock *tp;
	struct memory *memory;
};

static __always_inline int is_open(struct sock *sk, struct found *found)
{
	if (!sk)
		return 0;
	found->tp = bpf_skc_to_tcp_sock(sk);
	found->account = bpf_sk_storage_get(&accounts, sk, 0, 0);
	found->memory = bpf_sk_storage_get(&memories, sk, 0, 0);
	if (!found->tp || !found->account || !__sync_fetch_and_add(&found->account->established, 0)) /* a barrier */
		return 0;
	return found->account->owner == OWNER_APPLICATION && found->account->opened;
}

/* The bytes that are now counted by us. */
static __always_inline __u64 claim(__u64 *counted, __u64 now)
{
	__u64 before = *(volatile __u64 *)counted;
	if (now <= before || __sync_val_compare_and_swap(counted, before, now) != before)
		return 0;
	return now - before;
}

static __always_inline int refresh_socket(struct sock *sk)
{
	struct found found;
	struct record r;
	struct account *account;
	if (!is_open(sk, &found))
		return 0;
	account = found.account;
	__u32 fate = fate_of(account, found.tp);
	struct handshake key = account->handshake;
	if (fate == FATE_UNDECIDED && bpf_map_lookup_elem(&begun, &key)) {
		if (bpf_ktime_get_ns() - account->established < PATIENCE)
			return 0; /* it will show */
		fate = FATE_LEAKED; /* one that says nothing, and of which ztunnel knows nothing */
	}
	int first = __sync_val_compare_and_swap(&account->reported, REPORTED_NOTHING, REPORTING) == REPORTED_NOTHING;
	if (first) {
		if (fate)
			account->fate = fate;
		__sync_lock_test_and_set(&account->reported, REPORTED_OPENED);
	} else if (account->reported != REPORTED_OPENED || !account->opened) {
		return 0; /* another CPU is reporting it */
	}
	record_of(&r, account, found.tp, found.memory, found.tp->inet_conn.icsk_inet.sk.__sk_common.skc_state);
	struct tally *tally = tally_for(&r);
	if (!tally)
		return 0;
	if (first) {
		__sync_fetch_and_add(&tally->opened, 1);
		tally->socket = r.socket;
	}
	__u64 sent = claim(&account->sent, r.sent), received = claim(&account->received, r.received);
	if (sent)
		__sync_fetch_and_add(&tally->sent, sent);
	if (received)
		__sync_fetch_and_add(&tally->received, received);
	return 0;
}

static __always_inline int list_socket(struct bpf_iter_meta *meta, struct sock *sk)
{
	struct found found;
	struct record r;
	__u32 first = 0;
	__u64 *only = bpf_map_lookup_elem(&chosen, &first);
	if (!is_open(sk, &found) || (only && *only && *only != found.account->pod))
		return 0;
	record_of(&r, found.account, found.tp, found.memory, found.tp->inet_conn.icsk_inet.sk.__sk_common.skc_state);
	r.fate = fate_of(found.account, found.tp);
	bpf_seq_write(meta->seq, &r, sizeof(r));
	return 0;
}

/* The cookie of a socket that is counted already: one with an account, of the chosen pod, in any state; or one that ztunnel
 * listens with or has accepted, which never gets an account but is in `owners`.
 */
static __always_inline int known_socket(struct bpf_iter_meta *meta, struct sock *sk)
{
	__u32 first = 0;
	__u64 *only = bpf_map_lookup_elem(&chosen, &first);
	if (!sk)
		return 0;
	struct account *account = bpf_sk_storage_get(&accounts, sk, 0, 0);
	if (account ? only && *only && *only != account->pod : !bpf_sk_storage_get(&owners, sk, 0, 0))
		return 0;
	__u64 cookie = bpf_get_socket_cookie(sk);
	bpf_seq_write(meta->seq, &cookie, sizeof(cookie));
	return 0;
}

#endif
