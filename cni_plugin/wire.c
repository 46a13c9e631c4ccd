/* SPDX-License-Identifier: Apache-2.0 */
#include "wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "deadline.h"

/* A connection to the agent, with its path for error messages and its deadline. */
struct link {
    int fd;
    const char *path;
    int64_t deadline;
    char *why;
};

static int broken(const struct link *link, const char *operation, const char *words)
{
    snprintf(link->why, MAX_WHY, "%s %s: %s", operation, link->path, words);
    return -1;
}

void frame_close(struct frame *frame, size_t size)
{
    uint32_t header = htonl((uint32_t)size);
    memcpy(frame->bytes, &header, sizeof header);
    frame->size = sizeof header + size;
}

/* When the backlog is full, a non-blocking connect() of a unix socket fails at once and cannot be polled. So
 * connect() blocks, bounded by the send timeout. Everything after it is non-blocking, with poll(). */
static int link_open(struct link *link)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int left = left_ms(link->deadline);
    if (left == 0)
        left = 1; /* zero would mean no timeout */
    struct timeval timeout = {.tv_sec = left / 1000, .tv_usec = left % 1000 * 1000};
    link->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (link->fd < 0)
        return broken(link, "socket for", strerror(errno));
    if (setsockopt(link->fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout))
        return broken(link, "set send timeout on", strerror(errno));
    memcpy(address.sun_path, link->path, strlen(link->path) + 1);
    while (connect(link->fd, (struct sockaddr *)&address, sizeof address)) {
        if (errno == EINTR && left_ms(link->deadline))
            continue;
        return broken(link, "connect", errno == EAGAIN ? "not accepted in time" : strerror(errno));
    }
    return 0;
}

static int wait_for(const struct link *link, short event, const char *operation)
{
    struct pollfd other = {.fd = link->fd, .events = event};
    int ready;
    do
        ready = poll(&other, 1, left_ms(link->deadline));
    while (ready < 0 && errno == EINTR);
    if (ready < 0)
        return broken(link, operation, strerror(errno));
    return ready ? 0 : broken(link, operation, "no answer in time");
}

/* Calls sendmsg() once; passes the descriptor `passed` unless it is negative. */
static ssize_t send_some(int fd, const void *bytes, size_t size, int passed)
{
    struct iovec part = {.iov_base = (void *)bytes, .iov_len = size};
    union {
        struct cmsghdr header; /* for alignment */
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (passed >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *rider = CMSG_FIRSTHDR(&message);
        rider->cmsg_level = SOL_SOCKET;
        rider->cmsg_type = SCM_RIGHTS;
        rider->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rider), &passed, sizeof passed);
    }
    return sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static int send_frame(const struct link *link, const struct frame *frame, int netns)
{
    size_t sent = 0;
    while (sent < frame->size) {
        if (wait_for(link, POLLOUT, "send to"))
            return -1;
        ssize_t count = send_some(link->fd, frame->bytes + sent, frame->size - sent, sent ? -1 : netns);
        if (count < 0 && errno != EAGAIN && errno != EINTR)
            return broken(link, "send to", strerror(errno));
        sent += count > 0 ? (size_t)count : 0;
    }
    return 0;
}

static int receive(const struct link *link, void *bytes, size_t size)
{
    size_t have = 0;
    while (have < size) {
        if (wait_for(link, POLLIN, "receive from"))
            return -1;
        ssize_t count = recv(link->fd, (char *)bytes + have, size - have, MSG_DONTWAIT);
        if (count == 0)
            return broken(link, "receive from", "connection closed before the end of the reply");
        if (count < 0 && errno != EAGAIN && errno != EINTR)
            return broken(link, "receive from", strerror(errno));
        have += count > 0 ? (size_t)count : 0;
    }
    return 0;
}

static ptrdiff_t exchange(const struct link *link, const struct frame *request, int netns, char *reply)
{
    uint32_t header;
    if (send_frame(link, request, netns) || receive(link, &header, sizeof header))
        return -1;
    size_t size = ntohl(header);
    if (size > MAX_REPLY)
        return broken(link, "receive from", "the reply is larger than the protocol allows");
    return receive(link, reply, size) ? -1 : (ptrdiff_t)size;
}

ptrdiff_t agent_ask(const char *path, const struct frame *request, int netns, int64_t deadline, char *reply,
                    char *why)
{
    struct link link = {.fd = -1, .path = path, .deadline = deadline, .why = why};
    ptrdiff_t size = link_open(&link) ? -1 : exchange(&link, request, netns, reply);
    if (link.fd >= 0)
        close(link.fd);
    return size;
}
