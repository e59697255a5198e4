// A subset of CUDA that runs the kernels' own sources on a CPU: blocks are threads of the system, started in order and
// delayed at random; the threads of a block are contexts that switch at barriers and warp instructions.

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <tuple>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>

struct Index {
    unsigned x = 0;
};
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static thread_local

struct Block {
    static const int STACK = 64 * 1024;
    std::vector<ucontext_t> contexts;
    std::vector<bool> done;
    ucontext_t home;
    std::vector<long> slots;
    struct Barrier {
        int arrived = 0;
        long generation = 0;
    };
    std::vector<Barrier> barriers;  // one a warp, the last of the block
    void (*body)(void *);
    void *argument;
};
static thread_local Block *block;

static void yield()
{
    unsigned me = threadIdx.x;
    swapcontext(&block->contexts[me], &block->home);
    threadIdx.x = me;
}

static void wait_at(int which, int members)
{
    Block::Barrier &barrier = block->barriers[which];
    long generation = barrier.generation;
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        barrier.generation++;
    }
    while (barrier.generation == generation) yield();
}

static void __syncthreads() { wait_at((int)block->barriers.size() - 1, blockDim.x); }

static void sync_warp() { wait_at(threadIdx.x / 32, 32); }

template <class T> static T read_lane(T mine, unsigned lane)
{
    unsigned warp = threadIdx.x / 32 * 32;
    T theirs;
    memcpy(&block->slots[threadIdx.x], &mine, sizeof mine);
    sync_warp();
    memcpy(&theirs, &block->slots[warp + lane % 32], sizeof theirs);
    sync_warp();
    return theirs;
}

static unsigned __ballot_sync(unsigned, bool mine)
{
    unsigned votes = 0, warp = threadIdx.x / 32 * 32;
    block->slots[threadIdx.x] = mine;
    sync_warp();
    for (unsigned lane = 0; lane < 32; lane++) votes |= (unsigned)block->slots[warp + lane] << lane;
    sync_warp();
    return votes;
}

template <class T> static T __shfl_sync(unsigned, T mine, int lane) { return read_lane(mine, lane); }
template <class T> static T __shfl_down_sync(unsigned, T mine, int far)
{
    unsigned lane = threadIdx.x % 32;
    T theirs = read_lane(mine, lane + far);
    return lane + far < 32 ? theirs : mine;
}

static int __popc(unsigned x) { return __builtin_popcount(x); }
static int __ffs(int x) { return __builtin_ffs(x); }
static float __uint_as_float(unsigned x)
{
    float y;
    memcpy(&y, &x, 4);
    return y;
}
static unsigned __float_as_uint(float x)
{
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}

template <class T> static T atomicAdd(T *at, T more) { return __atomic_fetch_add(at, more, __ATOMIC_SEQ_CST); }
template <class T> static T atomicExch(T *at, T value)
{
    static thread_local std::minstd_rand random(std::random_device{}());
    if (random() % 4 == 0) usleep(random() % 300);
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);
}

static void enter(unsigned me)
{
    threadIdx.x = me;
    block->body(block->argument);
    block->done[me] = true;
    swapcontext(&block->contexts[me], &block->home);
}

static void run_block(Block &here, unsigned number, unsigned blocks, unsigned threads, char *stacks)
{
    block = &here;
    blockIdx.x = number, gridDim.x = blocks, blockDim.x = threads;
    here.done.assign(threads, false);
    here.barriers.assign((threads + 31) / 32 + 1, Block::Barrier());
    for (unsigned me = 0; me < threads; me++) {
        getcontext(&here.contexts[me]);
        here.contexts[me].uc_stack.ss_sp = stacks + (size_t)me * Block::STACK;
        here.contexts[me].uc_stack.ss_size = Block::STACK;
        here.contexts[me].uc_link = nullptr;
        makecontext(&here.contexts[me], (void (*)())enter, 1, me);
    }
    for (bool busy = true; busy;) {
        busy = false;
        for (unsigned me = 0; me < threads; me++)
            if (!here.done[me]) {
                busy = true;
                swapcontext(&here.home, &here.contexts[me]);
            }
    }
}

static void run_grid(int blocks, int threads, void (*body)(void *), void *argument)
{
    std::atomic<int> next(0);
    auto work = [&] {
        Block here;
        here.contexts.resize(threads);
        here.slots.resize(threads);
        here.body = body;
        here.argument = argument;
        std::unique_ptr<char[]> stacks(new char[(size_t)threads * Block::STACK]);
        for (int number; (number = next++) < blocks;) run_block(here, number, blocks, threads, stacks.get());
    };
    std::vector<std::thread> workers;
    for (int k = 0; k < (blocks < 3 ? blocks : 3); k++) workers.emplace_back(work);
    for (auto &worker : workers) worker.join();
}

template <class... A> struct Call {
    void (*kernel)(A...);
    void **arguments;
    template <size_t... I> void run(std::index_sequence<I...>) { kernel(*(A *)arguments[I]...); }
    static void body(void *self) { ((Call *)self)->run(std::index_sequence_for<A...>()); }
};
template <class... A> static void launch(int blocks, int threads, void (*kernel)(A...), void **arguments)
{
    Call<A...> call = {kernel, arguments};
    run_grid(blocks, threads, Call<A...>::body, &call);
}

#define KERNEL(name, ...) \
    static void kernel_##name(__VA_ARGS__); \
    extern "C" void name(int blocks, int threads, void **arguments) { launch(blocks, threads, kernel_##name, arguments); } \
    static void kernel_##name(__VA_ARGS__)
