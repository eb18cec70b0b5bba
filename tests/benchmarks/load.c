/* The load: clients that each send some lines, wait for all of their answers, and send again.
 *
 *     load tcp|hosts|udp|churn PORT CONNECTIONS LINES ANSWER_BYTES SLOW SECONDS
 *
 * LINES are sent at once, ANSWER_BYTES come for each; `churn` connects anew for each request, and with `hosts` each
 * client has an address of its own. SLOW more clients send a byte a second. Prints "ready" when all are connected and
 * warm, waits for a line, works for SECONDS, prints what it came to, and waits for another line with its connections
 * open, so that the server can be looked at meanwhile.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "figures.h"

enum { LINE_BYTES = 64, LINES_MAX = 64, EVENTS_MAX = 512, PATIENCE_MS = 20000 };
static const double WARM_SHARE = 0.15, SLOW_EVERY_S = 1.0;

struct client {
    int fd;
    int slow;
    long missing; /* bytes of answers that are still to come */
    double sent_at;
};

static int poller, port, is_udp, is_churn, is_hosts, lines, client_count, slow_count;
static long answer_bytes, requests;
static struct client *clients;
static char text[LINE_BYTES * LINES_MAX], scratch[1 << 20];

static void connect_client(struct client *client) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    client->fd = socket(AF_INET, is_udp ? SOCK_DGRAM : SOCK_STREAM, 0);
    if (is_hosts) {
        struct sockaddr_in own = {.sin_family = AF_INET};
        own.sin_addr.s_addr = htonl((127 << 24) + 65536 + (client - clients)); /* 127.1.0.0 and following */
        if (bind(client->fd, (struct sockaddr *)&own, sizeof own) < 0) fail("bind");
    }
    if (client->fd < 0 || connect(client->fd, (struct sockaddr *)&address, sizeof address) < 0) fail("connect");
    if (!is_udp) setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, client->fd, &event) < 0) fail("epoll_ctl");
}

static void ask(struct client *client, int count) {
    if (send(client->fd, text, (size_t)LINE_BYTES * count, MSG_NOSIGNAL) != LINE_BYTES * count) fail("send");
    client->missing = answer_bytes * count;
    client->sent_at = now_s();
}

static int poll_events(struct epoll_event *events, int timeout_ms) {
    int count = epoll_wait(poller, events, EVENTS_MAX, timeout_ms);
    if (count < 0 && errno != EINTR) fail("epoll_wait");
    return count;
}

/* Take what has come; true when that was the last of what was asked for. */
static int take(struct client *client) {
    ssize_t got = recv(client->fd, scratch, sizeof scratch, MSG_DONTWAIT);
    if (got <= 0) {
        if (got < 0 && errno == EAGAIN) return 0;
        errno = got ? errno : ECONNRESET;
        fail("recv");
    }
    if (client->slow) return 0;
    client->missing -= got;
    if (client->missing < 0) errno = EPROTO, fail("an answer is too long");
    return client->missing == 0;
}

static void answered(struct client *client, double at) {
    requests += is_churn ? 1 : lines;
    sample(at - client->sent_at);
}

static void trickle(double at, double *due, int *next) {
    for (; slow_count && *due <= at; *due += SLOW_EVERY_S / slow_count, ++*next) {
        int byte = *next / slow_count % LINE_BYTES;
        if (send(clients[client_count + *next % slow_count].fd, text + byte, 1, MSG_NOSIGNAL) != 1) fail("trickle");
    }
}

/* All clients work until the time is over, and until what they have asked has been answered. */
static void work(double seconds) {
    struct epoll_event events[EVENTS_MAX];
    double end = now_s() + seconds, due = now_s();
    int busy = client_count, next = 0;
    requests = sample_count = 0;
    for (int i = 0; i < client_count; i++) {
        if (is_churn) connect_client(&clients[i]);
        ask(&clients[i], lines);
    }
    while (busy) {
        errno = 0;
        int count = poll_events(events, slow_count ? 1 : PATIENCE_MS);
        double at = now_s();
        if (!count && at > end + PATIENCE_MS / 1e3) fail("waiting");
        if (!count && !slow_count) fail("waiting");
        trickle(at, &due, &next);
        for (int i = 0; i < count; i++) {
            struct client *client = events[i].data.ptr;
            if (!take(client)) continue;
            answered(client, now_s());
            if (is_churn) close(client->fd);
            if (at >= end) {
                busy--;
                continue;
            }
            if (is_churn) connect_client(client);
            ask(client, lines);
        }
    }
}

/* Connect, a few at a time, and have a line of each answered: then the server has taken it, whatever its queue holds. */
static void connect_all(int count) {
    struct epoll_event events[EVENTS_MAX];
    for (int done = 0; done < count;) {
        int batch = count - done < 64 ? count - done : 64, missing = batch;
        for (int i = done; i < done + batch; i++) {
            connect_client(&clients[i]);
            ask(&clients[i], 1);
        }
        while (missing) {
            errno = 0;
            int ready = poll_events(events, PATIENCE_MS);
            if (!ready) fail("connecting");
            for (int i = 0; i < ready; i++) missing -= take(events[i].data.ptr);
        }
        done += batch;
    }
}

int main(int argc, char **argv) {
    if (argc != 8) return fprintf(stderr, "load: seven arguments, not %d\n", argc - 1), 2;
    is_udp = !strcmp(argv[1], "udp"), is_churn = !strcmp(argv[1], "churn");
    is_hosts = !strcmp(argv[1], "hosts");
    port = atoi(argv[2]), client_count = atoi(argv[3]), lines = atoi(argv[4]), answer_bytes = atol(argv[5]);
    slow_count = atoi(argv[6]);
    double seconds = atof(argv[7]);
    if (lines < 1 || lines > LINES_MAX) return fprintf(stderr, "load: 1 to %d lines\n", LINES_MAX), 2;
    poller = epoll_create1(0);
    clients = calloc(client_count + slow_count, sizeof *clients);
    memset(text, 'x', sizeof text);
    for (int i = 1; i <= LINES_MAX; i++) text[LINE_BYTES * i - 1] = '\n';
    if (!is_churn) connect_all(client_count + slow_count);
    for (int i = client_count; i < client_count + slow_count; i++) clients[i].slow = 1;
    if (seconds > 0) work(seconds * WARM_SHARE);
    puts("ready"), fflush(stdout), getchar();
    double began = now_s(), cpu_began = cpu_s();
    if (seconds > 0) work(seconds);
    double wall = now_s() - began, cpu = cpu_s() - cpu_began;
    report(requests, wall, cpu);
    getchar();
    return 0;
}
