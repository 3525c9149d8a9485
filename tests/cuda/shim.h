// As much of CUDA as job/operators/batch_norm.cu needs, on the CPU. The threads of a block are fibers, which take turns at
// __syncthreads; blocks run one after the other. A barrier that not all threads of a block reach is an error.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <ucontext.h>
#include <utility>

#define __global__
#define __device__
#define __shared__ static
using std::fma;
using std::sqrt;

struct Index { unsigned x, y; };
static Index threadIdx, blockIdx, gridDim;

static inline float half_to_float(unsigned short bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
}
static inline unsigned short float_to_half(float value) {
  _Float16 narrow = (_Float16)value;
  unsigned short bits;
  memcpy(&bits, &narrow, 2);
  return bits;
}

namespace shim {

struct Body { virtual void run() = 0; };
struct Fiber { jmp_buf resume; bool born = false, done = false; int barriers = 0; std::unique_ptr<char[]> stack; };

static Fiber fibers[THREADS];  // which outlive a launch: a context is dear to make
static Fiber* current;
static jmp_buf scheduler;
static Body* body;
static std::mutex one_at_a_time;

static void yield() {
  if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

static void live() {
  for (;;) {
    body->run();
    current->done = true;
    yield();
  }
}

static void resume(unsigned t) {
  static ucontext_t birth;
  current = &fibers[t];
  threadIdx = {t, 0};
  if (_setjmp(scheduler)) return;
  if (current->born) _longjmp(current->resume, 1);
  current->born = true;
  current->stack.reset(new char[65536]);
  getcontext(&birth);
  birth.uc_stack.ss_sp = current->stack.get(), birth.uc_stack.ss_size = 65536, birth.uc_link = nullptr;
  makecontext(&birth, live, 0);
  setcontext(&birth);
}

static int abandon() {
  for (Fiber& fiber : fibers) fiber.born = false;  // they are in the midst of the kernel
  return 1;
}

static int block() {
  for (Fiber& fiber : fibers) fiber.done = false, fiber.barriers = 0;
  for (bool left = true; left;) {
    left = false;
    for (unsigned t = 0; t < THREADS; ++t) {
      if (!fibers[t].done) resume(t);
      left |= !fibers[t].done;
      if (fibers[t].barriers != fibers[0].barriers) return abandon();
    }
  }
  return 0;
}

template <class... A, size_t... I>
int launch(void (*kernel)(A...), void** arguments, unsigned x, unsigned y, std::index_sequence<I...>) {
  struct Call : Body {
    void (*kernel)(A...);
    void** arguments;
    void run() override { kernel(*(A*)arguments[I]...); }
  } call;
  call.kernel = kernel, call.arguments = arguments;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  body = &call, gridDim = {x, y};
  for (unsigned j = 0; j < y; ++j)
    for (unsigned i = 0; i < x; ++i) {
      blockIdx = {i, j};
      if (block()) return 1;
    }
  return 0;
}

template <class... A>
int launch(void (*kernel)(A...), void** arguments, unsigned x, unsigned y) {
  return launch(kernel, arguments, x, y, std::index_sequence_for<A...>());
}

}  // namespace shim

static void __syncthreads() {
  ++shim::current->barriers;
  shim::yield();
}
