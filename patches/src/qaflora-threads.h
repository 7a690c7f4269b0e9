// How ggml's threads wait, and the pools of threads of a process. Included by ggml-cpu.c alone,
// behind `struct ggml_threadpool`, and in C as that file.

#pragma once

// A waiter looks for so long before it sleeps: to wake a sleeper takes 30 to 60 us.
#define QAFLORA_SPIN_US 50
#define QAFLORA_LOOKS_PER_TIME 64 // the clock is read once in so many looks, every 1 to 3 us

// Who waited for longer than QAFLORA_LONG_WAIT_US waited for a thread whose core another program has.
// While such waits take more than a twenty-fifth of the time waiters sleep at once: a program that spins
// uses up its share of the cores, and then waits for whole slices of the scheduler's.
#define QAFLORA_LONG_WAIT_US 500
#define QAFLORA_LOSS_FACTOR  25  // a us that was lost counts for so many us to come
#define QAFLORA_LOSS_BUSY_MS 30  // from here on waiters do not spin
#define QAFLORA_LOSS_MAX_MS  200 // what is remembered of a busy time

struct qaflora_spin {
    int     n_looks;
    int64_t begin_us; // 0: the clock was not read yet
    int64_t end_us;
};

// Milliseconds until the loss is forgotten: 0 to QAFLORA_LOSS_MAX_MS. Times wrap around.
static int qaflora_loss_ms(struct ggml_threadpool * pool, int64_t now_us) {
    const uint32_t until_ms = (uint32_t) atomic_load_explicit(&pool->qaflora_loss_until_ms, memory_order_relaxed);
    const int32_t  left_ms  = (int32_t) (until_ms - (uint32_t) (now_us / 1000));
    return left_ms > 0 && left_ms <= QAFLORA_LOSS_MAX_MS ? left_ms : 0;
}

// Pause before the next look. Return false once it is time to sleep.
static bool qaflora_spin_again(struct ggml_threadpool * pool, struct qaflora_spin * spin) {
    ggml_thread_cpu_relax();
    if (++spin->n_looks % QAFLORA_LOOKS_PER_TIME != 0) {
        return true;
    }
    const int64_t now_us = ggml_time_us();
    if (spin->begin_us == 0) {
        const bool is_busy = qaflora_loss_ms(pool, now_us) > QAFLORA_LOSS_BUSY_MS;
        spin->begin_us = now_us;
        spin->end_us   = is_busy ? now_us : now_us + QAFLORA_SPIN_US;
    }
    return now_us < spin->end_us;
}

// Wait until *word is no longer `value`: spin, then sleep.
static void qaflora_wait(struct ggml_threadpool * pool, atomic_int * word, int value) {
    struct qaflora_spin spin = {0};
    do {
        if (atomic_load_explicit(word, memory_order_relaxed) != value) {
            return;
        }
    } while (qaflora_spin_again(pool, &spin));

    ggml_mutex_lock_shared(&pool->mutex); // as upstream's ggml_cond_wait has it on Windows
    // Sequentially consistent, as the change of *word is: the waker sees a sleeper, or this thread
    // sees the change.
    atomic_fetch_add(&pool->qaflora_n_asleep, 1);
    while (atomic_load(word) == value) {
        ggml_cond_wait(&pool->cond, &pool->mutex);
    }
    atomic_fetch_add(&pool->qaflora_n_asleep, -1);
    ggml_mutex_unlock_shared(&pool->mutex);

    const int64_t now_us    = ggml_time_us();
    const int64_t waited_us = now_us - spin.begin_us;
    if (waited_us > QAFLORA_LONG_WAIT_US) {
        const int64_t loss_ms  = qaflora_loss_ms(pool, now_us) + QAFLORA_LOSS_FACTOR * waited_us / 1000;
        const int64_t until_ms = now_us / 1000 + MIN(loss_ms, QAFLORA_LOSS_MAX_MS);
        atomic_store_explicit(&pool->qaflora_loss_until_ms, (int) (uint32_t) until_ms, memory_order_relaxed);
    }
}

// Wake who sleeps in qaflora_wait, after the word has changed.
static void qaflora_wake(struct ggml_threadpool * pool) {
    if (atomic_load(&pool->qaflora_n_asleep) > 0) {
        ggml_mutex_lock(&pool->mutex);
        ggml_cond_broadcast(&pool->cond);
        ggml_mutex_unlock(&pool->mutex);
    }
}

// Pools that no graph uses. Contexts share them, whichever thread computes; a second one comes into
// being where two graphs are computed at the same time.
static struct ggml_threadpool * qaflora_idle_pools = NULL;

#if !defined(_WIN32)
// A forked process has none of its parent's threads.
static void qaflora_forget_pools(void) {
    qaflora_idle_pools = NULL;
}
#endif

// Give an idle pool of exactly so many threads, the caller among them, or make one.
static struct ggml_threadpool * qaflora_take_pool(int n_threads) {
    ggml_critical_section_start();
#if !defined(_WIN32)
    static bool is_fork_watched = false;
    if (!is_fork_watched) {
        is_fork_watched = pthread_atfork(NULL, NULL, qaflora_forget_pools) == 0;
    }
#endif
    struct ggml_threadpool ** link = &qaflora_idle_pools;
    while (*link && (*link)->n_threads != n_threads) {
        link = &(*link)->qaflora_next;
    }
    struct ggml_threadpool * pool = *link;
    if (pool) {
        *link = pool->qaflora_next;
    }
    ggml_critical_section_end();
    if (pool) {
        return pool;
    }
    struct ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    return ggml_threadpool_new(&params);
}

static void qaflora_give_pool(struct ggml_threadpool * pool) {
    ggml_critical_section_start();
    pool->qaflora_next = qaflora_idle_pools;
    qaflora_idle_pools = pool;
    ggml_critical_section_end();
}
