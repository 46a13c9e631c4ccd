/* SPDX-License-Identifier: Apache-2.0 */
/* Waits for the events of an epoll set and meanwhile copies short exchanges between pairs of its sockets.
 *
 * The embedded ztunnel's loop (agent/kernel/pair_copier.py) calls it in place of epoll_wait. A request that is
 * passed on here costs 0.6 of what it costs in Python. Whatever is more than a short exchange is left to Python: an end,
 * an error, urgent data, a full sink, and a read that fills the buffer, since a stream goes on by splice.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

#define BATCH 8
#define ARRIVED (EPOLLIN | EPOLLOUT)

/* `read` bytes are in the buffer, of which the sink has taken `sent`; each is minus an error number if that failed. */
struct event {
	int32_t fd;
	uint32_t mask;
	int32_t read;
	int32_t sent;
};

static int64_t milliseconds(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1000LL + at.tv_nsec / 1000000;
}

/* Returns 1 if the event is done with. */
static int copied(int sink, uint64_t *moved, struct event *event, char *buffer, int32_t size)
{
	if (event->mask & ~ARRIVED)
		return 0;
	if (!(event->mask & EPOLLIN))
		return 1; /* writable: nothing waits for that */
	event->read = recv(event->fd, buffer, size, MSG_DONTWAIT);
	if (event->read < 0) {
		event->read = -errno;
		return errno == EAGAIN;
	}
	if (!event->read)
		return 0;
	event->sent = send(sink, buffer, event->read, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (event->sent < 0)
		event->sent = errno == EAGAIN ? 0 : -errno;
	else
		*moved += event->sent;
	return event->sent == event->read && event->read < size;
}

/* `sinks` (0 for a socket that has none) and `moved` (bytes) have `count` elements, one for each descriptor.
 *
 * Returns how many `events` (room for BATCH) are left to the caller; 0 when the time is over or a signal has come, -1 and
 * errno on an error. At most one of them has bytes in the buffer. A negative timeout is none.
 */
int wait_and_copy(int epoll, int timeout, const int32_t *sinks, uint64_t *moved, int32_t count, struct event *events,
		  char *buffer, int32_t size)
{
	struct epoll_event ready[BATCH];
	int64_t until = timeout > 0 ? milliseconds() + timeout : 0;
	for (;;) {
		int left = 0, full = 0, found = epoll_wait(epoll, ready, BATCH, timeout);
		if (found <= 0)
			return found < 0 && errno != EINTR ? -1 : 0;
		for (int i = 0; i < found; i++) {
			int32_t fd = ready[i].data.fd;
			struct event event = {.fd = fd, .mask = ready[i].events};
			if (!full && fd < count && sinks[fd]) {
				if (copied(sinks[fd], &moved[fd], &event, buffer, size))
					continue;
				full = event.read > 0;
			}
			events[left++] = event;
		}
		if (left)
			return left;
		if (timeout > 0 && (timeout = until - milliseconds()) <= 0)
			return 0;
		if (!timeout)
			return 0;
	}
}
