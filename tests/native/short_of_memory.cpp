// Preloaded before the library: lets the n-th piece of memory fail that our own code asks for.

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#include <dlfcn.h>
#include <execinfo.h>

enum mode { IDLE, RECORD, FAIL };

static std::atomic<int>  g_mode { IDLE };
static std::atomic<long> n_asked { 0 }; // by anybody
static std::atomic<long> n_ours { 0 };
static std::atomic<long> fail_at { 0 };
static long ours[1 << 16]; // which of all were asked for by our code

// counts from now on; that one fails, or the next one of ours
extern "C" void short_of_memory_fail(long at) {
    n_asked = 0;
    fail_at = at;
    g_mode = FAIL;
}

extern "C" void short_of_memory_record(void) {
    n_asked = 0;
    n_ours = 0;
    g_mode = RECORD;
}

// how many of ours were recorded, or 1 where one has failed
extern "C" long short_of_memory_end(void) {
    const long res = g_mode == RECORD ? n_ours.load() : fail_at == 0;
    g_mode = IDLE;
    return res;
}

extern "C" const long * short_of_memory_ours(void) {
    return ours;
}

// the standard library's templates ask for whoever uses them
static bool is_standard(const char * name) {
    for (const char * start : { "_Zn", "_ZSt", "_ZNSt", "_ZNKSt", "_ZN9__gnu_cxx" }) {
        if (strncmp(name, start, strlen(start)) == 0) {
            return true;
        }
    }
    return false;
}

static bool asks_our_code(void) {
    void * frames[24];
    const int n_frame = backtrace(frames, 24);
    for (int i = 1; i < n_frame; ++i) {
        Dl_info info;
        if (!dladdr(frames[i], &info) || !info.dli_sname || is_standard(info.dli_sname)) {
            continue;
        }
        return strstr(info.dli_sname, "qaflora") != nullptr;
    }
    return false;
}

// looking for the caller may ask for memory itself
static thread_local bool is_looking = false;

static bool fails_now(void) {
    const long at = ++n_asked;
    if (g_mode == FAIL && (fail_at == 0 || at < fail_at)) {
        return false;
    }
    is_looking = true;
    const bool is_ours = asks_our_code();
    is_looking = false;
    if (is_ours && g_mode == RECORD) {
        ours[n_ours++] = at;
    }
    return is_ours && g_mode == FAIL && fail_at.exchange(0) != 0;
}

void * operator new(size_t size) {
    if (g_mode != IDLE && !is_looking && fails_now()) {
        throw std::bad_alloc();
    }
    if (void * memory = malloc(size ? size : 1)) {
        return memory;
    }
    throw std::bad_alloc();
}

void operator delete(void * memory) noexcept {
    free(memory);
}

void operator delete(void * memory, size_t) noexcept {
    free(memory);
}
