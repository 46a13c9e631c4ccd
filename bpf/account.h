/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the programs that account for connections and the agent both read: agent/flows/ebpf/account_abi.py, compared by BTF in the tests.
 *
 * As in abi.h: addresses are 16 bytes in network order, ports are in network order, no padding without a name. Times are
 * those of CLOCK_MONOTONIC, in nanoseconds. Bytes are of payload.
 */
#ifndef SLUICE_ACCOUNT_H
#define SLUICE_ACCOUNT_H

#include "abi.h"

enum fate {
	FATE_UNDECIDED,
	FATE_CAPTURED,
	FATE_EXEMPT,
	FATE_LEAKED,
};

enum reason {
	REASON_NONE,
	REASON_LOOPBACK,
	REASON_PROBE,
	REASON_EXCLUDED_NETWORK,
	REASON_EXCLUDED_PORT,
	REASON_EXCLUDED_USER,
	REASON_EXCLUDED_INTERFACE,
	REASON_FAMILY,
	REASON_INGRESS_ONLY,
	REASON_BEFORE,
	REASON_ZTUNNEL,
	REASON_RAW,
};

enum how {
	HOW_OPEN,
	HOW_FIN,
	HOW_RESET,
	HOW_TIMEOUT,
	HOW_REFUSED,
	HOW_UNREACHABLE,
	HOW_ABORTED,
	HOW_UNKNOWN,
};

enum closer {
	CLOSER_NONE,
	CLOSER_LOCAL,
	CLOSER_REMOTE,
};

enum owner {
	OWNER_APPLICATION,
	OWNER_ZTUNNEL,
};

enum reported {
	REPORTED_NOTHING,
	REPORTING, /* another CPU is about to */
	REPORTED_OPENED, /* its fate is known and counted */
};

/* Known to both ends of a connection, even if NAT has changed its addresses: the first sequence numbers. */
struct handshake {
	__u64 pod; /* netns cookie */
	__u32 client;
	__u32 server;
};

/* Where a connection of ztunnel's was to go. Value of map onward, key of map returns. */
struct destination {
	__u64 pod;
	struct address address;
	__u16 port;
	__u16 none[3];
};

/* Map returns. */
struct returns {
	__u64 first; /* when the present second began */
	__u64 refused; /* when there were too many in one second last; 0: never */
	__u32 count; /* in the present second */
	__u32 none;
};

/* In the storage of a socket. */
struct account {
	struct address local, remote;
	__u64 pod, socket; /* cookies */
	__u64 opened, established;
	__u64 sent, received; /* as counted in tallies already */
	struct handshake handshake;
	__u32 user, process;
	char command[16];
	__u32 reported;
	__u16 local_port, remote_port;
	__u8 direction, fate, reason, owner;
	__u8 closer; /* who sent the first FIN */
	__u8 left; /* its SYN has left the pod by an interface */
	__u8 none[2];
};

/* Of a connection, in ring buffer records when it has ended, from the iterator while it lives. */
struct record {
	struct address local, remote, peer; /* peer: the endpoint that the socket is really connected to; zero: as remote */
	__u64 pod, socket;
	__u64 opened, closed; /* closed: 0 while it lives */
	__u64 sent, received;
	__u32 segments_out, segments_in, retransmitted;
	__u32 rtt; /* microseconds, smoothed; 0: never measured */
	__u32 user, process;
	char command[16];
	__u16 local_port, remote_port, peer_port;
	__u8 direction, fate, reason, how, closer, established;
	__u32 none;
};

/* Map begun: connections of applications that ztunnel should accept. */
struct begun {
	__u32 reached; /* it did */
	__u32 late; /* the application's end has gone before that: map late has its record */
};

/* Map tallies. `port` is where the service listens. */
struct tally_key {
	__u64 pod;
	struct address remote;
	__u16 port;
	__u8 direction, fate, reason, none[3];
};

struct tally {
	__u64 opened, closed, failed;
	__u64 sent, received;
	__u64 socket; /* of the last one that was opened or failed */
};

struct quality_key {
	__u64 pod;
	__u32 direction;
	__u32 none;
};

enum buckets {
	BOUNDS = 12,
	BUCKETS,
};

/* Map qualities: of connections that have ended. Sums are in microseconds. */
struct quality {
	__u64 rtt[BUCKETS], rtt_sum;
	__u64 duration[BUCKETS], duration_sum;
	__u64 retransmitted, segments_out, segments_in;
};

/* Map shares: how much of a map that all pods share is taken by one, and what it found no room for since. Under pod 0: how
 * much one may take, 0 for all of it.
 */
enum shared {
	SHARE_PEERS, /* of map tallies */
	SHARE_HANDSHAKES, /* of map begun */
	SHARES,
};

struct share_key {
	__u64 pod;
	__u32 of; /* enum shared */
	__u32 none;
};

struct share {
	__u64 taken, refused;
};

/* Map losses. */
enum loss {
	LOST_RECORD, /* the ring buffer was full */
	LOST_CONNECTION, /* its socket could not be given storage: not accounted for */
	LOST_FATE, /* map begun, or the pod's share of it, was full: whether ztunnel accepted it will not be known */
	LOST_PEER, /* map tallies, or the pod's share of it, was full: counted without address and port */
	LOSSES,
};

#endif
