/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Both ends of the benchmark of the data path: a listener that stands for ztunnel's end, and a client.
 *
 *   traffic listen MARK CPU ask|trust PORT...     says "ready" when it listens
 *   traffic connect CPU PID ADDRESS PORT COUNT    median ns until connected, and until answered; ns and CPU ns per connection
 *   traffic request CPU PID ADDRESS PORT COUNT    ns of a round trip: median, p99; CPU ns per round trip
 *   traffic stream  CPU PID ADDRESS PORT MBYTES   bytes per second, CPU ns per MB
 *   traffic ask     CPU PID ADDRESS PORT 1        where the listener says that the connection was going
 *
 * PID is the listener's: its CPU time counts too. What softirq does for them on loopback and veth is in the CPU time of
 * these processes, as the kernel is built without CONFIG_IRQ_TIME_ACCOUNTING: it runs when they leave the network stack.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SO_ORIGINAL_DST 80 /* linux/netfilter_ipv4.h, and at level IPv6 */
#define LISTENERS 8
#define MEGABYTE 1000000

static char buffer[1 << 18];

static void need(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "traffic: %s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static void stay_on(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	need(!sched_setaffinity(0, sizeof(set), &set), "sched_setaffinity");
}

static double clock_ns(clockid_t which)
{
	struct timespec at;
	need(!clock_gettime(which, &at), "clock_gettime");
	return at.tv_sec * 1e9 + at.tv_nsec;
}

static int listening(int mark, int port)
{
	int one = 1, none = 0, fd = socket(AF_INET6, SOCK_STREAM, 0);
	struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &none, sizeof(none));
	need(!mark || !setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)), "SO_MARK");
	need(!setsockopt(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, &one, sizeof(one)), "IPV6_TRANSPARENT");
	need(!bind(fd, (struct sockaddr *)&at, sizeof(at)) && !listen(fd, 1024), "listen");
	return fd;
}

/* As a ztunnel does once for each connection that it accepts. */
static void original(int fd, const struct sockaddr_in6 *from, struct sockaddr_in6 *to)
{
	socklen_t size = sizeof(*to);
	int level = IN6_IS_ADDR_V4MAPPED(&from->sin6_addr) ? SOL_IP : SOL_IPV6;
	need(!getsockopt(fd, level, SO_ORIGINAL_DST, to, &size), "SO_ORIGINAL_DST");
}

static int written(const struct sockaddr_in6 *to, char *out, int size)
{
	char text[INET6_ADDRSTRLEN];
	const void *at = to->sin6_family == AF_INET ? (void *)&((struct sockaddr_in *)to)->sin_addr : (void *)&to->sin6_addr;
	inet_ntop(to->sin6_family, at, text, sizeof(text));
	return snprintf(out, size, "%s %d", text, ntohs(to->sin6_port));
}

/* p: a request, answered by a byte. a: where to? Anything else is swallowed. */
static void serve(int fd, const struct sockaddr_in6 *to)
{
	ssize_t got;
	while ((got = read(fd, buffer, sizeof(buffer))) > 0) {
		if (buffer[0] == 'p')
			need(write(fd, "p", 1) == 1, "answer");
		else if (buffer[0] == 'a')
			need(write(fd, buffer, written(to, buffer, sizeof(buffer))) > 0, "answer");
	}
}

static void listen_on(int mark, int cpu, int ask, char **ports)
{
	struct pollfd all[LISTENERS];
	int count = 0;
	for (; ports[count] && count < LISTENERS; count++)
		all[count] = (struct pollfd){.fd = listening(mark, atoi(ports[count])), .events = POLLIN};
	stay_on(cpu);
	puts("ready");
	fflush(stdout);
	for (;;) {
		need(poll(all, count, -1) > 0, "poll");
		for (int i = 0; i < count; i++) {
			struct sockaddr_in6 from, to = {.sin6_family = AF_INET6};
			socklen_t size = sizeof(from);
			if (!(all[i].revents & POLLIN))
				continue;
			int fd = accept(all[i].fd, (struct sockaddr *)&from, &size), one = 1;
			need(fd >= 0, "accept");
			setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
			if (ask)
				original(fd, &from, &to);
			serve(fd, &to);
			close(fd);
		}
	}
}

struct target {
	struct sockaddr_storage address;
	socklen_t size;
	clockid_t listener;
};

