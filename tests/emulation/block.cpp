// How threads take turns, and how a launch fails. See block.h.
#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "cuda_emulation.h"
#include "source_lines.h"

namespace sparseops_emulation {
namespace {

Block* running = nullptr;

std::vector<std::unique_ptr<Stack>>& stacks() {
  static std::vector<std::unique_ptr<Stack>> all;  // serve every launch
  return all;
}

// In shared memory nothing is zero by itself. These bytes are NaNs, and metadata that no instruction takes.
constexpr int kPoison = 0xff;

}  // namespace

Block& block() {
  if (!running) throw Error("a CUDA device function is called outside a kernel");
  return *running;
}

bool in_kernel() { return running; }

std::uint64_t seed() {
  const char* text = std::getenv("EMU_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}

std::unique_ptr<std::byte[], Free> allocate(std::size_t bytes, std::size_t alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, alignment, bytes)) throw std::bad_alloc();
  return std::unique_ptr<std::byte[], Free>(static_cast<std::byte*>(p));
}

// ---- the run

Block::Block(unsigned threads, std::size_t shared_bytes, unsigned cluster)
    : size_(threads),
      shared_bytes_(shared_bytes),
      members_(cluster),
      threads_(std::size_t{threads} * cluster),
      shuffled_(seed() != 0),
      random_(seed()) {
  for (Member& member : members_) member.shared = allocate(shared_bytes, 1024);
  while (stacks().size() < threads_.size()) stacks().push_back(std::make_unique<Stack>());
}

void Block::start(uint3 first) {
  for (unsigned rank = 0; rank < cluster(); ++rank) {
    Member& member = members_[rank];
    member.index = {first.x + rank, first.y, first.z};
    member.running = size_;
    member.barrier = {};
    std::memset(member.shared.get(), kPoison, shared_bytes_);
  }
  const memory::Range variables = shared_variables();
  if (variables.begin)
    std::memset(const_cast<std::byte*>(variables.begin), kPoison, std::size_t(variables.end - variables.begin));
  for (unsigned i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i] = Thread{};
    thread.number = i;
    thread.rank = i / size_;
    thread.id = i % size_;
    thread.lane = thread.id % 32;
    thread.index = {thread.id % blockDim.x, thread.id / blockDim.x % blockDim.y, thread.id / (blockDim.x * blockDim.y)};
    thread.position = stacks()[i]->prepare(&Block::enter);
  }
  warps_.assign((threads_.size() + 31) / 32, Warp{});
  warpgroups_.assign(threads_.size() / 128 + cluster(), Warpgroup{});
}

void Block::run(unsigned number, uint3 first, const std::function<void()>& kernel) {
  running = this;
  kernel_ = &kernel;
  error_.clear();
  start(first);
  memory::SharedMemory shared{{}, shared_variables()};
  for (const Member& member : members_)
    shared.dynamic.push_back({member.shared.get(), member.shared.get() + shared_bytes_});
  memory::begin_blocks(number, size_, shared);
  self_ = &threads_[shuffled_ ? random_() % threads_.size() : 0];
  blockIdx = members_[self_->rank].index;
  threadIdx = self_->index;
  memory::running(self_->number);
  jump(&main_.position, self_->position, stacks()[self_->number]->bottom(), Stack::kBytes);
  memory::end_blocks();
  background_.clear();
  states_.clear();
  end_checks_.clear();
  running = nullptr;
  if (error_.empty()) return;
  for (const auto& stack : stacks()) stack->wipe();
  throw Error(error_);
}

void Block::enter() {
  Block& me = *running;
  arrived(me.main_);
  try {
    (*me.kernel_)();
  } catch (const std::exception& e) {
    me.error_ = me.place(me.self().rank) + e.what();
  }
  if (me.error_.empty()) me.end_thread();
  me.go_on_with(me.error_.empty() ? me.next() : nullptr);
  std::abort();  // nothing returns here
}

void Block::end_thread() {
  const auto& groups = self_->copy_groups;
  const bool copies =
      !self_->open_copies.empty() || std::any_of(groups.begin(), groups.end(), [](auto& g) { return !g.empty(); });
  if (copies) fail("ends with cp.async copies that it never waited for");
  for (const auto check : end_checks_) check(*self_);
  self_->done = true;
  if (--members_[self_->rank].running > 0) return;
  for (const Work& work : background_) {
    if (work.rank != self_->rank || work.may_outlive) continue;
    error_ = place(work.rank) + "the block ends before its background work does: " + work.what + "\n  at " +
             describe(work.site);
    return;
  }
}

// ---- whose turn it is

