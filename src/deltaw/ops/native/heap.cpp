// What glibc's heap holds for a sequence of allocations: plan/heap.py, which is the reference, step for step.
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <set>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t kMostMapped = 32 << 20, kFirst = 128 << 10, kAskedMore = 96, kPage = 4096, kMapped = -1, kNone = -2;
constexpr int64_t kPad = 128 << 10, kStuckEvery = 8, kStuckFrom = 256 << 10;

// Types of this file, so that no template made of them is seen outside the library.
struct Piece {
    int64_t size, at;
    bool operator<(const Piece& other) const { return size != other.size ? size < other.size : at < other.at; }
};
struct Hash {
    size_t operator()(int64_t at) const { return size_t(at) >> 4; }
};
using Places = std::unordered_map<int64_t, int64_t, Hash>;

class Heap {
  public:
    explicit Heap(int64_t storages) : at_(storages, kNone), size_(storages) {}
    int64_t peak() const { return peak_; }
    bool has(int64_t name) const { return at_[name] != kNone; }

    void allocate(int64_t name, int64_t size) {
        size = std::max<int64_t>(32, (size + 23) & ~int64_t(15));
        const int64_t wanted = size + kAskedMore;
        const auto found = free_.lower_bound({wanted, 0});
        int64_t at = kMapped;
        if (found != free_.end()) {
            const int64_t whole = found->size;
            at = found->at;
            take(at, whole);
            const int64_t rest = whole - size - stick(at + size, size);
            if (rest >= 32) put(at + whole - rest, rest);
            else size += rest;
        } else if (wanted < threshold_ || end_ - top_ >= wanted) {
            if (end_ - top_ < wanted) end_ = top_ + wanted + kPad;
            at = top_;
            top_ += size + stick(at + size, size);
        } else {
            size = (wanted + kPage - 1) / kPage * kPage;
            mapped_ += size;
        }
        at_[name] = at;
        size_[name] = size;
        peak_ = std::max(peak_, end_ + mapped_);
    }

    void release(int64_t name) {
        int64_t at = at_[name], size = size_[name];
        at_[name] = kNone;
        if (at == kMapped) {
            mapped_ -= size;
            if (threshold_ < size && size <= kMostMapped) threshold_ = size;
            return;
        }
        give_back(at, size);
    }

    void settle() {  // the step's graph is gone
        std::vector<Piece> stuck;
        stuck.swap(stuck_);
        for (const Piece& piece : stuck) give_back(piece.at, piece.size);
    }

  private:
    int64_t stick(int64_t at, int64_t size) {
        large_ += size >= kStuckFrom;
        if (size < kStuckFrom || large_ % kStuckEvery) return 0;
        stuck_.push_back({kAskedMore, at});
        return kAskedMore;
    }
    void give_back(int64_t at, int64_t size) {
        if (const auto before = start_of_.find(at); before != start_of_.end()) {
            const int64_t start = before->second;
            take(start, at - start);
            size += at - start;
            at = start;
        }
        if (const auto behind = size_at_.find(at + size); behind != size_at_.end()) {
            const int64_t more = behind->second;
            take(at + size, more);
            size += more;
        }
        if (at + size < top_) return put(at, size);
        top_ = at;
        if (end_ - at >= 2 * threshold_) end_ = at + kPad;
    }
    void put(int64_t at, int64_t size) {
        size_at_[at] = size;
        start_of_[at + size] = at;
        free_.insert({size, at});
    }
    void take(int64_t at, int64_t size) {
        size_at_.erase(at);
        start_of_.erase(at + size);
        free_.erase({size, at});
    }

    int64_t peak_ = 0, end_ = 0, top_ = 0, mapped_ = 0, threshold_ = kFirst;
    std::set<Piece> free_;  // the smallest first
    Places size_at_, start_of_;
    std::vector<int64_t> at_, size_;
    std::vector<Piece> stuck_;
    int64_t large_ = 0;
};

}  // namespace

// The peak of `repeats` times the `n` events [storage, size], size below 0 where it is freed, storage below 0
// where the step's graph is gone; storages: their number.
extern "C" __attribute__((visibility("default"))) int64_t deltaw_heap_peak(const int64_t* events, int64_t n,
                                                                           int64_t storages, int64_t repeats) {
    Heap heap(storages);
    for (int64_t again = 0; again < repeats; ++again) {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t name = events[2 * i], size = events[2 * i + 1];
            if (name < 0) heap.settle();
            else if (size > 0) heap.allocate(name, size);
            else if (heap.has(name)) heap.release(name);
        }
        for (int64_t name = 0; name < storages; ++name)
            if (heap.has(name)) heap.release(name);
    }
    return heap.peak();
}
