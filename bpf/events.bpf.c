/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Passes the stored destination of one end of a connection to its other end, in the same namespace, during the handshake. */
#include "socket.h"
#include "sockops.h"

static __always_inline void begun(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct memory *memory = remembered(sk);
	if (!memory || (memory->kind != MEMORY_ASKED && memory->kind != MEMORY_SPEAKS_AS))
		return;
	struct connection key = {
		.cookie = bpf_get_netns_cookie(ctx),
		.source = local(ctx),
		.destination = remote(ctx),
		.source_port = bpf_htons(ctx->local_port),
		.destination_port = remote_port(ctx),
	};
	struct memory given = *memory;
	given.kind = memory->kind == MEMORY_ASKED ? MEMORY_ORIGINAL : MEMORY_CLIENT;
	if (given.kind == MEMORY_CLIENT)
		given.port = key.source_port;
	if (bpf_map_update_elem(&handover, &key, &given, BPF_ANY)) {
		bpf_map_delete_elem(&handover, &key); /* of an earlier connection, at most */
		count(EXIT_HANDOVER_FAILED);
	}
}

static __always_inline void accepted(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	/* ztunnel asks for the destination at once, by SO_ORIGINAL_DST, and takes what was handed over (names.bpf.c). */
	if (ctx->local_port == OUTBOUND_PORT || ctx->local_port == DNS_PORT)
		return;
	struct address from = remote(ctx), to = local(ctx);
	if (!is_loopback(&from) && !is_loopback(&to) && !same(&from, &to))
		return; /* what we hand over always is within the pod */
	struct connection key = {
		.cookie = bpf_get_netns_cookie(ctx),
		.source = from,
		.destination = to,
		.source_port = remote_port(ctx),
		.destination_port = bpf_htons(ctx->local_port),
	};
	struct memory *given = bpf_map_lookup_elem(&handover, &key);
	if (given && remember(sk, given->kind, &given->address, given->port))
		bpf_map_delete_elem(&handover, &key);
}

/* Jiffies until the SYN is sent again: 25 to 250 ms. It is once, and then takes twice as long to fail. */
#define SOON 25

static __always_inline void first_timeout(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct memory *memory = remembered(sk);
	if (memory && memory->kind == MEMORY_SPEAKS_AS && memory->port == HASTY)
		ctx->reply = SOON;
}

SEC("sockops") int socket_events(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return 1;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		begun(ctx, sk);
	else if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		accepted(ctx, sk);
	else if (ctx->op == BPF_SOCK_OPS_TIMEOUT_INIT)
		first_timeout(ctx, sk);
	return 1;
}

char _license[] SEC("license") = "GPL";
