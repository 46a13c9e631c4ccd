/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Both ends of a connection, as its socket has them. */
#ifndef SLUICE_SOCKOPS_H
#define SLUICE_SOCKOPS_H

#include "pod.h"

/* Both fields hold a port in ways of their own: the remote one in network order, in the upper half of 32 bits. */
static __always_inline __u16 remote_port(struct bpf_sock_ops *ctx)
{
	return bpf_htons(bpf_ntohl(ctx->remote_port));
}

static __always_inline struct address local(struct bpf_sock_ops *ctx)
{
	if (FIELD(ctx->family) == AF_INET)
		return address4(FIELD(ctx->local_ip4));
	return (struct address){{FIELD(ctx->local_ip6[0]), FIELD(ctx->local_ip6[1]), FIELD(ctx->local_ip6[2]), FIELD(ctx->local_ip6[3])}};
}

static __always_inline struct address remote(struct bpf_sock_ops *ctx)
{
	if (FIELD(ctx->family) == AF_INET)
		return address4(FIELD(ctx->remote_ip4));
	return (struct address){{FIELD(ctx->remote_ip6[0]), FIELD(ctx->remote_ip6[1]), FIELD(ctx->remote_ip6[2]), FIELD(ctx->remote_ip6[3])}};
}

#endif
