/* The floor: lines answered by an epoll loop in C, as little as this machine can do it with.
 *
 *     floor tcp|udp ANSWER_BYTES
 *
 * Prints its port. Echoes each line; with ANSWER_BYTES above 0 it answers each with so many bytes.
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

enum { INPUT_BYTES = 65536, EVENTS_MAX = 512, QUEUE = 1024 };

struct client {
    int fd;
    size_t held;    /* bytes of a line that has not ended */
    size_t unsent;  /* bytes of answers that the kernel has not taken */
    char *partial;
};

static int poller;
static long answer_bytes;
static char input[2 * INPUT_BYTES], *answer;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void watch(int fd, void *data, unsigned events, int how) {
    struct epoll_event event = {.events = events, .data.ptr = data};
    if (epoll_ctl(poller, how, fd, &event) < 0) fail("epoll_ctl");
}

static void end(struct client *client) {
    close(client->fd);
    free(client->partial);
    free(client);
}

static void flush(struct client *client) {
    while (client->unsent) {
        size_t left = (client->unsent - 1) % answer_bytes + 1; /* of the answer that is on its way */
        ssize_t sent = send(client->fd, answer + answer_bytes - left, left, MSG_NOSIGNAL);
        if (sent < 0) return watch(client->fd, client, EPOLLOUT, EPOLL_CTL_MOD);
        client->unsent -= sent;
    }
    watch(client->fd, client, EPOLLIN, EPOLL_CTL_MOD);
}

static void on_input(struct client *client) {
    if (client->held) memcpy(input, client->partial, client->held);
    ssize_t got = recv(client->fd, input + client->held, INPUT_BYTES, 0);
    if (got <= 0) {
        if (got < 0 && errno == EAGAIN) return;
        return end(client);
    }
    size_t have = client->held + got, lines = 0, whole = 0;
    for (char *at = input, *found; (found = memchr(at, '\n', input + have - at)); at = found + 1)
        lines++, whole = found + 1 - input;
    client->held = have - whole;
    if (client->held > INPUT_BYTES) return end(client);
    if (client->held) {
        client->partial = client->partial ? client->partial : malloc(INPUT_BYTES);
        memcpy(client->partial, input + whole, client->held);
    }
    if (answer_bytes && lines) {
        client->unsent += lines * answer_bytes;
        flush(client);
    } else if (whole && send(client->fd, input, whole, MSG_NOSIGNAL) != (ssize_t)whole) {
        end(client); /* who does not read his own lines is none of ours */
    }
}

static void on_connection(int listener) {
    int one = 1;
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        struct client *client = calloc(1, sizeof *client);
        client->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        watch(fd, client, EPOLLIN, EPOLL_CTL_ADD);
    }
}

static void echo_datagrams(int fd) {
    struct sockaddr_in peer;
    for (;;) {
        socklen_t length = sizeof peer;
        ssize_t got = recvfrom(fd, input, sizeof input, 0, (struct sockaddr *)&peer, &length);
        if (got >= 0) sendto(fd, input, got, 0, (struct sockaddr *)&peer, length);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "floor: tcp|udp ANSWER_BYTES\n"), 2;
    int is_udp = !strcmp(argv[1], "udp"), type = is_udp ? SOCK_DGRAM : SOCK_STREAM | SOCK_NONBLOCK;
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t length = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    answer_bytes = atol(argv[2]);
    if (answer_bytes) answer = memset(malloc(answer_bytes), 'x', answer_bytes), answer[answer_bytes - 1] = '\n';
    int listener = socket(AF_INET, type, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0) fail("bind");
    if (!is_udp && listen(listener, QUEUE) < 0) fail("listen");
    getsockname(listener, (struct sockaddr *)&address, &length);
    printf("%d\n", ntohs(address.sin_port)), fflush(stdout);
    if (is_udp) echo_datagrams(listener);
    poller = epoll_create1(0);
    watch(listener, NULL, EPOLLIN, EPOLL_CTL_ADD);
    for (struct epoll_event events[EVENTS_MAX];;) {
        int count = epoll_wait(poller, events, EVENTS_MAX, -1);
        for (int i = 0; i < count; i++) {
            struct client *client = events[i].data.ptr;
            if (!client) on_connection(listener);
            else if (events[i].events & EPOLLOUT) flush(client);
            else on_input(client);
        }
    }
}
