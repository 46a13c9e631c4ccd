/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What is read of the kernel's own structures; libbpf finds where their members are when it loads a program (CO-RE). */
#ifndef SLUICE_KERNEL_H
#define SLUICE_KERNEL_H

#include <linux/types.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct sock_common {
	unsigned short skc_family;
	volatile unsigned char skc_state;
	unsigned long skc_flags;
};

typedef struct {
	unsigned int val;
} kuid_t;

struct sock {
	struct sock_common __sk_common;
	int sk_err;
	int sk_rx_dst_ifindex;
	__u32 sk_mark;
	kuid_t sk_uid;
};

struct inet_sock {
	struct sock sk;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 rcv_nxt, snd_una, write_seq, srtt_us, segs_in, segs_out, total_retrans;
	__u64 bytes_acked, bytes_received;
};

struct kernfs_node {
	__u64 id;
};

struct cgroup {
	struct kernfs_node *kn;
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct task_struct {
	unsigned int flags;
	int tgid;
	struct task_struct *real_parent;
	struct css_set *cgroups;
	char comm[16];
};

struct seq_file;
struct bpf_map;

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct bpf_map *map;
	struct sock *sk;
	void *value;
};

struct file;

struct socket {
	struct sock *sk;
};

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
};

#pragma clang attribute pop

enum { /* include/net/tcp_states.h */
	TCP_ESTABLISHED = 1,
	TCP_SYN_SENT,
	TCP_SYN_RECV,
	TCP_FIN_WAIT1,
	TCP_FIN_WAIT2,
	TCP_TIME_WAIT,
	TCP_CLOSE,
	TCP_CLOSE_WAIT,
	TCP_LAST_ACK,
	TCP_LISTEN,
	TCP_CLOSING,
};

#define PF_FORKNOEXEC 0x40 /* linux/sched.h: forked, and no program was executed since */
#define SOCK_DONE 1 /* bit of skc_flags: the peer's FIN has come (net/sock.h, enum sock_flags; tcp_fin sets it) */

#endif
