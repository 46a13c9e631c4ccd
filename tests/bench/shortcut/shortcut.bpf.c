/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Both ends of IPv4 connections to port 15001 in one SOCKHASH; what one end sends goes into the other's queue. */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define PORT 15001
#define BY_STACK 777 /* bytes: a message of this size takes the usual way, as before the peer is known */

struct pair {
	__u32 local, remote, local_port, remote_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 1024);
	__type(key, struct pair);
	__type(value, __u64);
} peers SEC(".maps");

SEC("sockops") int established(struct bpf_sock_ops *ctx)
{
	struct pair key = {ctx->local_ip4, ctx->remote_ip4, ctx->local_port, bpf_ntohl(ctx->remote_port)};
	if (ctx->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	if (key.local_port == PORT || key.remote_port == PORT)
		bpf_sock_hash_update(ctx, &peers, &key, BPF_ANY);
	return 1;
}

SEC("sk_msg") int verdict(struct sk_msg_md *msg)
{
	struct pair key = {msg->remote_ip4, msg->local_ip4, bpf_ntohl(msg->remote_port), msg->local_port};
	if (msg->size != BY_STACK)
		bpf_msg_redirect_hash(msg, &peers, &key, BPF_F_INGRESS);
	return SK_PASS; /* without a peer by the stack: the helper's own answer would refuse the message */
}

char _license[] SEC("license") = "GPL";
