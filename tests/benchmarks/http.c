/* The load of HTTP servers.
 *
 *     http get PORT CONNECTIONS BODY_BYTES SLOW SECONDS
 *     http websockets|listeners PORT CONNECTIONS 0 0 0
 *     http events PORT LISTENERS 0 0 EVENTS
 *
 * `get`: each client sends a request, and sends again when it has the answer: 200, with a body of BODY_BYTES. SLOW
 * clients upload a byte a second, and as many take little of a long answer every second. `websockets`: each opens a
 * WebSocket, has a message echoed, and is silent. `listeners`: each asks for server-sent events, and is silent. `events`:
 * the listeners get EVENTS, one at a time; a request is an event that a listener has got, checked byte by byte.
 * Prints "ready" when all are connected and warm, waits for a line, works, prints what it came to, and waits for another
 * line with its connections open, so that the server can be looked at meanwhile.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "figures.h"

enum { BATCH = 64, EVENTS_MAX = 512, PATIENCE_MS = 20000, HEAD = -1, SMALL_BUFFER = 4096, SIP_BYTES = 256 };
static const double WARM_SHARE = 0.15, SLOW_EVERY_S = 1.0;
static const double SETTLE_S = 5; /* until long answers of all the slow clients are on their way */

#define TO "Host: 127.0.0.1\r\nUser-Agent: load\r\nAccept: */*\r\n"
static const char GET[] = "GET /page.html HTTP/1.1\r\n" TO "\r\n";
static const char UPLOAD[] = "POST /upload HTTP/1.1\r\n" TO "Content-Length: 1000000\r\n\r\n";
static const char DOWNLOAD[] = "GET /large HTTP/1.1\r\n" TO "\r\n";
static const char LISTEN[] = "GET /events HTTP/1.0\r\n" TO "\r\n", RETRY[] = "retry: 1000\n\n", COMMENT[] = ":\n\n";
static const char UPGRADE[] = "GET /socket HTTP/1.1\r\n" TO "Connection: Upgrade\r\nUpgrade: websocket\r\n"
                              "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
static const char FRAME[] = "\x81\x85\0\0\0\0hello", ECHOED[] = "\x81\x05hello";
static const char WORD[] = "something that all who listen are told";

struct client {
    int fd;
    long missing; /* bytes that are still to come; HEAD: of the head, too */
    double sent_at;
};

static int poller, port, client_count, slow_count;
static long body_bytes;
static struct client *clients, *slow, sender;
static char scratch[1 << 20];

static void connect_client(struct client *client, int receive_buffer) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    client->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (client->fd < 0) fail("socket");
    if (receive_buffer) setsockopt(client->fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    if (connect(client->fd, (struct sockaddr *)&address, sizeof address) < 0) fail("connect");
    setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static void watch(struct client *client) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, client->fd, &event) < 0) fail("epoll_ctl");
}

static void say(struct client *client, const char *bytes, long count) {
    if (send(client->fd, bytes, count, MSG_NOSIGNAL) != count) fail("send");
    client->missing = HEAD;
    client->sent_at = now_s();
}

static int polled(struct epoll_event *events, int timeout_ms) {
    errno = 0;
    int count = epoll_wait(poller, events, EVENTS_MAX, timeout_ms);
    if (count < 0) fail("epoll_wait");
    if (!count && timeout_ms == PATIENCE_MS) fail("waiting");
    return count;
}

