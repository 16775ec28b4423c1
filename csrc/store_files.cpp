// The files of segments: opened when needed, so many at a time.
#include <fcntl.h>
#include <unistd.h>

#include "store_impl.h"

namespace kvo::store {
namespace {

constexpr size_t kMaxOpenFiles = 256;

}  // namespace

FilePtr StoreImpl::file_if_open(StoreSegment& seg) {
    std::unique_lock fl(files_mu, std::try_to_lock);  // held while another one is opened
    return fl ? seg.file : nullptr;
}

FilePtr StoreImpl::file_of(StoreSegment& seg, int& err) {
    std::lock_guard fl(files_mu);
    err = 0;
    if (seg.file) return seg.file;
    std::string name = segment_name(seg.id);
    if (seg.own) {
        seg.file = open_file(dir.writer_fd(), name.c_str(), O_RDWR, opt.direct, err);
    } else {
        Fd d = dir.open_writer(seg.writer);
        if (d)
            seg.file = open_file(d.get(), name.c_str(), O_RDONLY, opt.direct, err);
        else
            err = ENOENT;
    }
    if (!seg.file) return nullptr;
    remember_open(seg);
    return seg.file;
}

// However many segments there are, made or read, a process has other uses for its descriptors.
void StoreImpl::remember_open(StoreSegment& seg) {
    open_files.push_back(&seg);
    while (open_files.size() > kMaxOpenFiles) {
        open_files.front()->file.reset();  // closes when its last request is done
        open_files.front()->header_file.reset();
        open_files.pop_front();
    }
}

// Read through the page cache: the owner's O_DIRECT writes invalidate it, else it costs no I/O.
uint64_t StoreImpl::foreign_gen(StoreSegment& seg) {
    FilePtr f;
    {
        std::lock_guard fl(files_mu);
        f = seg.header_file;
        if (!f) {
            int err;
            Fd d = dir.open_writer(seg.writer);
            if (d) f = open_file(d.get(), segment_name(seg.id).c_str(), O_RDONLY, false, err);
        }
        // Without its other file it was removed meanwhile, or has made way: nothing would close it.
        if (seg.file) seg.header_file = f;
    }
    SegmentHeader h;
    if (!f || ::pread(f->fd(), &h, sizeof h, 0) != ssize_t(sizeof h)) return 0;
    return header_ok(h, dir.uuid(), seg.writer, seg.id) ? h.gen : 0;
}

}  // namespace kvo::store
