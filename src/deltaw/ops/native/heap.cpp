// What glibc's heap holds for a sequence of allocations: plan/heap.py, which is the reference, step for step.
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kMostMapped = 32 << 20, kFirst = 128 << 10, kAskedMore = 96, kPage = 4096, kMapped = -1, kNone = -2;
constexpr int64_t kPad = 128 << 10, kStuckEvery = 8, kStuckFrom = 256 << 10;

// Types of this file, so that no template made of them is seen outside the library.
struct Piece {
    int64_t size, at;
    bool operator<(const Piece& other) const { return size != other.size ? size < other.size : at < other.at; }
};

// Places in the heap and a number of each: open addressing, at most half full.
class Places {
  public:
    Places() : cells_(1024, Cell{kNone, 0}) {}
    const int64_t* find(int64_t at) const {
        for (size_t i = home(at);; i = next(i)) {
            if (cells_[i].at == at) return &cells_[i].value;
            if (cells_[i].at == kNone) return nullptr;
        }
    }
    void put(int64_t at, int64_t value) {  // a place that is not there
        if (2 * ++n_ > cells_.size()) grow();
        size_t i = home(at);
        while (cells_[i].at != kNone) i = next(i);
        cells_[i] = {at, value};
    }
    void erase(int64_t at) {
        size_t i = home(at);
        while (cells_[i].at != at) {
            if (cells_[i].at == kNone) return;
            i = next(i);
        }
        --n_;
        for (size_t j = next(i); cells_[j].at != kNone; j = next(j)) {  // what was pushed on moves up
            if (((j - home(cells_[j].at)) & (cells_.size() - 1)) < ((j - i) & (cells_.size() - 1))) continue;
            cells_[i] = cells_[j];
            i = j;
        }
        cells_[i].at = kNone;
    }

  private:
    struct Cell {
        int64_t at, value;
    };
    size_t home(int64_t at) const { return (uint64_t(at) * 0x9E3779B97F4A7C15u >> 20) & (cells_.size() - 1); }
    size_t next(size_t i) const { return (i + 1) & (cells_.size() - 1); }
    void grow() {
        std::vector<Cell> old(2 * cells_.size(), Cell{kNone, 0});
        old.swap(cells_);
        for (const Cell& cell : old) {
            if (cell.at == kNone) continue;
            size_t i = home(cell.at);
            while (cells_[i].at != kNone) i = next(i);
            cells_[i] = cell;
        }
    }

    std::vector<Cell> cells_;
    size_t n_ = 0;
};

// Pieces in order, in runs of at most kRun, so that putting one in moves few.
class Pieces {
  public:
    const Piece* at_least(Piece piece) const {
        const auto run = run_of(piece);
        return run == runs_.end() ? nullptr : &*std::lower_bound(run->begin(), run->end(), piece);
    }
    void insert(Piece piece) {
        if (runs_.empty()) return runs_.push_back({piece});
        auto run = runs_.begin() + (run_of(piece) - runs_.begin());
        if (run == runs_.end()) --run;
        run->insert(std::lower_bound(run->begin(), run->end(), piece), piece);
        if (run->size() <= kRun) return;
        std::vector<Piece> upper(run->begin() + kRun / 2, run->end());
        run->resize(kRun / 2);
        runs_.insert(run + 1, std::move(upper));
    }
    void erase(Piece piece) {  // one that is there
        auto run = runs_.begin() + (run_of(piece) - runs_.begin());
        run->erase(std::lower_bound(run->begin(), run->end(), piece));
        if (run->empty()) runs_.erase(run);
    }

  private:
    static constexpr size_t kRun = 128;
    using Runs = std::vector<std::vector<Piece>>;
    Runs::const_iterator run_of(Piece piece) const {  // the first whose last is not before it
        return std::lower_bound(runs_.begin(), runs_.end(), piece,
                                [](const std::vector<Piece>& run, Piece one) { return run.back() < one; });
    }
    Runs runs_;
};

class Heap {
  public:
    explicit Heap(int64_t storages) : at_(storages, kNone), size_(storages) {}
    int64_t peak() const { return peak_; }
    bool has(int64_t name) const { return at_[name] != kNone; }

    void allocate(int64_t name, int64_t size) {
        size = std::max<int64_t>(32, (size + 23) & ~int64_t(15));
        const int64_t wanted = size + kAskedMore;
        const Piece* found = free_.at_least({wanted, 0});
        int64_t at = kMapped;
        if (found != nullptr) {
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
        if (const int64_t* before = start_of_.find(at)) {
            const int64_t start = *before;
            take(start, at - start);
            size += at - start;
            at = start;
        }
        if (const int64_t* behind = size_at_.find(at + size)) {
            const int64_t more = *behind;
            take(at + size, more);
            size += more;
        }
        if (at + size < top_) return put(at, size);
        top_ = at;
        if (end_ - at >= 2 * threshold_) end_ = at + kPad;
    }
    void put(int64_t at, int64_t size) {
        size_at_.put(at, size);
        start_of_.put(at + size, at);
        free_.insert({size, at});
    }
    void take(int64_t at, int64_t size) {
        size_at_.erase(at);
        start_of_.erase(at + size);
        free_.erase({size, at});
    }

    int64_t peak_ = 0, end_ = 0, top_ = 0, mapped_ = 0, threshold_ = kFirst;
    Pieces free_;
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