/* Take what has come, and end it with a NUL. Returns how many bytes; 0: none. */
static long received(struct client *client, long most) {
    ssize_t got = recv(client->fd, scratch, most, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return 0;
    if (got <= 0) errno = got ? errno : ECONNRESET, fail("recv");
    scratch[got] = 0;
    return got;
}

static void wrong(const char *what) {
    errno = EPROTO;
    fprintf(stderr, "%.200s\n", scratch);
    fail(what);
}

/* Check the head of an answer, which comes in one piece. Returns its size. */
static long check_head(const char *status) {
    char *end = strstr(scratch, "\r\n\r\n");
    if (!end || strncmp(scratch, "HTTP/1.1 ", 9) || strncmp(scratch + 9, status, 3)) wrong("another answer");
    return end + 4 - scratch;
}

/* Take a part of an answer to a GET. Returns true if that was all of it. */
static int take(struct client *client) {
    long got = received(client, sizeof scratch - 1);
    if (got && client->missing == HEAD) {
        long size = check_head("200");
        char *length = strcasestr(scratch, "\r\nContent-Length:");
        if (!length || length > scratch + size || atol(length + 17) != body_bytes) wrong("another length");
        client->missing = body_bytes;
        got -= size;
    }
    client->missing -= got;
    if (client->missing < 0) wrong("an answer is too long");
    return client->missing == 0;
}

/* A byte of each upload, and a sip of each download, in turn. */
static void trickle(double at, double *due, int *next) {
    for (; slow_count && *due <= at; *due += SLOW_EVERY_S / slow_count, ++*next) {
        struct client *client = &slow[*next % slow_count];
        if (*next % 2) received(client, SIP_BYTES);
        else say(client, "x", 1);
    }
}

/* All clients work until the time is over, and until they have their answers. */
static double get(double seconds) {
    struct epoll_event events[EVENTS_MAX];
    double end = now_s() + seconds, due = now_s();
    int busy = client_count, next = 0;
    long requests = sample_count = 0;
    for (int i = 0; i < client_count; i++) say(&clients[i], GET, sizeof GET - 1);
    while (busy) {
        int count = polled(events, slow_count ? 1 : PATIENCE_MS);
        double at = now_s();
        if (at > end + PATIENCE_MS / 1e3) fail("waiting");
        trickle(at, &due, &next);
        for (int i = 0; i < count; i++) {
            struct client *client = events[i].data.ptr;
            if (!take(client)) continue;
            sample(now_s() - client->sent_at);
            requests++;
            if (at < end) say(client, GET, sizeof GET - 1);
            else busy--;
        }
    }
    return requests;
}

/* Connect slow clients: uploads and downloads in turn. What has come of a download shows that both were accepted. */
static void connect_slow(void) {
    for (int i = 0; i < slow_count; i += 2) {
        connect_client(&slow[i], 0), connect_client(&slow[i + 1], SMALL_BUFFER);
        say(&slow[i], UPLOAD, sizeof UPLOAD - 1), say(&slow[i + 1], DOWNLOAD, sizeof DOWNLOAD - 1);
        if (recv(slow[i + 1].fd, scratch, SIP_BYTES, 0) < 12 || strncmp(scratch, "HTTP/1.1 200", 12)) wrong("a download");
    }
}

/* Drop the comments that a server sends to silent listeners, from the beginning of what has come. */
static long without_comments(long got) {
    long size = sizeof COMMENT - 1, skipped = 0;
    while (got - skipped >= size && !memcmp(scratch + skipped, COMMENT, size)) skipped += size;
    memmove(scratch, scratch + skipped, got - skipped);
    return got - skipped;
}

static int ends_with(long got, const char *end, long size) {
    return got >= size && !memcmp(scratch + got - size, end, size);
}

/* One of those that will be idle: returns true if it has all that it waits for. */
static int settle(struct client *client, int is_websocket) {
    long got = received(client, sizeof scratch - 1);
    if (!is_websocket) return ends_with(got, RETRY, sizeof RETRY - 1);
    if (client->missing != HEAD) return ends_with(got, ECHOED, sizeof ECHOED - 1);
    check_head("101");
    say(client, FRAME, sizeof FRAME - 1);
    client->missing = sizeof ECHOED - 1;
    return 0;
}

/* Connect, a few at a time, so that the server has taken them, whatever its queue holds. */
static void connect_idle(int is_websocket) {
    struct epoll_event events[EVENTS_MAX];
    for (int done = 0, batch; done < client_count; done += batch) {
        batch = client_count - done < BATCH ? client_count - done : BATCH;
        for (int i = done; i < done + batch; i++) {
            connect_client(&clients[i], 0);
            watch(&clients[i]);
            say(&clients[i], is_websocket ? UPGRADE : LISTEN, is_websocket ? sizeof UPGRADE - 1 : sizeof LISTEN - 1);
        }
        for (int missing = batch; missing;) {
            int ready = polled(events, PATIENCE_MS);
            for (int i = 0; i < ready; i++) missing -= settle(events[i].data.ptr, is_websocket);
        }
    }
}

/* Post events, one after another: the next when all have the one before. */
static double post_events(long count) {
    static long number;
    struct epoll_event events[EVENTS_MAX];
    char text[512], event[512], told[64];
    int size = snprintf(text, sizeof text, "POST /events HTTP/1.1\r\n" TO "Content-Length: %zu\r\n\r\n%s", sizeof WORD - 1, WORD);
    int told_size = snprintf(told, sizeof told, "sent to %d\n", client_count);
    sample_count = 0;
    for (long i = 0; i < count; i++) {
        int event_size = snprintf(event, sizeof event, "id: %ld\ndata: %s\n\n", ++number, WORD);
        say(&sender, text, size);
        for (int j = 0; j < client_count; j++) clients[j].missing = event_size;
        for (int missing = client_count + 1; missing;) {
            int ready = polled(events, PATIENCE_MS);
            for (int j = 0; j < ready; j++) {
                struct client *client = events[j].data.ptr;
                long got = received(client, sizeof scratch - 1);
                if (client == &sender) {
                    check_head("200");
                    if (!ends_with(got, told, told_size)) wrong("not told to all");
                    missing--;
                    continue;
                }
                got = without_comments(got);
                if (got > client->missing || memcmp(scratch, event + event_size - client->missing, got)) wrong("another event");
                missing -= got && !(client->missing -= got);
            }
        }
        sample(now_s() - sender.sent_at);
    }
    return (double)count * client_count;
}

int main(int argc, char **argv) {
    if (argc != 7) return fprintf(stderr, "http: six arguments, not %d\n", argc - 1), 2;
    int is_get = !strcmp(argv[1], "get"), is_events = !strcmp(argv[1], "events");
    double amount = atof(argv[6]), requests = 0;
    port = atoi(argv[2]), client_count = atoi(argv[3]), body_bytes = atol(argv[4]), slow_count = 2 * atoi(argv[5]);
    poller = epoll_create1(0);
    clients = calloc(client_count, sizeof *clients), slow = calloc(slow_count, sizeof *slow);
    if (is_get) {
        for (int i = 0; i < client_count; i++) connect_client(&clients[i], 0), watch(&clients[i]);
        connect_slow(), get(amount * WARM_SHARE + (slow_count ? SETTLE_S : 0));
    } else {
        connect_idle(!strcmp(argv[1], "websockets"));
    }
    if (is_events) connect_client(&sender, 0), watch(&sender), post_events(2);
    puts("ready"), fflush(stdout), getchar();
    double began = now_s(), cpu_began = cpu_s();
    if (is_get) requests = get(amount);
    if (is_events) requests = post_events(amount);
    report(requests, now_s() - began, cpu_s() - cpu_began);
    getchar();
    return 0;
}
