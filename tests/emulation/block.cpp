#include "block.h"

#include <link.h>

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

Block::Block(unsigned threads, std::size_t shared_bytes)
    : threads_(threads),
      warps_((threads + 31) / 32),
      shared_(allocate(shared_bytes, 1024)),
      shared_bytes_(shared_bytes),
      shuffled_(seed() != 0),
      random_(seed()) {
  while (stacks().size() < threads) stacks().push_back(std::make_unique<Stack>());
}

void Block::run(unsigned number, uint3 index, const std::function<void()>& kernel) {
  running = this;
  blockIdx = index;
  kernel_ = &kernel;
  error_.clear();
  std::memset(shared_.get(), kPoison, shared_bytes_);
  const memory::Range variables = shared_variables();
  if (variables.begin)
    std::memset(const_cast<std::byte*>(variables.begin), kPoison, std::size_t(variables.end - variables.begin));
  memory::begin_block(number, size(), {{shared_.get(), shared_.get() + shared_bytes_}, variables});
  for (unsigned i = 0; i < size(); ++i) {
    Thread& thread = threads_[i] = Thread{};
    thread.id = i;
    thread.lane = i % 32;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.warp = &warps_[i / 32];
    thread.position = stacks()[i]->prepare(&Block::enter);
  }
  warps_.assign(warps_.size(), Warp{});
  barrier_ = {};
  self_ = &threads_[shuffled_ ? random_() % size() : 0];
  threadIdx = self_->index;
  memory::running(self_->id);
  jump(&main_.position, self_->position, stacks()[self_->id]->bottom(), Stack::kBytes);
  memory::end_block();
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
    me.error_ = me.place() + e.what();
  }
  if (me.error_.empty()) {
    const auto& groups = me.self().copy_groups;
    const bool copies =
        !me.self().open_copies.empty() || std::any_of(groups.begin(), groups.end(), [](auto& g) { return !g.empty(); });
    if (copies) me.fail("ends with cp.async copies that it never waited for");
  }
  me.self().done = true;
  me.go_on_with(me.error_.empty() ? me.next() : nullptr);
  std::abort();  // nothing returns here
}

// A shuffled schedule mostly stays within a warp and now and then jumps: warps drift far apart, as on the device.
Thread* Block::next() {
  const auto first_that_can_run = [&](unsigned begin, unsigned count, unsigned start) -> Thread* {
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = threads_[begin + (start + i) % count];
      if (thread.can_run()) return &thread;
    }
    return nullptr;
  };
  constexpr unsigned kJumpOneIn = 64;
  Thread* thread = nullptr;
  if (!shuffled_) {
    thread = first_that_can_run(0, size(), self_->id + 1);
  } else {
    const unsigned warp = self_->id / 32 * 32, lanes = std::min(32u, size() - warp);
    if (random_() % kJumpOneIn) thread = first_that_can_run(warp, lanes, unsigned(random_() % lanes));
    if (!thread) thread = first_that_can_run(0, size(), unsigned(random_() % size()));
  }
  const auto done = [](const Thread& t) { return t.done; };
  if (!thread && !std::all_of(threads_.begin(), threads_.end(), done))
    error_ = place() + "deadlock: no thread can go on\n" + describe_threads();
  return thread;
}

// Null: with the code that launched the kernel.
void Block::go_on_with(Thread* thread) {
  Thread* from = self_;
  if (thread == from) return;
  if (!thread) return jump(&from->position, main_.position, main_.bottom, main_.size);
  self_ = thread;
  threadIdx = thread->index;
  memory::running(thread->id);
  jump(&from->position, thread->position, stacks()[thread->id]->bottom(), Stack::kBytes);
}

void Block::fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error_ = place() + "thread " + std::to_string(self().id) + ": " + text + "\n  at " + describe(self().site);
  go_on_with(nullptr);
  std::abort();
}

std::string Block::place() const {
  char text[96];
  std::snprintf(text, sizeof text, "block (%u, %u, %u), EMU_SEED=%llu: ", blockIdx.x, blockIdx.y, blockIdx.z,
                static_cast<unsigned long long>(seed()));
  return text;
}

