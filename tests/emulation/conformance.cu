// Does the emulator do what a GPU does? One small kernel for each instruction of csrc/cuda/ptx.cuh, and on a GPU of
// compute capability 9.0 of ptx_sm90.cuh and wgmma_sp.cuh too (conformance_sm90.cuh), run on operands that a file holds,
// beside what a GPU made of them.
//
// To record a GPU (a second or two; nvcc and the GPU's driver are all it needs), at the root of the clone:
//
//     nvcc -std=c++17 -O2 -arch=native -Icsrc -o build/conformance tests/emulation/conformance.cu
//     build/conformance record > tests/emulation/conformance/<gpu>.txt
//
// with `-gencode arch=compute_90a,code=sm_90a` in place of `-arch=native` for compute capability 9.0. The file is text,
// about 110 KB, or 620 KB with the latter's instructions. Once committed, tests/test_emulation.py holds the emulator to
// it:
//
//     python tests/emulation/build.py plain conformance
//     build/emulation/plain/conformance replay tests/emulation/conformance/<gpu>.txt
//
// Both programs take both commands: a GPU can be held to another's file as well. Bits must be the same, but for sums in
// f32, which the hardware adds up in an order and a width of its own. Those may differ by 2^-20 of the sum of their
// terms' magnitudes, which is the bound that the kernels' tests use; where all terms are small integers, by nothing.
#include "conformance.h"

#include <cmath>
#include <fstream>
#include <map>
#include <sstream>

#include "conformance_sm90.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace {

using namespace sparseops;
using namespace conformance;

// ---- kernels: lane l reads words l * count to l * count + count - 1 of `in`, and writes `out` the same way

template <int count>
SPARSEOPS_DEVICE void take(uint32_t (&r)[count], const uint32_t* in, int words, int first) {
  for (int i = 0; i < count; ++i) r[i] = in[threadIdx.x * words + first + i];
}

template <class D>
SPARSEOPS_DEVICE void take_sums(D (&d)[4], const uint32_t* in, int words, int first) {
  for (int i = 0; i < 4; ++i) memcpy(&d[i], &in[threadIdx.x * words + first + i], 4);
}

template <class D>
SPARSEOPS_DEVICE void give_sums(const D (&d)[4], uint32_t* out) {
  for (int i = 0; i < 4; ++i) memcpy(&out[threadIdx.x * 4 + i], &d[i], 4);
}

constexpr int kDenseWords = 10, kSparseWords = 13;  // a, b, the sums before; a, b, metadata, the sums before

template <class T>
__global__ void dense(const uint32_t* in, uint32_t* out) {
  uint32_t a[4], b[2];
  float d[4];
  take(a, in, kDenseWords, 0);
  take(b, in, kDenseWords, 4);
  take_sums(d, in, kDenseWords, 6);
  ptx::mma_m16n8k16<T>(d, a, b);
  give_sums(d, out);
}

template <class T, int selector>
__global__ void sparse(const uint32_t* in, uint32_t* out) {
  uint32_t a[4], b[4], metadata[1];
  float d[4];
  take(a, in, kSparseWords, 0);
  take(b, in, kSparseWords, 4);
  take(metadata, in, kSparseWords, 8);
  take_sums(d, in, kSparseWords, 9);
  ptx::mma_sp_m16n8k32<T, selector>(d, a, b, metadata[0]);
  give_sums(d, out);
}

__global__ void sparse_s8(const uint32_t* in, uint32_t* out) {
  uint32_t a[4], b[4], metadata[1];
  int32_t d[4];
  take(a, in, kSparseWords, 0);
  take(b, in, kSparseWords, 4);
  take(metadata, in, kSparseWords, 8);
  take_sums(d, in, kSparseWords, 9);
  ptx::mma_sp_m16n8k64(d, a, b, metadata[0]);
  give_sums(d, out);
}

// Words 0-3: a row of a matrix; word 4: which row the lane asks for.
template <bool transposed>
__global__ void matrices(const uint32_t* in, uint32_t* out) {
  auto rows = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  for (int i = 0; i < 4; ++i) rows[threadIdx.x * 4 + i] = in[threadIdx.x * 5 + i];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4<transposed>(r, ptx::shared_address(rows) + in[threadIdx.x * 5 + 4] * 16);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

// Words 0-3: the source; word 4: how many of its bytes.
template <int bytes>
__global__ void copies(const uint32_t* in, uint32_t* out) {
  auto to = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  for (int i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = ~0u;
  ptx::cp_async<bytes>(ptx::shared_address(to + threadIdx.x * 4), in + threadIdx.x * 8, in[threadIdx.x * 8 + 4]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = to[threadIdx.x * 4 + i];
}

__global__ void streaming(const uint32_t* in, uint32_t* out) {
  const uint4 v = ptx::load_streaming(in + threadIdx.x * 4);
  out[threadIdx.x * 4 + 0] = v.x;
  out[threadIdx.x * 4 + 1] = v.y;
  out[threadIdx.x * 4 + 2] = v.z;
  out[threadIdx.x * 4 + 3] = v.w;
}

// Word 0: a counter's value; word 1: what to add.
__global__ void atomics(const uint32_t* in, uint32_t* out) {
  uint32_t* counter = out + threadIdx.x * 2;
  *counter = in[threadIdx.x * 2];
  out[threadIdx.x * 2 + 1] = ptx::atomic_add_acq_rel(counter, in[threadIdx.x * 2 + 1]);
}

// ---- operands

template <class T>
void dense_operands(Random& random, Words& in, Numbers numbers) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 6; ++i) in.push_back(pair<T>(random, numbers));
    for (int i = 0; i < 4; ++i) in.push_back(sum_before(random, numbers));
  }
}

