// See test_support.h.
#include "test_support.h"

#include <chrono>
#include <map>

namespace sparseops_emulation {

std::vector<std::uint8_t> random_meta(std::int64_t groups_of_four, Random& random) {
  static constexpr std::uint8_t kNibbles[] = {0x4, 0x8, 0x9, 0xc, 0xd, 0xe};
  std::vector<std::uint8_t> meta((groups_of_four + 1) / 2);
  for (std::int64_t i = 0; i < groups_of_four; ++i)
    meta[i / 2] |= static_cast<std::uint8_t>(kNibbles[random.below(6)] << 4 * (i % 2));
  return meta;
}

std::vector<std::uint8_t> pack_slabs(const std::vector<std::uint8_t>& meta, std::int64_t rows, std::int64_t cols,
                                     std::int64_t groups, bool bytes, std::int64_t* slab_rows) {
  const auto round_up = [](std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; };
  const std::int64_t of_group = rows / groups, padded = round_up(of_group, 16);
  *slab_rows = round_up(padded * groups, 128);
  std::vector<std::uint8_t> slabs(round_up(cols, 128) / 128 * *slab_rows * 16, 0x44);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t m = row / of_group * padded + row % of_group;
    for (std::int64_t k = 0; k < cols; k += 8) {
      std::int64_t slot = m, byte = k % 128 / 8;
      if (!bytes) {  // slot 8q + g of the tile of 16 rows, word of the step of 32 columns, half of the row's eight
        slot = m / 16 * 16 + (k >> 4 & 1) * 8 + m % 8;
        byte = (k >> 5 & 3) * 4 + (m >> 3 & 1) * 2 + (k >> 3 & 1);
      }
      slabs[((k / 128) * *slab_rows + slot) * 16 + byte] = meta[(row * cols + k) / 8];
    }
  }
  return slabs;
}

void require(const char* error) {
  if (error) throw Error(error);
}

void expect_error(const std::string& part, const std::function<void()>& body) {
  std::string error;
  try {
    body();
  } catch (const Error& e) {
    error = e.what();
  }
  if (error.find(part) != std::string::npos) return;
  throw Error("expected an error with \"" + part + "\", got " + (error.empty() ? "none" : error));
}

void expect_equal_bytes(const void* got, const void* expected, std::size_t count, std::size_t element_size) {
  const auto g = static_cast<const std::byte*>(got), e = static_cast<const std::byte*>(expected);
  std::size_t wrong = 0, first = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (std::memcmp(g + i * element_size, e + i * element_size, element_size) == 0) continue;
    if (wrong++ == 0) first = i;
  }
  if (!wrong) return;
  std::string text = std::to_string(wrong) + " of " + std::to_string(count) + " wrong, first element " +
                     std::to_string(first) + ": got 0x";
  const auto hex = [&](const std::byte* bytes) {
    for (std::size_t i = element_size; i-- > 0;) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", std::to_integer<unsigned>(bytes[i]));
      text += digits;
    }
  };
  hex(g + first * element_size);
  text += ", expected 0x";
  hex(e + first * element_size);
  throw Error(text);
}

void expect_within(const std::vector<double>& got, const std::vector<double>& expected, const std::vector<double>& size,
                   double unit) {
  if (got.size() != expected.size() || (!size.empty() && size.size() != got.size()))
    throw Error("expect_close: the sizes differ");
  std::size_t wrong = 0, worst_at = 0;
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double bound = unit * std::abs(expected[i]) + 0x1p-20 * (size.empty() ? 0 : size[i]) + 1e-6;
    double error = std::abs(got[i] - expected[i]) / bound;
    if (std::isnan(got[i]) && std::isnan(expected[i])) error = 0;
    if (got[i] == expected[i]) error = 0;  // infinities
    if (!(error <= 1)) ++wrong;
    if (!(error <= worst)) {  // the first NaN stays
      if (std::isnan(worst)) continue;
      worst = error;
      worst_at = i;
    }
  }
  if (!wrong) return;
  char text[200];
  std::snprintf(text, sizeof text, "%zu of %zu wrong, worst at element %zu: got %g, expected %g, %.3g times the bound",
                wrong, got.size(), worst_at, got[worst_at], expected[worst_at], worst);
  throw Error(text);
}

