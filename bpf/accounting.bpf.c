/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Accounting of every TCP connection of enrolled pods, at the application's own socket, for every backend.
 *
 * sockops on the root cgroup. ztunnel's end of the same connection proves that it was captured: both ends are in the pod's
 * namespace and share their first sequence numbers, which NAT does not change. ztunnel's process is known by its cgroup and
 * process id, never by a mark, which an application could set too.
 */
#include "accounting.h"
#include "sockops.h"

#define ECONNRESET 104
#define EPIPE 32
#define ECONNABORTED 103
#define ECONNREFUSED 111
#define ETIMEDOUT 110

/* By its mark, until the agent has met a ztunnel: there may be one of another agent, and what that carries is no leak. */
static __always_inline int seems_ztunnel(struct tcp_sock *tp)
{
	struct ztunnel unmet = {};
	return (sock_of(tp)->sk_mark & MARK_MASK) == ZTUNNEL_MARK && bpf_map_lookup_elem(&ztunnels, &unmet);
}

static __always_inline __u8 reason_for(__u32 cause)
{
	switch (cause) {
	case EXIT_LOOPBACK:
		return REASON_LOOPBACK;
	case EXIT_PROBE:
		return REASON_PROBE;
	case EXIT_EXCLUDED_NETWORK:
		return REASON_EXCLUDED_NETWORK;
	case EXIT_EXCLUDED_PORT:
		return REASON_EXCLUDED_PORT;
	case EXIT_EXCLUDED_USER:
		return REASON_EXCLUDED_USER;
	case EXIT_EXCLUDED_INTERFACE:
		return REASON_EXCLUDED_INTERFACE;
	case EXIT_FAMILY:
		return REASON_FAMILY;
	case EXIT_INGRESS_ONLY:
		return REASON_INGRESS_ONLY;
	}
	return REASON_NONE;
}

static __always_inline void exempt(struct account *account, __u8 reason)
{
	account->fate = FATE_EXEMPT;
	account->reason = reason;
}

/* Its account, with the facts of both directions; the kernel is asked to report its end. */
static __always_inline struct account *opened(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 pod, __u8 direction)
{
	struct account *account = bpf_sk_storage_get(&accounts, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!account) {
		lose(LOST_CONNECTION);
		return NULL;
	}
	__builtin_memset(account, 0, sizeof(*account)); /* a socket may be used for one connection after the other */
	account->pod = pod;
	account->direction = direction;
	account->opened = bpf_ktime_get_ns();
	account->socket = bpf_get_socket_cookie(ctx);
	account->local = local(ctx);
	account->remote = remote(ctx);
	account->local_port = bpf_htons(ctx->local_port);
	account->remote_port = remote_port(ctx);
	return account;
}

static __always_inline void follow(struct bpf_sock_ops *ctx)
{
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void connecting(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod, __u64 cookie)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	struct task_struct *task = bpf_get_current_task_btf();
	struct account *account = opened(ctx, sk, cookie, OUTBOUND);
	if (!account || !tp)
		return;
	if (called_by_ztunnel() || seems_ztunnel(tp)) {
		account->owner = OWNER_ZTUNNEL;
		return;
	}
	account->process = task->tgid;
	account->user = sock_of(tp)->sk_uid.val;
	bpf_probe_read_kernel_str(account->command, sizeof(account->command), task->comm);
	struct memory *memory = bpf_sk_storage_get(&memories, sk, 0, 0);
	struct address to = account->remote;
	__u16 port = account->remote_port;
	if (memory && memory->kind == MEMORY_ASKED) {
		to = memory->address;
		port = memory->port;
	}
	struct answer answer = outbound(pod, IPPROTO_TCP, &to, port, account->user);
	if (answer.verdict == PASS)
		exempt(account, reason_for(answer.cause));
	else if (!(pod->flags & POD_CAPTURED))
		exempt(account, REASON_BEFORE);
	follow(ctx);
}

/* Listening: what ztunnel accepts there will be its own. */
static __always_inline void listening(struct bpf_sock *sk)
{
	__u32 ztunnel = OWNER_ZTUNNEL;
	if (called_by_ztunnel())
		bpf_sk_storage_get(&owners, sk, &ztunnel, BPF_SK_STORAGE_GET_F_CREATE);
}

/* Last of all: from here on the iterator sees it, and takes as unknown what is neither decided nor in begun. */
static __always_inline void seen(struct account *account, __u64 established)
{
	__sync_lock_test_and_set(&account->established, established);
}

