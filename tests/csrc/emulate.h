// Runs a kernel's body (csrc/*_kernel.h) on the host: one fiber a thread, woken in random order, real barriers. A barrier that
// not all threads reach, or a warp operation that not all lanes join, ends the program with a message instead of hanging.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "advantage_kernel.h"
#include "surrogate_kernel.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulate {

struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

struct Warp {
  Barrier barrier;
  double doubles[ldo::LANES];
  int64_t integers[ldo::LANES];
  bool flags[ldo::LANES];
};

class Grid {
 public:
  Grid(int blocks, unsigned seed) : blocks_(blocks), order_(seed), warps_(blocks * ldo::WARPS), block_(blocks) {
    for (auto& w : warps_) w.barrier.expected = ldo::LANES;
    for (auto& b : block_) b.expected = ldo::BLOCK;
    grid_.expected = blocks * ldo::BLOCK;
  }

  int blocks() const { return blocks_; }
  Warp& warp(int block, int warp) { return warps_[block * ldo::WARPS + warp]; }
  Barrier& block(int b) { return block_[b]; }
  Barrier& grid() { return grid_; }

  void wait(Barrier& b) {
    const long generation = b.generation;
    if (++b.arrived == b.expected) {
      b.arrived = 0;
      ++b.generation;
      progress_ = true;
      return;
    }
    while (b.generation == generation) leave(false);
  }

  void run(const std::function<void(int block, int thread)>& body) {
    const int count = blocks_ * ldo::BLOCK;
    fibers_.clear();
    for (int f = 0; f < count; ++f) fibers_.push_back(std::make_unique<Fiber>());
    body_ = &body;
    std::vector<int> turn;
    for (int f = 0; f < count; ++f) {
      turn.push_back(f);
      getcontext(&fibers_[f]->context);
      fibers_[f]->context.uc_stack.ss_sp = fibers_[f]->stack.data();
      fibers_[f]->context.uc_stack.ss_size = fibers_[f]->stack.size();
      fibers_[f]->context.uc_link = nullptr;
      makecontext(&fibers_[f]->context, &Grid::enter, 0);
    }
    for (int left = count; left;) {
      progress_ = false;
      std::shuffle(turn.begin(), turn.end(), order_);
      for (int f : turn) {
        if (fibers_[f]->done) continue;
        current_ = f;
        resume(*fibers_[f]);
        if (fibers_[f]->done) --left, progress_ = true;
      }
      if (!progress_) {
        std::printf("deadlock: %d threads wait for others that never come\n", left);
        std::exit(1);
      }
    }
  }

 private:
  struct Fiber {
    std::vector<char> stack = std::vector<char>(64 * 1024);
    ucontext_t context;
    bool done = false;
    void* fake = nullptr;
  };

  static inline Grid* active_ = nullptr;

  static void enter() {
    Grid* g = active_;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &g->main_bottom_, &g->main_size_);
#endif
    (*g->body_)(g->current_ / ldo::BLOCK, g->current_ % ldo::BLOCK);
    g->leave(true);
  }

  void resume(Fiber& f) {
    active_ = this;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&main_fake_, f.stack.data(), f.stack.size());
#endif
    swapcontext(&main_, &f.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(main_fake_, nullptr, nullptr);
#endif
  }

  void leave(bool forever) {
    Fiber& f = *fibers_[current_];
    f.done = forever;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(forever ? nullptr : &f.fake, main_bottom_, main_size_);
#endif
    swapcontext(&f.context, &main_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(f.fake, &main_bottom_, &main_size_);
#endif
  }

  int blocks_;
  std::mt19937 order_;
  std::vector<Warp> warps_;
  std::vector<Barrier> block_;
  Barrier grid_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void(int, int)>* body_ = nullptr;
  ucontext_t main_;
  int current_ = 0;
  bool progress_ = false;
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
  void* main_fake_ = nullptr;
};

// The device interface of csrc/warp.h for one thread.
struct Device {
  Grid* g;
  int block_, thread_;
  Warp& w() const { return g->warp(block_, warp()); }
  int lane() const { return thread_ % ldo::LANES; }
  int warp() const { return thread_ / ldo::LANES; }
  int block() const { return block_; }
  int blocks() const { return g->blocks(); }
  void sync_warp() const { g->wait(w().barrier); }
  void sync_block() const { g->wait(g->block(block_)); }
  void sync_grid() const { g->wait(g->grid()); }
  double shuffle_xor(double x, int mask) const { return exchange(w().doubles, x, mask); }
  int64_t shuffle_xor(int64_t x, int mask) const { return exchange(w().integers, x, mask); }
  uint32_t ballot(bool x) const {
    w().flags[lane()] = x;
    sync_warp();
    uint32_t mask = 0;
    for (int l = 0; l < ldo::LANES; ++l) mask |= static_cast<uint32_t>(w().flags[l]) << l;
    sync_warp();
    return mask;
  }

 private:
  template <class T>
  T exchange(T* slots, T x, int mask) const {
    slots[lane()] = x;
    sync_warp();
    const T other = slots[lane() ^ mask];
    sync_warp();
    return other;
  }
};

template <class T>
void advantage(const ldo::Advantage& a, int blocks, unsigned seed) {
  ldo::Workspace w;
  std::vector<char> memory(w.layout(nullptr, a.samples, a.kinds, blocks), char(0xA5));  // what a fresh buffer may hold
  w.layout(memory.data(), a.samples, a.kinds, blocks);
  std::vector<ldo::Shared> shared(blocks);
  std::memset(static_cast<void*>(shared.data()), 0xA5, shared.size() * sizeof(ldo::Shared));
  Grid grid(blocks, seed);
  grid.run([&](int block, int thread) { ldo::AdvantageKernel<Device, T>(Device{&grid, block, thread}, a, w, shared[block]).run(); });
}

template <class T>
void surrogate(const ldo::Surrogate& s, int blocks, unsigned seed) {
  std::vector<double> workspace(ldo::parts_in_workspace(ldo::chunks_of(s.samples * s.steps)), -1e300), shared(ldo::WARPS * ldo::PARTS, -1e300);
  Grid grid(workspace.empty() ? 1 : blocks, seed);  // as a launch has it: one block where its warps suffice
  grid.run([&](int block, int thread) { ldo::SurrogateKernel<Device, T>(Device{&grid, block, thread}, s, shared.data(), workspace.data()).run(); });
}

}  // namespace emulate