void Block::wait(const Meeting& meeting, const char* operation, const void* site) {
  self_->wait = &meeting;
  self_->seen = meeting.generation;
  self_->operation = operation;
  self_->site = site;
  go_on_with(next());
  self_->wait = nullptr;
}

void Block::barrier(const char* operation, const void* site) { barrier_sum(operation, 0, site); }

int Block::barrier_sum(const char* operation, int value, const void* site) {
  self_->site = site;
  if (barrier_.arrived == 0) {
    barrier_operation_ = operation;
    sum_ = 0;
  } else if (std::strcmp(barrier_operation_, operation) != 0) {
    fail("the block diverges: %s here, %s elsewhere", operation, barrier_operation_);
  }
  sum_ += value;
  if (++barrier_.arrived < size()) {
    wait(barrier_, operation, site);
    return last_sum_;
  }
  barrier_.arrived = 0;
  ++barrier_.generation;
  memory::met();
  return last_sum_ = sum_;
}

void Block::meet(const char* operation, std::uint32_t mask, void* argument, Combine combine, const void* site) {
  Thread& me = *self_;
  Warp& warp = *me.warp;
  me.site = site;
  if (!(mask >> me.lane & 1)) fail("%s: the caller is not in its own mask", operation);
  if (warp.meeting.arrived == 0) {
    const unsigned lanes = std::min(32u, size() - me.id / 32 * 32);
    if (lanes < 32 && mask >> lanes) fail("%s: the mask names lanes that do not exist", operation);
    warp.operation = operation;
    warp.mask = mask;
    warp.arguments = {};
    warp.meeting.expected = static_cast<unsigned>(__builtin_popcount(mask));
  } else if (std::strcmp(warp.operation, operation) != 0 || warp.mask != mask) {
    fail("the warp diverges: %s of 0x%08x here, %s of 0x%08x elsewhere", operation, mask, warp.operation, warp.mask);
  }
  warp.arguments[me.lane] = argument;
  if (++warp.meeting.arrived < warp.meeting.expected) return wait(warp.meeting, operation, site);
  combine(warp.arguments);
  warp.meeting.arrived = 0;
  ++warp.meeting.generation;
}

bool Block::on_guard_page(const void* address) const {
  return std::any_of(stacks().begin(), stacks().end(), [&](const auto& stack) { return stack->guards(address); });
}

// "threads 0-31: __syncthreads at f (kernel.cuh:88)", one line for each run of threads that stand at one place.
std::string Block::describe_threads() const {
  std::string text;
  for (unsigned i = 0, end; i < size(); i = end) {
    const Thread& first = threads_[i];
    for (end = i; end < size() && threads_[end].done == first.done; ++end)
      if (!first.done && (threads_[end].site != first.site || threads_[end].wait != first.wait)) break;
    text += "  threads " + std::to_string(i) + "-" + std::to_string(end - 1) + ": ";
    text += first.done ? "ended\n" : std::string(first.operation) + " at " + describe(first.site) + "\n";
  }
  return text;
}

// They are thread_local (cuda_emulation.h), and the program has no other such variables: all that its image brings.
memory::Range shared_variables() {
#if defined(EMU_SHARED_VARIABLES_KNOWN)
  const auto look = [](dl_phdr_info* module, std::size_t, void* found) {
    const auto here = reinterpret_cast<ElfW(Addr)>(&shared_variables);
    const ElfW(Phdr)* variables = nullptr;
    bool is_ours = false;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const ElfW(Phdr) & part = module->dlpi_phdr[i];
      if (part.p_type == PT_TLS) variables = &part;
      const ElfW(Addr) begin = module->dlpi_addr + part.p_vaddr;
      if (part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz) is_ours = true;
    }
    if (is_ours && variables && module->dlpi_tls_data) {
      const auto begin = static_cast<const std::byte*>(module->dlpi_tls_data);
      *static_cast<memory::Range*>(found) = {begin, begin + variables->p_memsz};
    }
    return int(is_ours);
  };
  static const memory::Range range = [&] {
    memory::Range found;
    dl_iterate_phdr(look, &found);
    return found;
  }();
  return range;
#else
  return {};
#endif
}

}  // namespace sparseops_emulation