// A shuffled schedule mostly stays within a warp and now and then jumps: warps drift far apart, as on the device.
Thread* Block::pick() {
  const auto first_that_can_run = [&](unsigned begin, unsigned count, unsigned start) -> Thread* {
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = threads_[begin + (start + i) % count];
      if (thread.can_run()) return &thread;
    }
    return nullptr;
  };
  constexpr unsigned kJumpOneIn = 64;
  const auto all = static_cast<unsigned>(threads_.size());
  if (!shuffled_) return first_that_can_run(0, all, self_->number + 1);
  const unsigned warp = self_->number / 32 * 32, lanes = std::min(32u, all - warp);
  Thread* thread = nullptr;
  if (random_() % kJumpOneIn) thread = first_that_can_run(warp, lanes, unsigned(random_() % lanes));
  return thread ? thread : first_that_can_run(0, all, unsigned(random_() % all));
}

// Null: none, for the launch is over.
Thread* Block::next() {
  constexpr unsigned kEarlyOneIn = 16;
  if (shuffled_ && !background_.empty() && random_() % kEarlyOneIn == 0) do_work(random_() % background_.size());
  while (error_.empty()) {
    if (Thread* thread = pick()) return thread;
    if (background_.empty()) {
      const auto done = [](const Thread& t) { return t.done; };
      if (!std::all_of(threads_.begin(), threads_.end(), done))
        error_ = place(self_->rank) + "deadlock: no thread can go on\n" + describe_threads();
      return nullptr;
    }
    do_work(shuffled_ ? random_() % background_.size() : 0);
  }
  return nullptr;
}

// Null: with the code that launched the kernel.
void Block::go_on_with(Thread* thread) {
  Thread* from = self_;
  if (thread == from) return;
  if (!thread) return jump(&from->position, main_.position, main_.bottom, main_.size);
  self_ = thread;
  blockIdx = members_[thread->rank].index;
  threadIdx = thread->index;
  memory::running(thread->number);
  jump(&from->position, thread->position, stacks()[thread->number]->bottom(), Stack::kBytes);
}

void Block::wait(const Event& event, const char* operation, const void* site) {
  self_->wait = &event;
  self_->seen = event.generation;
  self_->operation = operation;
  self_->site = site;
  go_on_with(next());
  self_->wait = nullptr;
}

// ---- work in the background

std::uint64_t Block::in_background(Work work) {
  work.id = ++works_;
  background_.push_back(std::move(work));
  return works_;
}

void Block::do_work(std::size_t position) {
  const Work work = std::move(background_[position]);
  background_.erase(background_.begin() + std::ptrdiff_t(position));
  working_ = &work;
  try {
    work.run();
  } catch (const std::exception& e) {
    error_ = place(work.rank) + work.what + ": " + e.what() + "\n  at " + describe(work.site);
  }
  working_ = nullptr;
}

void Block::finish(std::uint64_t id) {
  for (std::size_t i = 0; i < background_.size(); ++i) {
    if (background_[i].id != id) continue;
    do_work(i);
    if (!error_.empty()) go_on_with(nullptr);
    return;
  }
}

// ---- failures

void Block::fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (working_) throw Error(text);
  error_ = place(self_->rank) + "thread " + std::to_string(self_->id) + ": " + text + "\n  at " + describe(self_->site);
  go_on_with(nullptr);
  std::abort();
}

std::string Block::place(unsigned rank) const {
  const uint3 index = members_[rank].index;
  char text[96];
  std::snprintf(text, sizeof text, "block (%u, %u, %u), EMU_SEED=%llu: ", index.x, index.y, index.z,
                static_cast<unsigned long long>(seed()));
  return text;
}

bool Block::on_guard_page(const void* address) const {
  return std::any_of(stacks().begin(), stacks().end(), [&](const auto& stack) { return stack->guards(address); });
}

// "threads 0-31: __syncthreads at f (kernel.cuh:88)", one line for each run of threads that stand at one place.
std::string Block::describe_threads() const {
  std::string text;
  const auto stand_together = [](const Thread& a, const Thread& b) {
    return a.rank == b.rank && a.done == b.done && (a.done || (a.site == b.site && a.wait == b.wait));
  };
  for (std::size_t i = 0, end; i < threads_.size(); i = end) {
    const Thread& first = threads_[i];
    for (end = i; end < threads_.size() && stand_together(first, threads_[end]);) ++end;
    text += cluster() > 1 ? "  rank " + std::to_string(first.rank) + ", threads " : "  threads ";
    text += std::to_string(first.id) + "-" + std::to_string(threads_[end - 1].id) + ": ";
    if (first.done) {
      text += "ended\n";
      continue;
    }
    const std::string progress = first.wait ? first.wait->describe() : "";
    text += first.operation + (progress.empty() ? "" : " (" + progress + ")") + " at " + describe(first.site) + "\n";
  }
  return text;
}

}  // namespace sparseops_emulation