template <class T, int selector>
void sparse_operands(Random& random, Words& in, Numbers numbers) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) in.push_back(pair<T>(random, numbers));
    const bool asked = lane % 4 / 2 == selector;  // what the others pass must not matter
    in.push_back(asked ? metadata(random) : random.next());
    for (int i = 0; i < 4; ++i) in.push_back(sum_before(random, numbers));
  }
}

void s8_operands(Random& random, Words& in, Numbers) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) in.push_back(random.next());
    in.push_back(metadata(random));
    for (int i = 0; i < 4; ++i) in.push_back(random.below(2000) - 1000);
  }
}

template <int bound>
void words_and_one_below(Random& random, Words& in, Numbers) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) in.push_back(random.next());
    in.push_back(random.below(bound));
  }
}

template <int bytes>
void copy_operands(Random& random, Words& in, Numbers) {
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) in.push_back(random.next());
    in[lane * 8 + 4] = lane % (bytes + 1);
  }
}

template <int count>
void words(Random& random, Words& in, Numbers) {
  for (int i = 0; i < 32 * count; ++i) in.push_back(random.next());
}

// ---- the cases, of one warp

using Kernel = void (*)(const uint32_t*, uint32_t*);
using Operands = void (*)(Random&, Words&, Numbers);

// `in` and `out` are words of a lane.
Case of_warp(const std::string& name, Kernel kernel, size_t in, size_t out, Operands operands, Numbers numbers) {
  Case c{name, 32 * in, 32 * out, in, out, {}, {}, {}, 0};
  c.launch = [=](const uint32_t* words, uint32_t* results) {
    return launch(kernel, 1, 32, 512, nullptr, words, results);
  };
  c.operands = [=](Random& random, Words& words) { operands(random, words, numbers); };
  return c;
}

// Outputs are f32 sums; the operands end with the sums before, and `metadata` says where in them it is.
Case sums_of_warp(const std::string& name, Kernel kernel, size_t in, Operands operands, Numbers numbers,
                  size_t metadata) {
  Case c = of_warp(name, kernel, in, 4, operands, numbers);
  if (numbers == Numbers::integers) return c;
  c.tolerance = kF32Sum;
  c.magnitude = [=](size_t i, uint32_t word) {
    if (i % in >= in - 4) return word & 0x7fffffff;
    return i % in == metadata ? word : word & 0x7fff7fff;
  };
  return c;
}

template <class T>
void add_type(std::vector<Case>& cases, const std::string& type) {
  constexpr size_t kNone = 99;
  for (const auto& [numbers, name] : {std::pair<Numbers, const char*>{Numbers::integers, "integers"},
                                      {Numbers::near_one, "near_one"},
                                      {Numbers::any, "any"}}) {
    const std::string of = "." + type + "." + name;
    cases.push_back(sums_of_warp("mma_m16n8k16" + of, dense<T>, kDenseWords, dense_operands<T>, numbers, kNone));
    cases.push_back(
        sums_of_warp("mma_sp_m16n8k32.selector0" + of, sparse<T, 0>, kSparseWords, sparse_operands<T, 0>, numbers, 8));
    cases.push_back(
        sums_of_warp("mma_sp_m16n8k32.selector1" + of, sparse<T, 1>, kSparseWords, sparse_operands<T, 1>, numbers, 8));
  }
}

std::vector<Case> all_cases(bool with_sm90) {
  std::vector<Case> cases;
  const auto exact = [&](const char* name, Kernel kernel, size_t in, size_t out, Operands operands) {
    cases.push_back(of_warp(name, kernel, in, out, operands, Numbers::any));
  };
  add_type<__half>(cases, "f16");
  add_type<__nv_bfloat16>(cases, "bf16");
  exact("mma_sp_m16n8k64.s8.1", sparse_s8, kSparseWords, 4, s8_operands);
  exact("mma_sp_m16n8k64.s8.2", sparse_s8, kSparseWords, 4, s8_operands);
  exact("ldmatrix_x4.plain", matrices<false>, 5, 4, words_and_one_below<32>);
  exact("ldmatrix_x4.transposed", matrices<true>, 5, 4, words_and_one_below<32>);
  exact("cp_async.4", copies<4>, 8, 4, copy_operands<4>);
  exact("cp_async.8", copies<8>, 8, 4, copy_operands<8>);
  exact("cp_async.16", copies<16>, 8, 4, copy_operands<16>);
  exact("load_streaming", streaming, 4, 4, words<4>);
  exact("atomic_add_acq_rel", atomics, 2, 2, words<2>);
  if (with_sm90) sm90::add_cases(cases);
  return cases;
}

