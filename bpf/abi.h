/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the programs and the agent both read and write: agent/backends/ebpf/abi.py, compared by BTF in the tests.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d; ports are in network order too. No structure has
 * unnamed padding: the kernel compares keys byte by byte.
 */
#ifndef SLUICE_ABI_H
#define SLUICE_ABI_H

#include <linux/types.h>

struct address {
	__u32 word[4];
};

enum pod_flags {
	POD_IPV4 = 1 << 0, /* captured for IPv4 */
	POD_IPV6 = 1 << 1,
	POD_DNS = 1 << 2,
	POD_INGRESS_ONLY = 1 << 3, /* inbound is left alone, but from virtual interfaces */
	POD_REFUSE = 1 << 4, /* what is neither TCP nor captured DNS */
	POD_FORWARDS = 1 << 5, /* has more interfaces than one, and forwards between them */
	POD_LOOPBACK4 = 1 << 6, /* 127.0.0.1 is there */
	POD_ETHERNET = 1 << 7, /* all its interfaces have Ethernet headers */
	POD_CAPTURED = 1 << 8, /* to the programs that account: what should be captured is captured by now */
	POD_SINGLE = 1 << 9, /* has one interface besides lo */
	POD_NO_HBONE = 1 << 10, /* ztunnel does not listen on 15008: what comes in there is captured as all is */
	POD_KNOWN = 1 << 11, /* to the programs that account: ztunnel's listeners in it are in map owners */
};

/* What a policy may list. Prefixes of numbers stand in the first word, in network order. */
enum policy_kind {
	POLICY_OWN, /* addresses of the pod */
	POLICY_TO, /* networks that are excluded outbound */
	POLICY_FROM, /* and inbound */
	POLICY_PORT_OUT, /* ports, 16 bits */
	POLICY_PORT_IN,
	POLICY_USER, /* user ids, 32 bits */
	POLICY_RESOLVER, /* where DNS is captured, when not everywhere */
	POLICY_ROUTE, /* networks by route; the verdict says whether an excluded interface leads there */
	POLICY_INTERFACE, /* interface index, 32 bits; the verdict is an interface_role */
	POLICY_REACH, /* networks by route, where a family has no default route; the verdict says whether there is a way */
	POLICY_KINDS,
};

enum interface_role {
	ROLE_NONE,
	ROLE_VIRTUAL, /* what comes in by it counts as outbound */
	ROLE_EXCLUDED,
};

/* Map pods, by netns cookie. */
struct pod {
	__u32 flags;
	__u32 has; /* 1 << policy_kind: what its policy lists at all */
	__u64 policy; /* hash of what is listed; 0: nothing */
	struct address own4; /* all zero: none */
	struct address own6;
	struct address link6; /* its link-local address */
	struct address probe4;
	struct address probe6;
};

/* Map policies: longest prefix of (kind, policy, value). */
struct policy_key {
	__u32 prefix; /* bits of what follows */
	__u32 kind;
	__u64 policy;
	struct address value;
};

struct policy_value {
	__u32 verdict;
	__u32 prefix; /* of its key, to recognise an exact answer */
};

/* Map ztunnels: the processes with a trusted mark. tgid 0: any process of that cgroup; both 0, in the account: none has come yet. */
struct ztunnel {
	__u64 cgroup;
	__u32 tgid;
	__u32 none;
};

enum listener_role {
	LISTEN_OUTBOUND,
	LISTEN_INBOUND,
};

/* Map listeners: ztunnel's sockets, the newest in slot 0. */
struct listener {
	__u64 cookie;
	__u32 role;
	__u32 slot;
};

enum memory_kind {
	MEMORY_NONE,
	MEMORY_ASKED, /* an application's socket: where it wanted to go */
	MEMORY_ORIGINAL, /* in handover, then in the socket that ztunnel accepted: where the client wanted to go */
	MEMORY_SPEAKS_AS, /* ztunnel's socket towards the application: the client that it speaks for */
	MEMORY_CLIENT, /* the socket that the application accepted: the client */
	MEMORY_ZTUNNEL, /* ztunnel's socket, known by its process */
	MEMORY_USER, /* a socket of an excluded user, known when it connected */
};

/* In the storage of a socket, and in map handover. */
struct memory {
	struct address address;
	__u16 port;
	__u16 kind;
	__u32 substituted; /* with MEMORY_ORIGINAL: the client's socket has an address of loopback, and another is shown */
};

/* Map handover: of a connection that has been begun, by the addresses that its SYN carries. */
struct connection {
	__u64 cookie;
	struct address source;
	struct address destination;
	__u16 source_port;
	__u16 destination_port;
	__u32 none;
};

/* Map resolvers: which one a captured query was for. */
struct query {
	__u64 cookie;
	__u16 port; /* of the application's socket */
	__u8 protocol;
	__u8 none;
	__u32 source; /* the loopback address that it was given, where its socket asks several resolvers; else 0 */
};

struct resolver {
	struct address address;
	__u16 port;
	__u16 none[3];
};

/* Map flows: traffic that bypasses ztunnel in a pod that refuses the rest, or DNS that it asks around ztunnel.
 *
 * With `asked` a question that came to the pod from port 53; its value is the time in seconds since the boot.
 */
struct flow {
	__u64 cookie;
	struct address remote;
	__u16 local_port;
	__u16 remote_port;
	__u8 protocol;
	__u8 asked;
	__u8 none[2];
};

enum direction {
	OUTBOUND,
	INBOUND,
};

/* Map beside: traffic that is neither TCP nor captured DNS. */
struct non_tcp_key {
	__u64 cookie;
	__u32 direction;
	__u32 none;
};

struct traffic {
	__u64 packets;
	__u64 bytes;
};

/* Map exits: every way out of every program, counted. */
enum exit_cause {
	EXIT_CAPTURED_OUTBOUND,
	EXIT_CAPTURED_INBOUND,
	EXIT_CAPTURED_VIRTUAL,
	EXIT_CAPTURED_DNS,
	EXIT_ZTUNNEL, /* its own connection */
	EXIT_FORGED_MARK, /* ztunnel's mark on another process's socket: treated as without it */
	EXIT_LOOPBACK, /* within the pod */
	EXIT_PROBE,
	EXIT_HBONE,
	EXIT_FAMILY, /* not captured in this address family */
	EXIT_INGRESS_ONLY,
	EXIT_NOT_TCP,
	EXIT_EXCLUDED_NETWORK,
	EXIT_EXCLUDED_PORT,
	EXIT_EXCLUDED_USER,
	EXIT_EXCLUDED_INTERFACE,
	EXIT_SPEAKS_AS,
	EXIT_NO_LISTENER, /* refused: no ztunnel */
	EXIT_ASSIGN_FAILED, /* refused */
	EXIT_MEMORY_FAILED, /* refused: no storage for a socket */
	EXIT_HANDOVER_FAILED, /* ztunnel will not learn the destination, and refuses */
	EXIT_ESCAPE_REFUSED, /* a SYN on its way out that nothing has captured */
	EXIT_NOT_TCP_REFUSED,
	EXIT_INTERFACE_FAILED, /* refused: the socket is bound to an interface, and stays so */
	EXIT_MALFORMED, /* a packet too short to be read: dropped */
	EXIT_CAUSES,
};

enum fixed {
	OUTBOUND_PORT = 15001,
	INBOUND_PORT = 15006,
	HBONE_PORT = 15008,
	DNS_PORT = 15053,
	ZTUNNEL_MARK = 0x539,
	CONNECTION_MARK = 0x111,
	MARK_MASK = 0xfff,
	LISTENER_SLOTS = 2,
};

#endif
