// Stacks, and jumping from one to another: what CUDA's threads are made of here.
#pragma once
#include <cstddef>

namespace sparseops_emulation {

// A stack with an inaccessible page below it, so that running over its end faults at once.
class Stack {
 public:
  static constexpr std::size_t kBytes = 256 << 10;

  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  const void* bottom() const { return base_ + kGuard; }
  bool guards(const void* address) const;  // whether a fault there means that the stack was too small

  // The position of a fiber that has not started: jumping there calls `entry`, which must not return.
  void* prepare(void (*entry)()) const;
  // After a fiber was abandoned in the middle: what it had on its stack is gone.
  void wipe() const;

 private:
  static constexpr std::size_t kGuard = 4096;
  std::byte* base_;
};

// The stack that the program itself runs on, known once a fiber was entered from it.
struct MainStack {
  void* position = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
};

// Leaves the running stack, noting where in *from, and goes on at `to` of the stack that begins at `bottom`.
void jump(void** from, void* to, const void* bottom, std::size_t size);

// The first thing a fiber does.
void arrived(MainStack& main);

}  // namespace sparseops_emulation
