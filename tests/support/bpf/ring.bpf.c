/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Records in a ring buffer when a test asks for them, and one that is held open for as long as it wants. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} hold SEC(".maps");

struct order {
	__u64 first; /* the number of the first record */
	__u32 count;
	__u32 kind;
};

struct record {
	__u64 number;
	__u32 half; /* 12 bytes of payload, so 4 of padding */
} __attribute__((packed));

struct longer {
	__u64 numbers[5];
};

enum { PLAIN, DISCARDED, LONGER };

static long write_one(__u32 n, struct order *order)
{
	if (order->kind == LONGER) {
		struct longer *longer = bpf_ringbuf_reserve(&ring, sizeof(*longer), 0);

		if (!longer)
			return 1;
		__builtin_memset(longer, 0, sizeof(*longer));
		bpf_ringbuf_submit(longer, 0);
	} else {
		struct record *record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);

		if (!record)
			return 1;
		record->number = order->first + n;
		record->half = (order->first + n) / 2;
		if (order->kind == DISCARDED)
			bpf_ringbuf_discard(record, 0);
		else
			bpf_ringbuf_submit(record, 0);
	}
	order->count++;
	return 0;
}

SEC("syscall")
int write_records(struct order *ctx)
{
	struct order order = {.first = ctx->first, .kind = ctx->kind};

	bpf_loop(ctx->count, write_one, &order, 0);
	return order.count;
}

static long held(__u32 index, void *unused)
{
	__u32 key = 0;
	volatile __u64 *value = bpf_map_lookup_elem(&hold, &key);

	return !value || !*value;
}

static long held_long(__u32 index, void *unused)
{
	bpf_loop(1 << 20, held, 0, 0);
	return held(0, 0);
}

SEC("syscall")
int write_slowly(struct order *order)
{
	struct record *record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);

	if (!record)
		return 0;
	record->number = order->first;
	bpf_loop(1 << 20, held_long, 0, 0);
	record->half = order->first / 2;
	bpf_ringbuf_submit(record, 0);
	return 1;
}

char LICENSE[] SEC("license") = "GPL";
