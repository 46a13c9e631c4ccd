/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The iterators of live.bpf.c for kernels that refuse those over a map: they see the open files of all processes instead.
 *
 * A socket that no process has open is not seen: one that is not accepted yet, or one that is closed and still sends.
 */
#include "live.h"

static __always_inline struct sock *socket_of(struct bpf_iter__task_file *ctx)
{
	struct file *file = ctx->file;
	struct socket *socket = file ? bpf_sock_from_file(file) : NULL;
	return socket ? socket->sk : NULL;
}

SEC("iter/task_file") int refresh(struct bpf_iter__task_file *ctx)
{
	return refresh_socket(socket_of(ctx));
}

SEC("iter/task_file") int list(struct bpf_iter__task_file *ctx)
{
	return list_socket(ctx->meta, socket_of(ctx));
}

SEC("iter/task_file") int known(struct bpf_iter__task_file *ctx)
{
	return known_socket(ctx->meta, socket_of(ctx));
}

char _license[] SEC("license") = "GPL";
