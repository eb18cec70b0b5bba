/* The load of servers that talk to more than one peer: both ends of a forwarder, or a publisher and its subscribers.
 *
 *     relay lines|bulk PORT CONNECTIONS SECONDS LISTENER     LISTENER is the descriptor that the forwarder connects to
 *     relay publish PORT SUBSCRIBERS MESSAGES AT_ONCE
 *
 * `lines`: each client sends a line and waits for it; the far ends echo. `bulk`: all ends send as much as they can, and
 * throw away what comes; a request is a MB that has arrived. `publish`: each message is a line that goes to all
 * subscribers, with at most AT_ONCE messages on their way; a request is a line that a subscriber has got.
 * Prints "ready" when all are connected and warm, waits for a line, works, and prints what it came to.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#include "figures.h"

enum { LINE_BYTES = 64, BULK_BYTES = 1 << 18, EVENTS_MAX = 512, PATIENCE_MS = 20000 };
static const double WARM_SHARE = 0.15;

struct end {
    int fd;
    int is_far; /* this end was accepted from the forwarder */
    long got, sent;
    double sent_at;
};

static int poller, port, count, far_count, listener, source;
static long got, sent; /* bytes, by all ends */
static struct end *near, *far, publisher;
static char text[LINE_BYTES], scratch[1 << 20];

static void watch(struct end *end, unsigned events, int how) {
    int one = 1;
    struct epoll_event event = {.events = events, .data.ptr = end};
    if (how == EPOLL_CTL_ADD) setsockopt(end->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (epoll_ctl(poller, how, end->fd, &event) < 0) fail("epoll_ctl");
}

static int polled(struct epoll_event *events) {
    errno = 0;
    int ready = epoll_wait(poller, events, EVENTS_MAX, PATIENCE_MS);
    if (ready < 0) fail("epoll_wait");
    if (!ready) fail("waiting");
    return ready;
}

static void connect_to_server(struct end *end) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    end->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (end->fd < 0 || connect(end->fd, (struct sockaddr *)&address, sizeof address) < 0) fail("connect");
    if (fcntl(end->fd, F_SETFL, O_NONBLOCK) < 0) fail("fcntl");
    watch(end, EPOLLIN, EPOLL_CTL_ADD);
}

/* How many bytes have come; -1: none have. With MSG_TRUNC the kernel throws them away, and copies nothing. */
static long receive(struct end *end, int flags) {
    ssize_t size = recv(end->fd, scratch, sizeof scratch, MSG_DONTWAIT | flags);
    if (size < 0 && errno == EAGAIN) return -1;
    if (size <= 0) errno = size ? errno : ECONNRESET, fail("recv");
    end->got += size, got += size;
    return size;
}

static void send_line(struct end *end) {
    if (send(end->fd, text, LINE_BYTES, MSG_NOSIGNAL) != LINE_BYTES) fail("send");
    end->sent += LINE_BYTES, sent += LINE_BYTES;
    end->sent_at = now_s();
}

/* -- a forwarder's two ends -- */

static void echo(struct end *end) {
    long size = receive(end, 0);
    if (size > 0 && send(end->fd, scratch, size, MSG_NOSIGNAL) != size) fail("send back");
}

static long lines(double seconds) {
    struct epoll_event events[EVENTS_MAX];
    double over = now_s() + seconds;
    long done = 0;
    sample_count = 0;
    for (int i = 0; i < count; i++) send_line(&near[i]);
    for (int busy = count; busy;) {
        int ready = polled(events);
        double at = now_s();
        for (int i = 0; i < ready; i++) {
            struct end *end = events[i].data.ptr;
            if (end->is_far) {
                echo(end);
                continue;
            }
            if (receive(end, 0) < 0 || end->got < end->sent) continue;
            if (end->got > end->sent) errno = EPROTO, fail("more than was sent");
            sample(now_s() - end->sent_at);
            done++;
            if (at < over) send_line(end);
            else busy--;
        }
    }
    return done;
}

/* sendfile(2) from memory: the kernel copies nothing here, so the load takes less time than any server. */
static void send_bulk(struct end *end) {
    off_t offset = 0;
    ssize_t size = sendfile(end->fd, source, &offset, BULK_BYTES);
    if (size < 0 && errno != EAGAIN) fail("sendfile");
    if (size > 0) end->sent += size, sent += size;
}