static __always_inline void connected(struct bpf_sock *sk, const struct pod *pod, __u64 cookie)
{
	struct account *account = bpf_sk_storage_get(&accounts, sk, 0, 0);
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	if (!account || !tp || account->established)
		return;
	struct handshake key = {.pod = cookie, .client = tp->snd_una, .server = tp->rcv_nxt};
	account->handshake = key;
	if (account->owner == OWNER_ZTUNNEL) {
		struct destination to = {.pod = cookie, .address = account->remote, .port = account->remote_port};
		__u32 one = 1;
		/* Rules are to let pass what has its mark: the process alone might also be an application. */
		if ((sock_of(tp)->sk_mark & MARK_MASK) == ZTUNNEL_MARK)
			bpf_map_update_elem(&onward, &key, &to, BPF_ANY);
		if (is_loopback(&account->remote) || is_own(pod, &account->remote))
			bpf_map_update_elem(&spoken, &key, &one, BPF_ANY);
		count_ztunnel(cookie, OUTBOUND);
		account->established = account->opened;
		return;
	}
	struct begun none = {};
	if (account->fate == FATE_UNDECIDED && refused(&begun, &key, &none, cookie, SHARE_HANDSHAKES))
		lose(LOST_FATE);
	seen(account, bpf_ktime_get_ns());
}

/* ztunnel has accepted what an application of this pod has begun. */
static __always_inline void reached(const struct handshake *key)
{
	struct begun *found = bpf_map_lookup_elem(&begun, key);
	if (!found)
		return;
	__sync_lock_test_and_set(&found->reached, 1); /* a barrier, too */
	if (!__sync_val_compare_and_swap(&found->late, 1, 2))
		return;
	struct record *r = bpf_map_lookup_elem(&late, key);
	if (r) {
		r->fate = FATE_CAPTURED;
		tell_ended(r, 1, r->sent, r->received);
	}
	bpf_map_delete_elem(&late, key);
	forget(key);
}

/* ztunnel has accepted a connection on `port`. If it is one of its own that was to go elsewhere, it would go in circles: a pod
 * that calls itself, however, is reached at its HBONE port by the same ztunnel.
 */
static __always_inline void came_back(const struct handshake *key, __u32 port)
{
	struct destination *own = bpf_map_lookup_elem(&onward, key);
	if (!own || own->port == bpf_htons(port))
		return;
	struct destination to = *own;
	__u64 now = bpf_ktime_get_ns();
	struct returns one = {.first = now, .count = 1}, *found = bpf_map_lookup_elem(&returns, &to);
	if (!found) {
		bpf_map_update_elem(&returns, &to, &one, BPF_ANY);
	} else if (now - found->first >= RETURNED_NS) {
		found->first = now;
		found->count = 1;
	} else if (__sync_fetch_and_add(&found->count, 1) + 1 >= RETURNS) {
		found->refused = now;
	}
}

/* The process that speaks for a client to the application is ztunnel, or the connection was not captured. */
static __always_inline void fate_inbound(struct account *account, const struct pod *pod, struct tcp_sock *tp,
					 const struct handshake *key)
{
	if (!bpf_map_delete_elem(&spoken, key)) {
		account->fate = FATE_CAPTURED;
		return;
	}
	if (is_loopback(&account->remote) || is_own(pod, &account->remote)) {
		exempt(account, REASON_LOOPBACK);
		return;
	}
	struct answer answer = inbound(pod, sock_of(tp)->sk_rx_dst_ifindex, &account->remote, &account->local, account->local_port);
	if (answer.verdict == PASS && answer.cause != EXIT_HBONE)
		exempt(account, reason_for(answer.cause));
	else if (!(pod->flags & POD_CAPTURED))
		exempt(account, REASON_BEFORE);
	else
		account->fate = FATE_LEAKED;
}

static __always_inline void accepted(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod, __u64 cookie)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	__u32 port = ctx->local_port;
	if (!tp)
		return;
	struct handshake key = {.pod = cookie, .client = tp->rcv_nxt, .server = tp->snd_una};
	/* The port decides only while ztunnel's listeners are not known: a process of the pod may listen there, too. */
	int owned = bpf_sk_storage_get(&owners, sk, 0, 0) != NULL, by_port = owned || !(pod->flags & POD_KNOWN);
	if (owned)
		came_back(&key, port);
	if (by_port && (port == OUTBOUND_PORT || port == DNS_PORT)) {
		reached(&key);
		return;
	}
	/* Where eBPF captures, what ztunnel accepts has the port that the client asked for. */
	if (owned || (by_port && (port == INBOUND_PORT || port == HBONE_PORT))) {
		count_ztunnel(cookie, INBOUND);
		return;
	}
	struct account *account = opened(ctx, sk, cookie, INBOUND);
	if (!account)
		return;
	account->user = ~0U;
	follow(ctx);
	fate_inbound(account, pod, tp, &key);
	seen(account, account->opened);
}

