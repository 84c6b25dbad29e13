// A pool for PyTorch's large buffers: what it holds is at most what was in use at once, and a part more (ops/pool.py).
//
// Places are given best-fit from one reserved region and joined when they are freed; holes cost addresses only. Pages
// of freed places stay for the next buffer as long as no more are held than were ever in use at once; beyond that the
// largest free places give theirs back to the system.
#include <stddef.h>
#include <stdint.h>

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#include <features.h>
#endif
#if defined(__GLIBC__) && defined(__LP64__)  // another C library keeps other addresses in a library's tables
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

namespace {

constexpr int64_t kPage = 4096, kLeast = 64 << 10, kStep = int64_t(64) << 20, kPart = 32;

// Types of this file, so that no template made of them is seen outside the library.
struct Piece {  // pages
    int64_t size, at;
    bool operator<(const Piece& other) const { return size != other.size ? size < other.size : at < other.at; }
};
struct Place {
    int64_t page;
    bool operator<(const Place& other) const { return page < other.page; }
};
struct Word {
    uint64_t bits;
};
struct Slot {
    void** at;
};

class Pool {
  public:
    bool reserve(int64_t bytes) {
        void* made = mmap(nullptr, size_t(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (made == MAP_FAILED) return false;
        base_ = static_cast<char*>(made);
        pages_ = bytes / kPage;
        resident_.assign(size_t(pages_ / 64 + 1), Word{0});
        put(0, pages_);
        return true;
    }
    bool has(const void* p) const { return size_t(static_cast<const char*>(p) - base_) < size_t(pages_ * kPage); }

    void* allocate(int64_t bytes) {
        const int64_t size = (bytes + kPage - 1) / kPage;
        pthread_mutex_lock(&lock);
        void* found = nullptr;
        const auto fits = by_size_.lower_bound({size, 0});
        if (fits != by_size_.end() && opened(fits->at + size)) {
            const Piece piece = *fits;
            take(piece);
            if (piece.size > size) put(piece.at + size, piece.size - size);
            used_[{piece.at}] = size;
            in_use += size;
            most = std::max(most, in_use);
            held += size - marked(piece.at, size, true);
            if (held > most + most / kPart) give_back(held - most);
            found = base_ + piece.at * kPage;
        }
        pthread_mutex_unlock(&lock);
        return found;
    }

    void release(const void* p) {
        pthread_mutex_lock(&lock);
        const auto found = used_.find({(static_cast<const char*>(p) - base_) / kPage});
        if (found == used_.end()) abort();  // freed twice, as the C library would say
        int64_t at = found->first.page, size = found->second;
        used_.erase(found);
        in_use -= size;
        auto behind = by_place_.lower_bound({at});
        if (behind != by_place_.end() && behind->first.page == at + size) {
            size += behind->second;
            take({behind->second, behind->first.page});
            behind = by_place_.lower_bound({at});
        }
        if (behind != by_place_.begin()) {
            const auto before = std::prev(behind);
            if (before->first.page + before->second == at) {
                at = before->first.page;
                size += before->second;
                take({before->second, at});
            }
        }
        put(at, size);
        pthread_mutex_unlock(&lock);
    }

    void settle() {
        pthread_mutex_lock(&lock);
        give_back(held - in_use);
        most = in_use;
        pthread_mutex_unlock(&lock);
    }

    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    int64_t in_use = 0, held = 0, most = 0;  // pages

  private:
    void put(int64_t at, int64_t size) {
        by_place_[{at}] = size;
        by_size_.insert({size, at});
    }
    void take(const Piece& piece) {
        by_place_.erase({piece.at});
        by_size_.erase(piece);
    }
    // Whether the region may be written to up to this page.
    bool opened(int64_t end) {
        if (end * kPage <= open_) return true;
        const int64_t wanted = std::min(pages_ * kPage, (end * kPage + kStep - 1) / kStep * kStep);
        if (mprotect(base_ + open_, size_t(wanted - open_), PROT_READ | PROT_WRITE)) return false;
        open_ = wanted;
        return true;
    }
    // How many of these pages are held; then they are, or are not.
    int64_t marked(int64_t at, int64_t size, bool from_now) {
        int64_t found = 0;
        for (int64_t page = at; page < at + size;) {
            const int64_t bit = page % 64, n = std::min(64 - bit, at + size - page);
            const uint64_t mask = (n == 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1) << bit;
            uint64_t& word = resident_[size_t(page / 64)].bits;
            found += __builtin_popcountll(word & mask);
            word = from_now ? word | mask : word & ~mask;
            page += n;
        }
        return found;
    }
    // Give `wanted` pages of free places to the system, from the ends of the largest.
    void give_back(int64_t wanted) {
        for (auto piece = by_size_.rbegin(); piece != by_size_.rend() && wanted > 0; ++piece) {
            int64_t end = std::min(piece->at + piece->size, open_ / kPage);
            for (int64_t step; end > piece->at && wanted > 0; end -= step) {
                step = std::min<int64_t>(end - piece->at, end % 512 ? end % 512 : 512);
                const int64_t freed = marked(end - step, step, false);
                if (freed) madvise(base_ + (end - step) * kPage, size_t(step * kPage), MADV_DONTNEED);
                held -= freed;
                wanted -= freed;
            }
        }
    }

    char* base_ = nullptr;
    int64_t pages_ = 0, open_ = 0;
    std::vector<Word> resident_;
    std::map<Place, int64_t> by_place_, used_;
    std::set<Piece> by_size_;
};

Pool* pool = nullptr;  // never destroyed: buffers may live until the process ends

int pooled_memalign(void** out, size_t align, size_t bytes) {
    if (bytes >= size_t(kLeast) && bytes < SIZE_MAX / 2 && align <= size_t(kPage))
        if (void* found = pool->allocate(int64_t(bytes))) return *out = found, 0;
    return posix_memalign(out, align, bytes);
}

void pooled_free(void* p) {
    if (pool->has(p)) pool->release(p);
    else free(p);
}

// Where a library's calls of a function lie: the slots that the dynamic linker fills in.
struct Slots {
    const char* library;
    std::vector<Slot> of_memalign, of_free;
};

int find_slots(dl_phdr_info* info, size_t, void* wanted) {
    Slots& slots = *static_cast<Slots*>(wanted);
    const char* name = strrchr(info->dlpi_name, '/');
    if (!name || strcmp(name + 1, slots.library)) return 0;
    const ElfW(Dyn)* entry = nullptr;
    for (int i = 0; i < info->dlpi_phnum; ++i)
        if (info->dlpi_phdr[i].p_type == PT_DYNAMIC)
            entry = reinterpret_cast<const ElfW(Dyn)*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    ElfW(Addr) symbols = 0, names = 0, tables[2] = {0, 0};
    size_t sizes[2] = {0, 0};
    for (; entry && entry->d_tag != DT_NULL; ++entry) {
        if (entry->d_tag == DT_SYMTAB) symbols = entry->d_un.d_ptr;
        if (entry->d_tag == DT_STRTAB) names = entry->d_un.d_ptr;
        if (entry->d_tag == DT_JMPREL) tables[0] = entry->d_un.d_ptr;
        if (entry->d_tag == DT_PLTRELSZ) sizes[0] = entry->d_un.d_val;
        if (entry->d_tag == DT_RELA) tables[1] = entry->d_un.d_ptr;
        if (entry->d_tag == DT_RELASZ) sizes[1] = entry->d_un.d_val;
    }
    for (int t = 0; t < 2; ++t)
        for (size_t i = 0; tables[t] && i < sizes[t] / sizeof(ElfW(Rela)); ++i) {
            const ElfW(Rela)& made = reinterpret_cast<const ElfW(Rela)*>(tables[t])[i];
            const auto& symbol = reinterpret_cast<const ElfW(Sym)*>(symbols)[ELF64_R_SYM(made.r_info)];
            const char* called = reinterpret_cast<const char*>(names + symbol.st_name);
            void** slot = reinterpret_cast<void**>(info->dlpi_addr + made.r_offset);
            if (!strcmp(called, "posix_memalign")) slots.of_memalign.push_back({slot});
            if (!strcmp(called, "free")) slots.of_free.push_back({slot});
        }
    return 1;
}

bool fill(const std::vector<Slot>& slots, void* with) {
    for (const Slot& slot : slots) {
        char* page = reinterpret_cast<char*>(uintptr_t(slot.at) / kPage * kPage);
        if (mprotect(page, size_t(kPage), PROT_READ | PROT_WRITE)) return false;  // it may be read-only since loading
        __atomic_store_n(slot.at, with, __ATOMIC_SEQ_CST);
    }
    return true;
}

}  // namespace

// From now on `library`'s large buffers lie in a region of `bytes` addresses: 1; 0 where that cannot be.
extern "C" __attribute__((visibility("default"))) int deltaw_pool_start(const char* library, int64_t bytes) {
    rlimit most{};
    if (pool) return 1;
    if (sysconf(_SC_PAGESIZE) != kPage || getrlimit(RLIMIT_AS, &most) || most.rlim_cur != RLIM_INFINITY) return 0;
    Slots slots{library, {}, {}};
    dl_iterate_phdr(find_slots, &slots);
    if (slots.of_memalign.empty() || slots.of_free.empty()) return 0;
    Pool* made = new Pool;
    if (!made->reserve(bytes)) return delete made, 0;
    pool = made;
    pthread_atfork([] { pthread_mutex_lock(&pool->lock); }, [] { pthread_mutex_unlock(&pool->lock); },
                   [] { pthread_mutex_unlock(&pool->lock); });
    return fill(slots.of_free, reinterpret_cast<void*>(pooled_free)) &&
           fill(slots.of_memalign, reinterpret_cast<void*>(pooled_memalign));
}

// Give the pages of all that is free to the system; what counts as in use at once begins anew.
extern "C" __attribute__((visibility("default"))) void deltaw_pool_settle() {
    if (pool) pool->settle();
}

// Bytes in use, held, and most that was in use at once.
extern "C" __attribute__((visibility("default"))) void deltaw_pool_bytes(int64_t* out) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    out[0] = pool->in_use * kPage, out[1] = pool->held * kPage, out[2] = pool->most * kPage;
    pthread_mutex_unlock(&pool->lock);
}

#else

extern "C" __attribute__((visibility("default"))) int deltaw_pool_start(const char*, int64_t) { return 0; }
extern "C" __attribute__((visibility("default"))) void deltaw_pool_settle() {}
extern "C" __attribute__((visibility("default"))) void deltaw_pool_bytes(int64_t*) {}

#endif
