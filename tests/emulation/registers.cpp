// setmaxnreg: PTX ISA 9.7.19.5. The registers that one warpgroup gives back to its block another may take.
#include <deque>
#include <map>

#include "block.h"
#include "ptx_sm90_emulation.h"

namespace sparseops_emulation {
namespace {

constexpr int kFile = 65536;  // registers of a multiprocessor, which a block that uses setmaxnreg has to itself
constexpr int kWarpgroup = 128;

struct Pool : Event {
  struct Request {
    unsigned warpgroup;
    int count;
  };

  int free = 0;
  std::map<unsigned, int> count_of;  // of a thread, by warpgroup
  std::deque<Request> requests;

  int& count(unsigned warpgroup) {
    // all get the same at first, as many as the compiler may give a thread of such a block
    const int first = std::min(kFile / static_cast<int>(block().size()) / 8 * 8, 256);
    return count_of.try_emplace(warpgroup, first).first->second;
  }

  void ask(unsigned warpgroup, int wanted) {
    requests.push_back({warpgroup, wanted});
    for (std::size_t i = 0; i < requests.size();) {
      const Request request = requests[i];
      int& has = count(request.warpgroup);
      const int more = (request.count - has) * kWarpgroup;
      if (more > free) {
        ++i;
        continue;
      }
      free -= more;
      has = request.count;
      ++generation;
      requests.erase(requests.begin() + std::ptrdiff_t(i));
      i = 0;  // what was given back may serve an earlier one
    }
  }

  std::string describe() const override { return std::to_string(free) + " registers are free"; }
};

struct Pools {
  Pool of_rank[kMaxCluster];
};

}  // namespace

void set_max_registers(int count, bool more) {
  const char* what = more ? "setmaxnreg.inc" : "setmaxnreg.dec";
  const void* site = EMU_SITE;
  Block& b = block();
  const Thread& me = b.self();
  b.self().site = site;
  if (count < 24 || count > 256 || count % 8) b.fail("%s: %d registers, of multiples of 8 from 24 to 256", what, count);
  Pool& pool = b.state<Pools>().of_rank[me.rank];
  const unsigned warpgroup = me.id / kWarpgroup;
  b.meet_warpgroup(
      what, &count,
      [&](const WarpgroupLanes& lanes) {
        for (const void* other : lanes)
          if (*static_cast<const int*>(other) != count)
            b.fail("%s: %d registers here, %d elsewhere in the warpgroup", what, count,
                   *static_cast<const int*>(other));
        const int has = pool.count(warpgroup);
        if (more ? count < has : count > has) b.fail("%s: %d registers, but a thread has %d", what, count, has);
        pool.ask(warpgroup, count);
      },
      site);
  while (pool.count(warpgroup) != count) b.wait(pool, what, site);
}

void griddepcontrol_wait() {}
void griddepcontrol_launch_dependents() {}

}  // namespace sparseops_emulation