static __always_inline void ended_how(struct record *r, int old, int error)
{
	r->how = HOW_UNKNOWN;
	if (error == ECONNRESET || error == EPIPE) {
		r->how = HOW_RESET;
		r->closer = CLOSER_REMOTE;
	} else if (error == ECONNREFUSED) {
		r->how = HOW_REFUSED;
		r->closer = CLOSER_REMOTE;
	} else if (error == ETIMEDOUT) {
		r->how = HOW_TIMEOUT;
	} else if (error == ECONNABORTED) {
		r->how = HOW_ABORTED;
	} else if (error) {
		r->how = HOW_UNREACHABLE;
	} else if (old == TCP_SYN_SENT) {
		r->how = HOW_ABORTED;
		r->closer = CLOSER_LOCAL;
	} else if (old == TCP_FIN_WAIT2 || old == TCP_CLOSING || old == TCP_LAST_ACK) {
		r->how = HOW_FIN;
	} else {
		r->how = HOW_RESET;
		r->closer = CLOSER_LOCAL;
	}
}

static __always_inline void ended(struct bpf_sock *sk, struct account *account, int old)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	struct record r;
	if (!tp)
		return;
	int first = __sync_val_compare_and_swap(&account->reported, REPORTED_NOTHING, REPORTING) == REPORTED_NOTHING;
	if (!account->established && old != TCP_SYN_SENT && old != TCP_SYN_RECV)
		account->established = account->opened; /* while this program was not attached */
	record_of(&r, account, tp, bpf_sk_storage_get(&memories, sk, 0, 0), old);
	r.closed = bpf_ktime_get_ns();
	r.fate = fate_of(account, tp);
	ended_how(&r, old, sock_of(tp)->sk_err);
	struct handshake key = account->handshake;
	if (first && r.fate == FATE_UNDECIDED && r.established) {
		struct begun *found = bpf_map_lookup_elem(&begun, &key);
		/* ztunnel's end may be made at this moment: the first of both that finds the other reports. */
		if (found && !bpf_map_update_elem(&late, &key, &r, BPF_ANY)) {
			__sync_lock_test_and_set(&found->late, 1);
			if (found->reached && __sync_val_compare_and_swap(&found->late, 1, 2)) {
				bpf_map_delete_elem(&late, &key);
				r.fate = FATE_CAPTURED;
			} else {
				return;
			}
		}
	}
	__u64 sent = __sync_lock_test_and_set(&account->sent, r.sent | ENDED);
	__u64 received = __sync_lock_test_and_set(&account->received, r.received | ENDED);
	tell_ended(&r, first, r.sent - sent, r.received - received);
	if (account->fate == FATE_UNDECIDED && r.established)
		forget(&key);
}

static __always_inline void changed(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	int old = ctx->args[0], new = ctx->args[1];
	if (new != TCP_FIN_WAIT1 && new != TCP_CLOSE_WAIT && new != TCP_CLOSE)
		return;
	struct account *account = bpf_sk_storage_get(&accounts, sk, 0, 0);
	if (!account || account->owner != OWNER_APPLICATION || !account->opened)
		return;
	if (new == TCP_CLOSE) {
		ended(sk, account, old);
		account->opened = 0;
	} else if (!account->closer) {
		account->closer = new == TCP_FIN_WAIT1 ? CLOSER_LOCAL : CLOSER_REMOTE;
	}
}

SEC("sockops") int account_sockets(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__u32 op = ctx->op;
	if (!sk)
		return 1;
	if (op == BPF_SOCK_OPS_STATE_CB) {
		changed(ctx, sk);
		return 1;
	}
	if (op == BPF_SOCK_OPS_TCP_LISTEN_CB) {
		listening(sk);
		return 1;
	}
	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB &&
	    op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return 1;
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		connecting(ctx, sk, pod, cookie);
	else if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		connected(sk, pod, cookie);
	else
		accepted(ctx, sk, pod, cookie);
	return 1;
}

char _license[] SEC("license") = "GPL";