static double bulk(double seconds) {
    struct epoll_event events[EVENTS_MAX];
    double over = now_s() + seconds;
    long before = got;
    int is_over = 0;
    for (int i = 0; i < count; i++)
        watch(&near[i], EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD), watch(&far[i], EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
    while (!is_over || got < sent) {
        int ready = polled(events);
        for (int i = 0; i < ready; i++) {
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(events[i].data.ptr, MSG_TRUNC);
            if (events[i].events & EPOLLOUT && !is_over) send_bulk(events[i].data.ptr);
        }
        if (is_over || now_s() < over) continue;
        is_over = 1;
        for (int i = 0; i < count; i++) watch(&near[i], EPOLLIN, EPOLL_CTL_MOD), watch(&far[i], EPOLLIN, EPOLL_CTL_MOD);
    }
    if (got > sent) errno = EPROTO, fail("more than was sent");
    return (got - before) / 1e6;
}

static void accept_far_end(void) {
    if (far_count == count) errno = EPROTO, fail("too many connections to the far end");
    struct end *end = &far[far_count++];
    if ((end->fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) < 0) fail("accept");
    end->is_far = 1;
    watch(end, EPOLLIN, EPOLL_CTL_ADD);
}

/* Connect through the forwarder, and have a line of each client echoed. */
static void connect_through(void) {
    struct epoll_event events[EVENTS_MAX], listening = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &listening) < 0) fail("epoll_ctl");
    for (int i = 0; i < count; i++) connect_to_server(&near[i]), send_line(&near[i]);
    for (int missing = count; missing;) {
        int ready = polled(events);
        for (int i = 0; i < ready; i++) {
            struct end *end = events[i].data.ptr;
            if (!end) accept_far_end();
            else if (end->is_far) echo(end);
            else if (receive(end, 0) > 0 && end->got == end->sent) missing--;
        }
    }
    for (int i = 0; i < count; i++) near[i].got = near[i].sent = far[i].got = far[i].sent = 0;
    got = sent = 0;
}

/* -- a publisher and its subscribers -- */

static long publish(long messages, int at_once) {
    struct epoll_event events[EVENTS_MAX];
    long published = 0, per_message = (long)count * LINE_BYTES;
    sample_count = 0;
    for (got = 0; got < messages * per_message;) {
        for (; published < messages && published * per_message < got + at_once * per_message; published++) {
            if (at_once == 1 && published) sample(now_s() - publisher.sent_at);
            send_line(&publisher);
        }
        int ready = polled(events);
        for (int i = 0; i < ready; i++) receive(events[i].data.ptr, 0);
    }
    if (got > messages * per_message) errno = EPROTO, fail("more than was published");
    return messages * count;
}

/* A line that begins with "s" subscribes, and is answered by itself. */
static void subscribe(void) {
    struct epoll_event events[EVENTS_MAX];
    text[0] = 's';
    for (int done = 0, batch; done < count; done += batch) {
        batch = count - done < 64 ? count - done : 64;
        for (int i = done; i < done + batch; i++) connect_to_server(&near[i]), send_line(&near[i]);
        while (got < sent) {
            int ready = polled(events);
            for (int i = 0; i < ready; i++) receive(events[i].data.ptr, 0);
        }
    }
    text[0] = 'x';
    connect_to_server(&publisher);
}

int main(int argc, char **argv) {
    if (argc != 6) return fprintf(stderr, "relay: five arguments, not %d\n", argc - 1), 2;
    int is_publish = !strcmp(argv[1], "publish"), is_bulk = !strcmp(argv[1], "bulk"), last = atoi(argv[5]);
    double amount = atof(argv[4]), requests;
    port = atoi(argv[2]), count = atoi(argv[3]), listener = last;
    poller = epoll_create1(0);
    near = calloc(count, sizeof *near), far = calloc(count, sizeof *far);
    memset(text, 'x', sizeof text), text[LINE_BYTES - 1] = '\n';
    source = memfd_create("bulk", 0);
    memset(scratch, 'x', sizeof scratch);
    if (write(source, scratch, BULK_BYTES) != BULK_BYTES) fail("write");
    if (is_publish) subscribe(), publish(2, last);
    else connect_through(), is_bulk ? bulk(amount * WARM_SHARE) : lines(amount * WARM_SHARE);
    puts("ready"), fflush(stdout), getchar();
    double began = now_s(), cpu_began = cpu_s();
    requests = is_publish ? publish(amount, last) : is_bulk ? bulk(amount) : lines(amount);
    double wall = now_s() - began, cpu = cpu_s() - cpu_began;
    report(requests, wall, cpu);
    getchar();
    return 0;
}