static struct target target(const char *pid, const char *address, const char *port)
{
	struct target to = {0};
	struct sockaddr_in *v4 = (struct sockaddr_in *)&to.address;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&to.address;
	if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(atoi(port));
		to.size = sizeof(*v4);
	} else {
		need(inet_pton(AF_INET6, address, &v6->sin6_addr) == 1, "address");
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(atoi(port));
		to.size = sizeof(*v6);
	}
	need(!clock_getcpuclockid(atoi(pid), &to.listener), "CPU clock of the listener");
	return to;
}

static double spent(const struct target *to)
{
	return clock_ns(CLOCK_PROCESS_CPUTIME_ID) + clock_ns(to->listener);
}

static int connected(const struct target *to)
{
	int one = 1, fd = socket(to->address.ss_family, SOCK_STREAM, 0);
	need(fd >= 0, "socket");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	need(!connect(fd, (struct sockaddr *)&to->address, to->size), "connect");
	return fd;
}

static void request(int fd)
{
	char byte;
	need(write(fd, "p", 1) == 1 && read(fd, &byte, 1) == 1, "request");
}

/* Until the listener has closed its end: so each has all of its own cost, and the next one finds it idle. */
static void ended(int fd)
{
	char byte;
	shutdown(fd, SHUT_WR);
	need(!read(fd, &byte, 1), "end");
	close(fd);
}

static int ascending(const void *one, const void *other)
{
	double a = *(const double *)one, b = *(const double *)other;
	return (a > b) - (a < b);
}

static double quantile(double *values, int count, double part)
{
	qsort(values, count, sizeof(*values), ascending);
	return values[(int)((count - 1) * part)];
}

static void connects(const struct target *to, int count)
{
	double *until = calloc(count, sizeof(double)), *answered = calloc(count, sizeof(double));
	double cpu = spent(to), start = clock_ns(CLOCK_MONOTONIC);
	for (int i = 0; i < count; i++) {
		double before = clock_ns(CLOCK_MONOTONIC);
		int fd = connected(to);
		until[i] = clock_ns(CLOCK_MONOTONIC) - before;
		request(fd);
		answered[i] = clock_ns(CLOCK_MONOTONIC) - before;
		ended(fd);
	}
	double all = clock_ns(CLOCK_MONOTONIC) - start;
	cpu = spent(to) - cpu;
	printf("%f %f %f %f\n", quantile(until, count, .5), quantile(answered, count, .5), all / count, cpu / count);
}

static void requests(const struct target *to, int count)
{
	double *taken = calloc(count, sizeof(double)), cpu;
	int fd = connected(to);
	for (int i = 0; i < count / 10; i++)
		request(fd);
	cpu = spent(to);
	for (int i = 0; i < count; i++) {
		double before = clock_ns(CLOCK_MONOTONIC);
		request(fd);
		taken[i] = clock_ns(CLOCK_MONOTONIC) - before;
	}
	cpu = spent(to) - cpu;
	ended(fd);
	printf("%f %f %f\n", quantile(taken, count, .5), quantile(taken, count, .99), cpu / count);
}

static void stream(const struct target *to, int megabytes)
{
	int fd = connected(to);
	double left = (double)megabytes * MEGABYTE, cpu, start;
	memset(buffer, 'x', sizeof(buffer));
	request(fd);
	cpu = spent(to);
	start = clock_ns(CLOCK_MONOTONIC);
	while (left > 0) {
		ssize_t sent = write(fd, buffer, sizeof(buffer));
		need(sent > 0, "write");
		left -= sent;
	}
	ended(fd);
	double all = clock_ns(CLOCK_MONOTONIC) - start;
	printf("%f %f\n", megabytes * 1e9 * MEGABYTE / all, (spent(to) - cpu) / megabytes);
}

int main(int argc, char **argv)
{
	if (argc > 5 && !strcmp(argv[1], "listen")) {
		listen_on(strtol(argv[2], NULL, 0), atoi(argv[3]), !strcmp(argv[4], "ask"), argv + 5);
	} else if (argc == 7) {
		struct target to = target(argv[3], argv[4], argv[5]);
		stay_on(atoi(argv[2]));
		if (!strcmp(argv[1], "connect"))
			connects(&to, atoi(argv[6]));
		else if (!strcmp(argv[1], "request"))
			requests(&to, atoi(argv[6]));
		else if (!strcmp(argv[1], "stream"))
			stream(&to, atoi(argv[6]));
		else {
			int fd = connected(&to);
			need(write(fd, "a", 1) == 1, "ask");
			need(write(1, buffer, read(fd, buffer, sizeof(buffer))) > 0, "answer");
		}
		return 0;
	}
	fprintf(stderr, "usage: see the top of traffic.c\n");
	return 2;
}
