/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Iterators over the storage of sockets: they see the sockets with an account alone. */
#include "live.h"

SEC("iter/bpf_sk_storage_map") int refresh(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	return refresh_socket(ctx->sk);
}

SEC("iter/bpf_sk_storage_map") int list(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	return list_socket(ctx->meta, ctx->sk);
}

SEC("iter/bpf_sk_storage_map") int known(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	return known_socket(ctx->meta, ctx->sk);
}

char _license[] SEC("license") = "GPL";
