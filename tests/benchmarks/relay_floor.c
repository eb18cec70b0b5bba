/* The floor of servers that talk to more than one peer: an epoll loop in C that does little but system calls.
 *
 *     relay_floor forward UPSTREAM_PORT     forwards each connection to that port, and reads 64 KiB at once
 *     relay_floor forward-256 UPSTREAM_PORT     the same, and reads 256 KiB at once
 *     relay_floor publish 0                 sends each line to all subscribers; a line that begins with "s" subscribes
 *
 * Prints its port.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { INPUT_BYTES = 262144, EVENTS_MAX = 512, QUEUE = 1024, SUBSCRIBERS_MAX = 4096, FILES_MAX = 65536 };

struct side {
    int fd, ended, place;
    struct side *other;   /* of a forwarded connection */
    char *unsent;         /* bytes that the kernel has not taken; the other side is not read meanwhile */
    size_t from, to;
};

static int poller, upstream_port, subscriber_count;
static struct side *subscribers[SUBSCRIBERS_MAX], *freed[FILES_MAX];
static int freed_count;
static char input[INPUT_BYTES];
static size_t read_bytes = 65536;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void watch(struct side *side, unsigned events, int how) {
    struct epoll_event event = {.events = events, .data.ptr = side};
    if (epoll_ctl(poller, how, side->fd, &event) < 0) fail("epoll_ctl");
}

static struct side *begin(int fd) {
    int one = 1;
    struct side *side = calloc(1, sizeof *side);
    side->fd = fd, side->place = -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    watch(side, EPOLLIN, EPOLL_CTL_ADD);
    return side;
}

static void end(struct side *side) {
    if (!side || side->fd < 0) return;
    close(side->fd);
    side->fd = -1;
    if (side->place >= 0) {
        subscribers[side->place] = subscribers[--subscriber_count];
        subscribers[side->place]->place = side->place;
    }
    freed[freed_count++] = side; /* this pass may have an event for it */
    end(side->other);
}

static void forward(struct side *from) {
    struct side *to = from->other;
    ssize_t got = recv(from->fd, input, read_bytes, 0), sent;
    if (got < 0 && errno == EAGAIN) return;
    if (got < 0) return end(from);
    if (got == 0) {
        from->ended = 1;
        shutdown(to->fd, SHUT_WR);
        watch(from, 0, EPOLL_CTL_MOD);
        if (to->ended) end(from);
        return;
    }
    sent = send(to->fd, input, got, MSG_NOSIGNAL);
    if (sent == got) return;
    if (sent < 0 && errno != EAGAIN) return end(from);
    if (sent < 0) sent = 0;
    if (!to->unsent) to->unsent = malloc(INPUT_BYTES);
    memcpy(to->unsent, input + sent, got - sent);
    to->from = 0, to->to = got - sent;
    watch(from, to->to - to->from && from->to > from->from ? EPOLLOUT : 0, EPOLL_CTL_MOD);
    watch(to, EPOLLOUT | (to->ended || from->to > from->from ? 0 : EPOLLIN), EPOLL_CTL_MOD);
}

static void flush(struct side *side) {
    struct side *other = side->other;
    ssize_t sent = send(side->fd, side->unsent + side->from, side->to - side->from, MSG_NOSIGNAL);
    if (sent < 0 && errno == EAGAIN) return;
    if (sent < 0) return end(side);
    side->from += sent;
    if (side->from < side->to) return;
    watch(side, side->ended || other->to > other->from ? 0 : EPOLLIN, EPOLL_CTL_MOD);
    watch(other, (other->ended ? 0 : EPOLLIN) | (other->to > other->from ? EPOLLOUT : 0), EPOLL_CTL_MOD);
}

/* All that has come is one line, or some lines of a publisher: the load sends nothing else. */
static void publish(struct side *side) {
    ssize_t got = recv(side->fd, input, sizeof input, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) return end(side);
    if (*input == 's') {
        if (side->place < 0 && subscriber_count < SUBSCRIBERS_MAX) {
            side->place = subscriber_count;
            subscribers[subscriber_count++] = side;
        }
        send(side->fd, input, got, MSG_NOSIGNAL);
        return;
    }
    for (int i = 0; i < subscriber_count; i++) send(subscribers[i]->fd, input, got, MSG_NOSIGNAL);
}

static void on_connection(int listener) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(upstream_port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        struct side *near = begin(fd);
        if (!upstream_port) continue;
        int upstream = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        if (connect(upstream, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) fail("connect");
        near->other = begin(upstream);
        near->other->other = near;
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "relay_floor: forward|forward-256|publish PORT\n"), 2;
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t length = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    upstream_port = atoi(argv[2]);
    if (!strcmp(argv[1], "forward-256")) read_bytes = sizeof input;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0) fail("bind");
    if (listen(listener, QUEUE) < 0) fail("listen");
    getsockname(listener, (struct sockaddr *)&address, &length);
    printf("%d\n", ntohs(address.sin_port)), fflush(stdout);
    poller = epoll_create1(0);
    struct epoll_event listening = {.events = EPOLLIN};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &listening) < 0) fail("epoll_ctl");
    for (struct epoll_event events[EVENTS_MAX];;) {
        int count = epoll_wait(poller, events, EVENTS_MAX, -1);
        for (int i = 0; i < count; i++) {
            struct side *side = events[i].data.ptr;
            if (!side) on_connection(listener);
            else if (side->fd < 0) continue;
            else if (!upstream_port) publish(side);
            else {
                if (events[i].events & EPOLLOUT) flush(side);
                if (side->fd >= 0 && events[i].events & ~EPOLLOUT && side->other->to == side->other->from) forward(side);
            }
        }
        while (freed_count) {
            struct side *side = freed[--freed_count];
            free(side->unsent), free(side);
        }
    }
}
