// The emulator itself: threads, collectives, launches, and that what a kernel does wrong is an error with a place.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "test_support.h"

using namespace sparseops;

namespace {

// ---- threads and collectives

__global__ void number_threads(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = 1000 * block + thread;
}

enum class Kind { index, down, up, exclusive_or };

__global__ void shuffle(int* out, Kind kind, int operand, int width) {
  const int lane = int(threadIdx.x), v = 100 + lane;
  if (kind == Kind::index) out[lane] = __shfl_sync(~0u, v, operand, width);
  if (kind == Kind::down) out[lane] = __shfl_down_sync(~0u, v, unsigned(operand), width);
  if (kind == Kind::up) out[lane] = __shfl_up_sync(~0u, v, unsigned(operand), width);
  if (kind == Kind::exclusive_or) out[lane] = __shfl_xor_sync(~0u, v, operand, width);
}

__global__ void shuffle_types(double* out) {
  const int lane = int(threadIdx.x);
  out[lane] = __shfl_sync(~0u, 0.5 * lane, 31 - lane) + float(__shfl_xor_sync(~0u, __half(float(lane)), 1)) +
              double(__shfl_sync(~0u, (1ll << 40) + lane, 5));
}

__global__ void votes(unsigned* out) {
  const unsigned t = threadIdx.x;
  unsigned v = __ballot_sync(~0u, t % 3 == 0);
  v += unsigned(__any_sync(~0u, t == 9)) << 1 | unsigned(__all_sync(~0u, t < 64)) << 2;
  v += unsigned(__any_sync(~0u, t == 99)) << 3 | unsigned(__all_sync(~0u, t % 32 > 0)) << 4;
  if (t % 32 < 16) v += __ballot_sync(0xffff, 1);  // half a warp by itself
  out[t] = v + unsigned(__syncthreads_count(t % 2)) + 1000 * unsigned(__syncthreads_or(t == 63)) +
           2000 * unsigned(__syncthreads_and(t < 63));
}

__global__ void sum_by_atomics(int* out) {
  __shared__ int sum, highest;
  if (threadIdx.x == 0) sum = highest = 0;
  __syncthreads();
  atomicAdd(&sum, int(threadIdx.x));
  atomicMax(&highest, int(threadIdx.x));
  __syncthreads();
  atomicCAS(&highest, 63, -1);
  __syncthreads();
  out[threadIdx.x] = sum + highest;
}

__global__ void note_order(unsigned* next, unsigned* order) {
  order[atomicAdd(next, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

// Which warp came by, each time that one does.
__global__ void note_progress(unsigned* next, unsigned* order) {
  for (int i = 0; i < 100; ++i) {
    if (threadIdx.x % 32 == 0) order[atomicAdd(next, 1u)] = threadIdx.x / 32;
    __syncwarp();
  }
}

__global__ void read_untouched(uint32_t* out) {
  __shared__ uint32_t variable[32];
  auto dynamic = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  out[64 * blockIdx.x + threadIdx.x] = dynamic[threadIdx.x];
  out[64 * blockIdx.x + 32 + threadIdx.x] = variable[threadIdx.x];
  dynamic[threadIdx.x] = variable[threadIdx.x] = 5;  // the next block must not see it
}

void threads(emu::Tests& tests) {
  tests.run("threads and blocks in three dimensions", [] {
    emu::Buffer<unsigned> out(24 * 30);
    emu::run(number_threads, dim3(2, 3, 4), dim3(5, 3, 2), 0, out.data());
    std::vector<unsigned> expected;
    for (unsigned i = 0; i < 24 * 30; ++i) expected.push_back(i / 30 * 1000 + i % 30);
    emu::expect_equal(out, expected);
  });
  for (const int width : {32, 16, 4})
    for (const int operand : {0, 1, 3, 5, 17})
      tests.run("shuffles by %d of %d", operand, width, [=] {
        for (const Kind kind : {Kind::index, Kind::down, Kind::up, Kind::exclusive_or}) {
          emu::Buffer<int> out(32);
          emu::run(shuffle, 1, 32, 0, out.data(), kind, operand, width);
          std::vector<int> expected;
          for (int lane = 0; lane < 32; ++lane) {
            const int first = lane / width * width;
            int from = lane;
            if (kind == Kind::index) from = first + operand % width;
            if (kind == Kind::down && lane + operand < first + width) from = lane + operand;
            if (kind == Kind::up && lane - operand >= first) from = lane - operand;
            if (kind == Kind::exclusive_or && (lane ^ operand) < first + width) from = lane ^ operand;
            expected.push_back(100 + from);
          }
          emu::expect_equal(out, expected);
        }
      });
  tests.run("shuffles of other types", [] {
    emu::Buffer<double> out(32);
    emu::run(shuffle_types, 1, 32, 0, out.data());
    std::vector<double> expected;
    for (int lane = 0; lane < 32; ++lane) expected.push_back(0.5 * (31 - lane) + (lane ^ 1) + double((1ll << 40) + 5));
    emu::expect_equal(out, expected);
  });
  tests.run("votes", [] {
    emu::Buffer<unsigned> out(64);
    emu::run(votes, 1, 64, 0, out.data());
    std::vector<unsigned> expected;
    for (unsigned t = 0; t < 64; ++t) {
      unsigned v = t < 32 ? 0x49249249u : 0x92492492u;
      v += (t < 32 ? 2u : 0u) + 4u + (t % 32 < 16 ? 0xffffu : 0u);
      expected.push_back(v + 32 + 1000);
    }
    emu::expect_equal(out, expected);
  });
  tests.run("atomics", [] {
    emu::Buffer<int> out(64);
    emu::run(sum_by_atomics, 1, 64, 0, out.data());
    emu::expect_equal(out, std::vector<int>(64, 63 * 32 - 1));
  });
  tests.run("shared memory begins spoiled in each block", [] {
    if (!emu::shared_variables().begin) return;  // nothing is known of the variables in this build
    emu::Buffer<uint32_t> out(192, 0);
    emu::run(read_untouched, 3, 32, 128, out.data());
    emu::expect_equal(out, std::vector<uint32_t>(192, ~0u));
  });
}

// ---- the schedule

std::vector<unsigned> order_with_seed(const char* seed, void (*kernel)(unsigned*, unsigned*) = note_order,
                                      unsigned blocks = 4, unsigned threads = 96, unsigned notes = 4 * 96) {
  const char* before = std::getenv("EMU_SEED");
  const std::string kept = before ? before : "";
  setenv("EMU_SEED", seed, 1);
  emu::Buffer<unsigned> next(1, 0u), order(notes);
  emu::run(kernel, blocks, threads, 0, next.data(), order.data());
  before ? setenv("EMU_SEED", kept.c_str(), 1) : unsetenv("EMU_SEED");
  return {order.data(), order.data() + order.size()};
}

void schedule(emu::Tests& tests) {
  tests.run("seed 0 runs in order", [] {
    const auto order = order_with_seed("0");
    for (unsigned i = 0; i < order.size(); ++i)
      if (order[i] != i) throw emu::Error("out of order");
  });
  tests.run("other seeds shuffle blocks, warps and lanes, and repeat", [] {
    const auto first = order_with_seed("1");
    if (first != order_with_seed("1")) throw emu::Error("seed 1 does not repeat");
    if (first == order_with_seed("2")) throw emu::Error("seeds 1 and 2 are the same");
    const auto moved = [&](unsigned unit) {
      for (unsigned i = 0; i < first.size(); i += unit)
        if (first[i] / unit != i / unit) return true;
      return false;
    };
    if (!moved(96) || !moved(32) || !moved(1)) throw emu::Error("something stays in order");
  });
  tests.run("other seeds let warps drift apart, and not run to the end", [] {
    const auto order = order_with_seed("1", note_progress, 1, 128, 400);
    int turns = 0, lead = 0, done[4] = {};
    for (std::size_t i = 0; i < order.size(); ++i) {
      turns += i > 0 && order[i] != order[i - 1];
      ++done[order[i]];
      lead = std::max(lead, *std::max_element(done, done + 4) - *std::min_element(done, done + 4));
    }
    if (turns < 20 || lead < 5) throw emu::Error(std::to_string(turns) + " turns, " + std::to_string(lead) + " apart");
  });
}

// ---- what a kernel does wrong

__global__ void skip_a_barrier() {
  if (threadIdx.x < 64) __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads_or(1);
}
__global__ void two_collectives(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(~0u, 1, 0) : int(__ballot_sync(~0u, 1));
}
__global__ void skip_a_collective() {
  if (threadIdx.x % 2) __syncwarp();
}
__global__ void not_in_its_mask() { __syncwarp(1); }
__global__ void read_outside_the_mask() {
  if (threadIdx.x < 8) __shfl_sync(0xff, 1, 9);
}
__global__ void matrices_in_half_a_warp() {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) ptx::mma_m16n8k16<__half>(d, a, b);
}
__global__ void write_to(int* p) { *p = 1; }
__global__ void divide(int* out, int by) { *out = 7 / by; }
__global__ void read_wide(const char* p, uint4* out) { *out = __ldcg(reinterpret_cast<const uint4*>(p)); }
__device__ [[gnu::noinline]] int recurse(int depth) {
  volatile int frame[256] = {depth};
  return depth > 0 ? recurse(depth - 1) + frame[0] : 0;
}
__global__ void run_over_the_stack(int* out, int depth) { *out = recurse(depth); }
__global__ void give_up() { __trap(); }

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kFaultsAreErrors = false;  // AddressSanitizer ends the program, with a report
#else
constexpr bool kFaultsAreErrors = true;
#endif

void mistakes(emu::Tests& tests) {
  const auto expect = [&](const char* name, const char* part, auto kernel, unsigned threads, auto... arguments) {
    tests.run(std::string(name), [=] {
      emu::expect_error(part, [=] { emu::run(kernel, 1, threads, 64, arguments...); });
      emu::expect_error("emulator_test.cpp", [=] { emu::run(kernel, 1, threads, 64, arguments...); });  // says where
    });
  };
  static emu::Buffer<int> out(64);
  expect("a barrier that half the block skips", "deadlock", skip_a_barrier, 128);
  expect("a block at two barriers", "the block diverges", two_barriers, 128);
  expect("a warp in two collectives", "the warp diverges", two_collectives, 32, out.data());
  expect("a collective that half the warp skips", "deadlock", skip_a_collective, 32);
  expect("a caller outside its mask", "not in its own mask", not_in_its_mask, 32);
  expect("lanes that do not exist", "lanes that do not exist", skip_a_collective, 16);
  expect("a shuffle from outside the mask", "lane 0 reads lane 9", read_outside_the_mask, 32);
  expect("mma in half a warp", "deadlock", matrices_in_half_a_warp, 32);
  expect("__trap", "__trap", give_up, 1);
  static uint4 wide[2];
  expect("a misaligned load", "no multiple", read_wide, 1, reinterpret_cast<const char*>(wide) + 4, wide);
  if (!kFaultsAreErrors) return;
  expect("an invalid address", "an invalid or misaligned address", write_to, 32, reinterpret_cast<int*>(64));
  expect("a division by zero", "division by zero", divide, 1, out.data(), 0);
  expect("too deep a stack", "KiB of stack", run_over_the_stack, 1, out.data(), 1000);
  tests.run("the emulator works on after a fault", [] {
    emu::run(run_over_the_stack, 1, 1, 0, out.data(), 1);
    emu::run(write_to, 1, 1, 0, &out[1]);
  });
}

// ---- launches as host code makes them

void launches(emu::Tests& tests) {
  tests.run("launch reports errors as CUDA does", [] {
    emu::Buffer<int> data(1);
    const auto expect = [](cudaError_t error, cudaError_t expected, const char* text) {
      if (error != expected || cudaGetLastError() != expected) throw emu::Error("not this error: " + std::string(text));
      if (!std::strstr(cudaGetErrorString(error), text)) throw emu::Error(cudaGetErrorString(error));
      if (cudaGetLastError() != cudaSuccess) throw emu::Error("the error stays");
    };
    expect(launch(write_to, 1, 1, 0, nullptr, data.data()), cudaSuccess, "no error");
    expect(launch(skip_a_barrier, 1, 128, 0, nullptr), cudaErrorLaunchFailure, "deadlock");
    for (const auto& [grid, block, bytes] : {std::tuple{dim3(1), dim3(1025), 0},
                                             {dim3(1), dim3(0), 0},
                                             {dim3(0), dim3(1), 0},
                                             {dim3(1, 65536), dim3(1), 0},
                                             {dim3(1), dim3(1), 227 * 1024 + 1}})
      expect(launch(skip_a_barrier, grid, block, size_t(bytes), nullptr), cudaErrorInvalidConfiguration, " must ");
    expect(launch(skip_a_barrier, 1, 64, 227 * 1024, nullptr), cudaSuccess, "no error");
  });
  const auto expect_device = [](const char* capability, int major, int multiprocessors, int shared_bytes) {
    setenv("EMU_CAPABILITY", capability, 1);
    int value = 0;
    for (const auto& [attribute, expected] : {std::pair{cudaDevAttrComputeCapabilityMajor, major},
                                              {cudaDevAttrComputeCapabilityMinor, 0},
                                              {cudaDevAttrMultiProcessorCount, multiprocessors},
                                              {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_bytes}})
      emu::require(cudaDeviceGetAttribute(&value, attribute, 0) == cudaSuccess && value == expected ? nullptr
                                                                                                    : "attribute");
    const auto allow = [](int bytes) {
      return cudaFuncSetAttribute(reinterpret_cast<const void*>(skip_a_barrier),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    emu::require(allow(shared_bytes) == cudaSuccess ? nullptr : "as much shared memory as there is");
    emu::require(allow(shared_bytes + 1) == cudaErrorInvalidValue ? nullptr : "more shared memory than there is");
    cudaGetLastError();
    unsetenv("EMU_CAPABILITY");
  };
  tests.run("one device", [=] {
    int value = 0;
    emu::require(cudaGetDeviceCount(&value) == cudaSuccess && value == 1 ? nullptr : "cudaGetDeviceCount");
    emu::require(cudaSetDevice(1) == cudaErrorInvalidDevice ? nullptr : "cudaSetDevice(1)");
    cudaGetLastError();
    expect_device("8.0", 8, 108, 163 * 1024);
    expect_device("9.0", 9, 132, 227 * 1024);
    emu::require(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && value == 8
                     ? nullptr
                     : "8.0 is not what is emulated if nobody asks");
  });
}

// ---- traffic

__global__ void touch_shared(int lane_stride, int bytes) {
  unsigned char* p = ptx::dynamic_shared() + threadIdx.x * lane_stride;
  if (bytes == 2) *reinterpret_cast<uint16_t*>(p) = 1;
  if (bytes == 4) *reinterpret_cast<uint32_t*>(p) = 1;
  if (bytes == 8) *reinterpret_cast<uint2*>(p) = make_uint2(1, 1);
  if (bytes == 16) *reinterpret_cast<uint4*>(p) = make_uint4(1, 1, 1, 1);
}

__global__ void read_matrices(int row_stride, int swizzle) {
  const unsigned row = threadIdx.x % 8, chunk = threadIdx.x / 8;
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(ptx::dynamic_shared()) + row * row_stride + ((chunk ^ (row & swizzle)) << 4));
}

__global__ void read_global(const unsigned char* in, int lane_stride, int bytes, int lanes, uint32_t* out) {
  const unsigned char* p = in + threadIdx.x * lane_stride;
  if (int(threadIdx.x) >= lanes) return;
  if (bytes == 4) out[threadIdx.x] = *reinterpret_cast<const uint32_t*>(p);
  if (bytes == 16) out[threadIdx.x] = __ldcg(reinterpret_cast<const uint4*>(p)).y;
}

void traffic(emu::Tests& tests) {
  if (!emu::memory::kChecked) return;
  const auto expect = [](bool shared, bool store, uint64_t requests, uint64_t units, uint64_t ideal) {
    std::string text;
    for (const auto& line : emu::memory::take_traffic()) {
      if (line.shared != shared || line.store != store) continue;
      if (line.requests == requests && line.units == units && line.ideal == ideal) return;
      text += std::to_string(line.requests) + " requests, " + std::to_string(line.units) + " of " +
              std::to_string(line.ideal) + " at " + line.place + "\n";
    }
    throw emu::Error("other traffic: " + text);
  };
  for (const auto& [stride, bytes, passes, ideal] : {std::tuple{4, 4, 1, 1},
                                                     {8, 4, 2, 1},
                                                     {12, 4, 1, 1},
                                                     {128, 4, 32, 1},
                                                     {132, 4, 1, 1},
                                                     {2, 2, 1, 1},
                                                     {8, 8, 2, 2},
                                                     {16, 8, 4, 2},
                                                     {16, 16, 4, 4},
                                                     {32, 16, 8, 4},
                                                     {128, 16, 32, 4},
                                                     {144, 16, 4, 4}})
    tests.run("passes of %d bytes at every %d", bytes, stride,
              [=, stride = stride, bytes = bytes, passes = passes, ideal = ideal] {
                emu::run(touch_shared, 1, 32, 8192, stride, bytes);
                expect(true, true, 1, uint64_t(passes), uint64_t(ideal));
              });
  tests.run("passes of ldmatrix", [=] {
    emu::run(read_matrices, 1, 32, 2048, 128, 0);
    expect(true, false, 1, 32, 4);
    emu::run(read_matrices, 1, 32, 2048, 128, 7);
    expect(true, false, 1, 4, 4);
    emu::run(read_matrices, 1, 32, 2048, 144, 0);
    expect(true, false, 1, 4, 4);
  });
  for (const auto& [stride, bytes, lanes, sectors, ideal] : {std::tuple{4, 4, 32, 4, 4},
                                                             {0, 4, 32, 1, 1},
                                                             {8, 4, 32, 8, 4},
                                                             {128, 4, 32, 32, 4},
                                                             {16, 16, 32, 16, 16},
                                                             {4, 4, 9, 2, 2}})
    tests.run("sectors of %d bytes at every %d in %d lanes", bytes, stride, lanes,
              [=, stride = stride, bytes = bytes, lanes = lanes, sectors = sectors, ideal = ideal] {
                emu::Buffer<unsigned char> in(4096, 1);
                emu::Buffer<uint32_t> out(32);
                emu::run(read_global, 1, 32, 0, static_cast<const unsigned char*>(in.data()), stride, bytes, lanes,
                         out.data());
                expect(false, false, 1, uint64_t(sectors), uint64_t(ideal));
              });
  tests.run("expect_ideal_traffic", [=] {
    emu::run(touch_shared, 1, 32, 8192, 128, 4);
    emu::expect_error("touch_shared", [] { emu::expect_ideal_traffic({}); });
    emu::run(touch_shared, 1, 32, 8192, 128, 4);
    emu::expect_ideal_traffic({{"touch_shared", "on purpose"}});
  });
}

// ---- the checks that kernels' tests rely on

void checks(emu::Tests& tests) {
  tests.run("expect_close", [] {
    const std::vector<double> expected = {1, -2, 1000, 0};
    emu::Buffer<__half> got(std::vector<__half>{__half(1.f), __half(-2.f), __half(1000.f), __half(0.f)});
    emu::expect_close(got, expected, {});
    got[2] = __half(1001.f);
    emu::expect_error("1 of 4 wrong, worst at element 2", [&] { emu::expect_close(got, expected, {}); });
    emu::expect_close(got, expected, {0, 0, 0x1p20, 0});
    got[1] = __ushort_as_half(0x7fff);
    emu::expect_error("2 of 4 wrong, worst at element 1", [&] { emu::expect_close(got, expected, {}); });
    emu::expect_error("the sizes differ", [&] { emu::expect_close(got, {1}, {}); });
  });
  tests.run("expect_equal", [] {
    emu::Buffer<uint16_t> got(std::vector<uint16_t>{1, 2, 0xabc});
    emu::expect_equal(got, {1, 2, 0xabc});
    emu::expect_error("1 of 3 wrong, first element 2: got 0x0abc, expected 0x0003",
                      [&] { emu::expect_equal(got, {1, 2, 3}); });
    emu::expect_error("the sizes differ", [&] { emu::expect_equal(got, {1, 2}); });
  });
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  threads(tests);
  schedule(tests);
  mistakes(tests);
  launches(tests);
  traffic(tests);
  checks(tests);
  return tests.result();
}
