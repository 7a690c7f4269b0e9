#include "qaflora-rpc.h"

#include "ggml.h"

#ifdef _WIN32
#  define WIN32_LEAN_AND_MEAN
#  ifndef NOMINMAX
#    define NOMINMAX
#  endif
#  include <winsock2.h>
#  include <ws2tcpip.h>
#else
#  include <arpa/inet.h>
#  include <netinet/in.h>
#  include <netinet/tcp.h>
#  include <poll.h>
#  include <sys/socket.h>
#endif
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

static constexpr int LOST_S = 25; // without a sign of the other machine

static std::atomic_bool g_is_client = false;
static std::atomic_int  g_timeout_s = 60;

static std::mutex g_mutex;
static std::map<uintptr_t, std::string> g_workers; // of each connection, for a lost one has no address any more

#ifdef _WIN32
typedef SOCKET    socket_fd;
typedef WSAPOLLFD socket_poll;
static constexpr int SEND_FLAGS = 0;
static int  wait_for(socket_poll * what, int ms) { return WSAPoll(what, 1, ms); }
static bool is_to_repeat() { return WSAGetLastError() == WSAEWOULDBLOCK; }
#else
typedef int           socket_fd;
typedef struct pollfd socket_poll;
#  ifndef MSG_NOSIGNAL
#    define MSG_NOSIGNAL 0
#  endif
static constexpr int SEND_FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL;
static int  wait_for(socket_poll * what, int ms) { return poll(what, 1, ms); }
static bool is_to_repeat() { return errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK; }
#endif

bool qaflora_rpc_is_custom(int op) {
    return op == GGML_OP_CUSTOM || op == GGML_OP_MAP_CUSTOM1 || op == GGML_OP_MAP_CUSTOM2 || op == GGML_OP_MAP_CUSTOM3;
}

void qaflora_rpc_say_build(uint8_t * caps, size_t size) {
    memcpy(caps, QAFLORA_RPC_BUILD, std::min(size, sizeof(QAFLORA_RPC_BUILD)));
}

void qaflora_rpc_keep_alive(uintptr_t fd) {
    auto set = [fd](int level, int option, int value) {
        setsockopt((socket_fd) fd, level, option, (const char *) &value, sizeof(value));
    };
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
#if defined(TCP_KEEPIDLE) && defined(TCP_KEEPINTVL) && defined(TCP_KEEPCNT)
    set(IPPROTO_TCP, TCP_KEEPIDLE, LOST_S*2/5);
    set(IPPROTO_TCP, TCP_KEEPINTVL, LOST_S/5);
    set(IPPROTO_TCP, TCP_KEEPCNT, 3);
#endif
#ifdef TCP_USER_TIMEOUT
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, LOST_S*1000);
#endif
}

void qaflora_rpc_connected(uintptr_t fd) {
    qaflora_rpc_keep_alive(fd);
    if (const char * text = getenv("QAFLORA_RPC_TIMEOUT"); text && *text) {
        g_timeout_s = atoi(text);
    }
    sockaddr_in address = {};
    socklen_t   size    = sizeof(address);
    getpeername((socket_fd) fd, (sockaddr *) &address, &size);
    char host[INET_ADDRSTRLEN] = "?";
    inet_ntop(AF_INET, &address.sin_addr, host, sizeof(host));
    std::lock_guard<std::mutex> lock(g_mutex);
    g_workers[fd] = std::string(host) + ":" + std::to_string(ntohs(address.sin_port));
    g_is_client   = true;
}

// say why, and end: what it has computed is lost, and llama.cpp would go on with anything
[[noreturn]] static void lose(uintptr_t fd, bool is_silent) {
    char why[64] = "ended the connection, or its machine cannot be reached";
    if (is_silent) {
        snprintf(why, sizeof(why), "has sent nothing for %d s", g_timeout_s.load());
    }
    std::lock_guard<std::mutex> lock(g_mutex);
    fprintf(stderr, "Error: The worker %s %s. Start it again if it does not run, then this program; if it is slow, "
            "set QAFLORA_RPC_TIMEOUT to more seconds.\n", g_workers[fd].c_str(), why);
    fflush(stderr);
    _Exit(1);
}

// wait until something can be sent or received, if this is a client
static void wait_until_ready(uintptr_t fd, short events) {
    if (!g_is_client) {
        return;
    }
    socket_poll what = { (socket_fd) fd, events, 0 };
    int n;
    do {
        n = wait_for(&what, g_timeout_s > 0 ? g_timeout_s*1000 : -1);
    } while (n < 0 && is_to_repeat()); // by a signal, or since this process was stopped for a while
    if (n == 0) {
        lose(fd, true);
    }
}

int64_t qaflora_rpc_send(uintptr_t fd, const char * data, size_t size) {
    int64_t n;
    do {
        wait_until_ready(fd, POLLOUT);
        n = send((socket_fd) fd, data, size, g_is_client ? SEND_FLAGS : 0);
    } while (n < 0 && is_to_repeat());
    if (n < 0 && g_is_client) {
        lose(fd, false);
    }
    return n;
}

int64_t qaflora_rpc_recv(uintptr_t fd, char * data, size_t size) {
    int64_t n;
    do {
        wait_until_ready(fd, POLLIN);
        n = recv((socket_fd) fd, data, size, 0);
    } while (n < 0 && is_to_repeat());
    if (n <= 0 && g_is_client) {
        lose(fd, false);
    }
    return n;
}