// ---- running them

Words run(const Case& c, const Words& in) {
  Words out(c.out, ~0u);  // what nobody writes stays so
  void *device_in, *device_out;
  check(cudaMalloc(&device_in, in.size() * 4));
  check(cudaMalloc(&device_out, out.size() * 4));
  check(cudaMemcpy(device_in, in.data(), in.size() * 4, cudaMemcpyHostToDevice));
  check(cudaMemcpy(device_out, out.data(), out.size() * 4, cudaMemcpyHostToDevice));
  check(c.launch(static_cast<const uint32_t*>(device_in), static_cast<uint32_t*>(device_out)));
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(out.data(), device_out, out.size() * 4, cudaMemcpyDeviceToHost));
  check(cudaFree(device_in));
  check(cudaFree(device_out));
  return out;
}

void print(const char* what, const Words& words, size_t of_line) {
  for (size_t i = 0; i < words.size(); ++i)
    std::printf("%s%08x%s", i % of_line == 0 ? what : " ", static_cast<unsigned>(words[i]),
                i % of_line == of_line - 1 || i + 1 == words.size() ? "\n" : "");
}

bool has_sm90() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  return device.major == 9 && device.minor == 0;
}

int record() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  std::printf("# %s, compute capability %d.%d, CUDA %d.%d\n", device.name, device.major, device.minor,
              CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  if (has_sm90() && !sm90::is_compiled()) {
    std::fprintf(stderr, "conformance: this GPU's own instructions need -gencode arch=compute_90a,code=sm_90a\n");
    return 2;
  }
  uint64_t seed = 1;
  for (const Case& c : all_cases(has_sm90())) {
    Random random(seed++);
    Words in;
    c.operands(random, in);
    std::printf("case %s\n", c.name.c_str());
    print("in ", in, c.line);
    print("out ", run(c, in), c.out_line);
  }
  if (has_sm90()) sm90::print_experiments();
  return 0;
}

// How many outputs differ by more than they may.
size_t count_wrong(const Case& c, const Words& in, const Words& expected, const Words& got) {
  Words sizes;  // of sums: what their terms come to without signs, by the same instruction
  if (c.magnitude) {
    Words magnitudes(in.size());
    for (size_t i = 0; i < in.size(); ++i) magnitudes[i] = c.magnitude(i, in[i]);
    sizes = run(c, magnitudes);
  }
  size_t wrong = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (sizes.empty()) {
      wrong += got[i] != expected[i];
      continue;
    }
    float size, g, e;
    std::memcpy(&size, &sizes[i], 4);
    std::memcpy(&g, &got[i], 4);
    std::memcpy(&e, &expected[i], 4);
    wrong += !(std::abs(double(g) - double(e)) <= double(size) * c.tolerance);
  }
  return wrong;
}

int replay(const char* file) {
  struct Recorded {
    Words in, out;
  };
  std::map<std::string, Recorded> recorded;
  std::ifstream text(file);
  std::string line, head, name;
  while (std::getline(text, line)) {
    std::istringstream words(line);
    std::string kind;
    words >> kind;
    if (kind == "#") head = line;
    if (kind == "case") words >> name;
    if (kind != "in" && kind != "out") continue;
    Words& to = kind == "in" ? recorded[name].in : recorded[name].out;
    for (std::string word; words >> word;) to.push_back(static_cast<uint32_t>(std::stoul(word, nullptr, 16)));
  }
  const bool with_sm90 = head.find("compute capability 9.0") != std::string::npos;
  if (with_sm90 && !(has_sm90() && sm90::is_compiled()))
    std::printf("the instructions of compute capability 9.0 are left out: there are none here\n");
  int failed = 0;
  for (const Case& c : all_cases(with_sm90 && has_sm90() && sm90::is_compiled())) {
    const Recorded& of = recorded[c.name];
    if (of.in.size() != c.in || of.out.size() != c.out) {
      std::printf("FAIL %s: is not in %s as this program records it\n", c.name.c_str(), file);
      ++failed;
      continue;
    }
    const size_t wrong = count_wrong(c, of.in, of.out, run(c, of.in));
    std::printf("%s %s", wrong ? "FAIL" : "ok  ", c.name.c_str());
    if (wrong) std::printf(": %zu of %zu differ", wrong, of.out.size());
    std::printf("\n");
    failed += wrong != 0;
  }
  std::printf("%s %s\n", failed ? "differs from" : "agrees with", head.c_str());
  return failed != 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  if (command == "record" && argc == 2) return record();
  if (command == "replay" && argc == 3) return replay(argv[2]);
  std::fprintf(stderr, "usage: %s record > FILE, or %s replay FILE\n", argv[0], argv[0]);
  return 2;
}