namespace {

std::string line_of(const memory::Traffic& t) {
  char numbers[200];
  std::snprintf(numbers, sizeof numbers, "%-6s %-5s %3zu B  requests %7llu  %s/request %6.2f (ideal %6.2f)%s  ",
                t.shared ? "shared" : "global", t.store ? "store" : "load", t.bytes,
                static_cast<unsigned long long>(t.requests), t.shared ? "passes " : "sectors",
                double(t.units) / double(t.requests), double(t.ideal) / double(t.requests),
                t.units > t.ideal ? " *" : "  ");
  return numbers + t.place;
}

// Whether a line was found, in all that ran so far, for each exception asked for.
std::map<std::string, bool>& exceptions_needed() {
  static std::map<std::string, bool> needed;
  return needed;
}

}  // namespace

void expect_all_splits_busy(const Buffer<float>& partials, std::int64_t tiles, int splits, std::int64_t slabs) {
  const std::int64_t deep = (slabs + splits - 1) / splits;
  if ((slabs + deep - 1) / deep != splits) return;  // even the best share leaves some of them idle
  const std::size_t size = partials.size() / (tiles * splits);
  for (std::int64_t i = 0; i < tiles * splits; ++i) {
    const float* first = partials.data() + i * size;
    if (std::all_of(first, first + size, [](float sum) { return sum == 0; }))
      throw Error("split " + std::to_string(i % splits) + " of tile " + std::to_string(i / splits) + " did nothing");
  }
}

void expect_ideal_traffic(const std::vector<Exception>& exceptions) {
  if (!memory::kChecked) return;
  for (const Exception& exception : exceptions) exceptions_needed().try_emplace(exception.where, false);
  const bool print = std::getenv("EMU_TRAFFIC");
  std::string wrong;
  for (const memory::Traffic& traffic : memory::take_traffic()) {
    const std::string line = line_of(traffic);
    if (print) std::printf("     %s\n", line.c_str());
    if (traffic.units <= traffic.ideal) continue;
    bool excused = false;
    for (const Exception& exception : exceptions) {
      if (line.find(exception.where) == std::string::npos) continue;
      excused = exceptions_needed()[exception.where] = true;
    }
    if (!excused) wrong += "\n  " + line;
  }
  if (!wrong.empty()) throw Error("more traffic than the bytes need:" + wrong);
}

void Tests::run_case(const std::string& name, const std::function<void()>& body) {
  for (const std::string& word : words_)
    if (name.find(word) == std::string::npos) return;
  ++run_;
  const auto start = std::chrono::steady_clock::now();
  std::string error;
  memory::take_traffic();
  try {
    body();
  } catch (const std::exception& e) {
    error = e.what();
  }
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
  if (error.empty() && std::getenv("EMU_TRAFFIC"))
    for (const memory::Traffic& traffic : memory::take_traffic()) std::printf("     %s\n", line_of(traffic).c_str());
  std::printf("%s %s  %.1f ms%s%s\n", error.empty() ? "ok  " : "FAIL", name.c_str(), time.count(),
              error.empty() ? "" : ": ", error.c_str());
  std::fflush(stdout);
  failed_ += !error.empty();
}

int Tests::result() const {
  if (run_ == 0) std::printf("FAIL no case has a name that holds these words\n");
  int not_needed = 0;
  if (words_.empty()) {
    for (const auto& [where, needed] : exceptions_needed()) {
      if (needed) continue;
      std::printf("FAIL expect_ideal_traffic: in no case does a line need the exception for %s\n", where.c_str());
      ++not_needed;
    }
  }
  return failed_ || not_needed || run_ == 0;
}

}  // namespace sparseops_emulation
