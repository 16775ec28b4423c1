// Python module kvoffload._core; the contract is kvoffload/_core.pyi. The segment store's part is
// in bind_store.cpp, the key index's in bind_index.cpp.
#include "bind.h"

#include <pybind11/stl.h>

#include <mutex>

#include "checksum.h"
#include "copy.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace kvo {
namespace {

template <class T>
using Array =
    py::array_t<T, py::array::c_style>;  // no forcecast: a lossy conversion is a TypeError

// A read-only view of any contiguous bytes-like object for the length of a call.
class Bytes {
  public:
    explicit Bytes(const py::object& o) {
        if (PyObject_GetBuffer(o.ptr(), &view_, PyBUF_C_CONTIGUOUS) != 0)
            throw py::error_already_set();
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
    size_t size() const { return size_t(view_.len); }

  private:
    Py_buffer view_;
};

uint64_t seed_of_key(const py::bytes& key) {
    auto k = std::string_view(key);
    if (k.size() != 16)
        throw std::invalid_argument("a key is 16 bytes, not " + std::to_string(k.size()));
    return seed_of(reinterpret_cast<const uint8_t*>(k.data()));
}

std::vector<uint64_t> seeds_of(const py::bytes& keys) {
    auto k = std::string_view(keys);
    if (k.size() % 16) throw std::invalid_argument("keys: not a multiple of 16 bytes");
    std::vector<uint64_t> out(k.size() / 16);
    for (size_t i = 0; i < out.size(); ++i)
        out[i] = seed_of(reinterpret_cast<const uint8_t*>(k.data()) + 16 * i);
    return out;
}

template <class T>
std::vector<T> vector_of(const Array<T>& a, const char* name) {
    if (a.ndim() != 1) throw std::invalid_argument(std::string(name) + ": not one-dimensional");
    return std::vector<T>(a.data(), a.data() + a.size());
}

uint32_t checked(const Arena& a, uint32_t slot) {
    a.check_slot(slot);
    return slot;
}

// -- module functions
// -------------------------------------------------------------------------------

void bind_checksum(py::module_& m) {
    m.def(
        "checksum",
        [](const py::object& data, const py::bytes& key) {
            Bytes b(data);
            uint64_t seed = seed_of_key(key);
            py::gil_scoped_release nogil;
            return checksum(b.data(), b.size(), seed);
        },
        "data"_a, "key"_a);
    m.def(
        "leaf_checksums",
        [](const py::object& data, const py::bytes& key) {
            Bytes b(data);
            uint64_t seed = seed_of_key(key);
            py::array_t<uint64_t> out(py::ssize_t(leaf_count(b.size())));
            uint64_t* to = out.mutable_data();
            py::gil_scoped_release nogil;
            leaf_hashes(b.data(), b.size(), seed, to);
            return out;
        },
        "data"_a, "key"_a);
    m.def("cpu_features", &cpu_features);
    m.def("_set_isa", &set_isa, "name"_a);
    m.def("_isa", &isa);
}

// -- Arena
// ------------------------------------------------------------------------------------------

py::object arena_view(const PyArena& self, uint64_t offset, uint64_t nbytes) {
    auto a = self.get();
    if (offset > a->data_bytes() || nbytes > a->data_bytes() - offset)
        throw std::invalid_argument("arena: view outside the data area");
    uint8_t* at = a->data() + offset;
    // The view keeps the mapping, not just the Python object, alive.
    py::capsule owner(new std::shared_ptr<Arena>(a),
                      [](void* p) { delete static_cast<std::shared_ptr<Arena>*>(p); });
    py::array_t<uint8_t> array(py::ssize_t(nbytes), at, owner);
    return py::reinterpret_steal<py::object>(PyMemoryView_FromObject(array.ptr()));
}

py::array_t<uint64_t> arena_leaf_hashes(const PyArena& self, uint64_t offset, uint64_t nbytes) {
    auto a = self.get();
    a->check_range(offset, nbytes);
    py::array_t<uint64_t> out(py::ssize_t(leaf_count(nbytes)));
    for (py::ssize_t i = 0; i < out.size(); ++i)
        out.mutable_data()[i] = __atomic_load_n(a->leaf_ptr(offset) + i, __ATOMIC_RELAXED);
    return out;
}

void arena_set_leaf_hashes(const PyArena& self, uint64_t offset, const Array<uint64_t>& hashes) {
    auto a = self.get();
    if (hashes.ndim() != 1) throw std::invalid_argument("set_leaf_hashes: one dimension expected");
    if (uint64_t(hashes.size()) > a->data_bytes() / kLeafBytes)
        throw std::invalid_argument("set_leaf_hashes: more leaves than the arena has");
    a->check_range(offset, uint64_t(hashes.size()) * kLeafBytes);
    for (py::ssize_t i = 0; i < hashes.size(); ++i)
        __atomic_store_n(a->leaf_ptr(offset) + i, hashes.data()[i], __ATOMIC_RELAXED);
}

void arena_hash_leaves(const PyArena& self, uint64_t offset, uint64_t nbytes,
                       const py::bytes& key) {
    auto a = self.get();
    a->check_range(offset, nbytes);
    const uint64_t seed = seed_of_key(key);
    py::gil_scoped_release nogil;
    leaf_hashes(a->data() + offset, nbytes, seed, a->leaf_ptr(offset));
}

bool arena_verify_leaves(const PyArena& self, uint64_t offset, uint64_t nbytes,
                         const py::bytes& key) {
    auto a = self.get();
    a->check_range(offset, nbytes);
    const uint64_t seed = seed_of_key(key);
    py::gil_scoped_release nogil;
    for (uint64_t at = 0; at < nbytes; at += kLeafBytes) {
        const uint64_t n = std::min<uint64_t>(kLeafBytes, nbytes - at);
        if (leaf_hash(a->data() + offset + at, n, seed) != *a->leaf_ptr(offset + at)) return false;
    }
    return true;
}

py::array_t<uint8_t> arena_states(const PyArena& self, const Array<uint32_t>& slots,
                                  const Array<uint64_t>& generations) {
    auto a = self.get();
    if (slots.ndim() != 1 || generations.ndim() != 1 || slots.size() != generations.size())
        throw std::invalid_argument("states: slots and generations differ in length");
    py::array_t<uint8_t> out(slots.size());
    for (py::ssize_t i = 0; i < slots.size(); ++i)
        out.mutable_data()[i] = a->state_of(checked(*a, slots.data()[i]), generations.data()[i]);
    return out;
}

void bind_arena_slots(py::class_<PyArena>& c) {
    c.def(
         "begin_fill",
         [](const PyArena& s, uint32_t slot, uint64_t need_mask) {
             auto a = s.get();
             return a->begin_fill(checked(*a, slot), need_mask);
         },
         "slot"_a, "need_mask"_a)
        .def(
            "rank_done",
            [](const PyArena& s, uint32_t slot, uint64_t generation, uint32_t rank) {
                auto a = s.get();
                return a->rank_done(checked(*a, slot), generation, rank);
            },
            "slot"_a, "generation"_a, "rank"_a)
        .def(
            "fill_done",
            [](const PyArena& s, uint32_t slot, uint64_t generation) {
                auto a = s.get();
                return a->fill_done(checked(*a, slot), generation);
            },
            "slot"_a, "generation"_a)
        .def(
            "fail",
            [](const PyArena& s, uint32_t slot, uint64_t generation) {
                auto a = s.get();
                return a->fail(checked(*a, slot), generation);
            },
            "slot"_a, "generation"_a)
        .def(
            "set_free",
            [](const PyArena& s, uint32_t slot) {
                auto a = s.get();
                a->set_free(checked(*a, slot));
            },
            "slot"_a)
        .def(
            "state",
            [](const PyArena& s, uint32_t slot) {
                auto a = s.get();
                return int(a->state(checked(*a, slot)));
            },
            "slot"_a)
        .def(
            "generation",
            [](const PyArena& s, uint32_t slot) {
                auto a = s.get();
                return a->generation(checked(*a, slot));
            },
            "slot"_a)
        .def(
            "done_mask",
            [](const PyArena& s, uint32_t slot) {
                auto a = s.get();
                return a->done_mask(checked(*a, slot));
            },
            "slot"_a)
        .def("states", &arena_states, "slots"_a, "generations"_a)
        .def(
            "wait_ready",
            [](const PyArena& s, uint32_t slot, uint64_t generation, int64_t timeout_ms) {
                auto a = s.get();
                checked(*a, slot);
                const int64_t ms = std::min<int64_t>(timeout_ms, 86'400'000);
                py::gil_scoped_release nogil;
                return int(a->wait_ready(slot, generation, ms * 1'000'000));
            },
            "slot"_a, "generation"_a, "timeout_ms"_a);
}

void bind_arena(py::module_& m) {
    py::class_<PyArena> c(m, "Arena");
    c.def_static(
         "create",
         [](uint64_t data_bytes, uint32_t max_slots, uint32_t n_ranks, bool hugepages) {
             py::gil_scoped_release nogil;
             return PyArena{Arena::create(data_bytes, max_slots, n_ranks, hugepages)};
         },
         "data_bytes"_a, "max_slots"_a, "n_ranks"_a, "hugepages"_a = true)
        .def_static(
            "attach",
            [](const std::string& path, uint64_t inode) {
                py::gil_scoped_release nogil;
                return PyArena{Arena::attach(path, inode)};
            },
            "path"_a, "inode"_a)
        .def_property_readonly("path", [](const PyArena& s) { return s.get()->path(); })
        .def_property_readonly("inode", [](const PyArena& s) { return s.get()->inode(); })
        .def_property_readonly("data_bytes", [](const PyArena& s) { return s.get()->data_bytes(); })
        .def_property_readonly("max_slots", [](const PyArena& s) { return s.get()->max_slots(); })
        .def_property_readonly("n_ranks", [](const PyArena& s) { return s.get()->n_ranks(); })
        .def_property_readonly("hugepages", [](const PyArena& s) { return s.get()->hugepages(); })
        .def_property_readonly("data_ptr",
                               [](const PyArena& s) { return uintptr_t(s.get()->data()); })
        .def(
            "prefault_start",
            [](const PyArena& s, unsigned threads) { s.get()->prefault_start(threads); },
            "threads"_a = 1)
        .def("prefaulted_bytes", [](const PyArena& s) { return s.get()->prefaulted_bytes(); })
        .def("view", &arena_view, "offset"_a, "nbytes"_a)
        .def("leaf_hashes", &arena_leaf_hashes, "offset"_a, "nbytes"_a)
        .def("set_leaf_hashes", &arena_set_leaf_hashes, "offset"_a, "hashes"_a)
        .def("hash_leaves", &arena_hash_leaves, "offset"_a, "nbytes"_a, "key"_a)
        .def("verify_leaves", &arena_verify_leaves, "offset"_a, "nbytes"_a, "key"_a)
        .def(
            "set_attached", [](const PyArena& s, uint32_t rank) { s.get()->set_attached(rank); },
            "rank"_a)
        .def("attached_mask", [](const PyArena& s) { return s.get()->attached_mask(); })
        .def("epoch", [](const PyArena& s) { return s.get()->epoch(); })
        .def("bump_epoch", [](const PyArena& s) { return s.get()->bump_epoch(); })
        .def("check",
             [](const PyArena& s) {
                 auto a = s.get();
                 py::gil_scoped_release nogil;
                 a->check();
             })
        .def("close", [](PyArena& s) {
            std::shared_ptr<Arena> last = std::move(s.p);
            s.p.reset();
            if (!last) return;
            py::gil_scoped_release nogil;
            last->stop_prefault();
            last.reset();
        });
    bind_arena_slots(c);
}

// -- CpuCopyPool
// ------------------------------------------------------------------------------------

CopyItems items_of(const Array<uint32_t>& slots, const Array<uint64_t>& generations,
                   const Array<uint64_t>& offsets, const py::bytes& keys,
                   const Array<int32_t>& block_ids) {
    if (block_ids.ndim() != 2) throw std::invalid_argument("block_ids: not two-dimensional");
    CopyItems it;
    it.slots = vector_of(slots, "slots");
    it.generations = vector_of(generations, "generations");
    it.offsets = vector_of(offsets, "offsets");
    it.seeds = seeds_of(keys);
    it.block_ids.assign(block_ids.data(), block_ids.data() + block_ids.size());
    it.blocks = uint32_t(block_ids.shape(1));
    if (size_t(block_ids.shape(0)) != it.slots.size())
        throw std::invalid_argument("block_ids: one row per item");
    return it;
}

void bind_copy(py::module_& m) {
    py::object done_type =
        py::module_::import("collections")
            .attr("namedtuple")("CopyDone",
                                "job kind status failed_item reason nbytes wait_ns copy_ns",
                                "module"_a = "kvoffload._core");
    m.attr("CopyDone") = done_type;

    using Pool = CpuCopyPool;
    py::class_<Pool>(m, "CpuCopyPool")
        .def(py::init([](const PyArena& arena, uint32_t rank, unsigned threads, bool nt_stores,
                         int nice, std::vector<std::vector<int>> cores) {
                 return std::make_unique<Pool>(
                     arena.get(), rank, threads,
                     CopyOptions{nt_stores, nt_stores, nice, std::move(cores)});
             }),
             "arena"_a, "rank"_a, "threads"_a = 2, "nt_stores"_a = true, "nice"_a = 0,
             "cores"_a = std::vector<std::vector<int>>{})
        .def(
            "add_group",
            [](Pool& p, const std::vector<std::tuple<uint64_t, uint64_t, uint64_t>>& fragments,
               uint32_t num_blocks, uint64_t shard_bytes) {
                std::vector<Fragment> f;
                for (auto [base, stride, nbytes] : fragments) f.push_back({base, stride, nbytes});
                return p.add_group(std::move(f), num_blocks, shard_bytes);
            },
            "fragments"_a, "num_blocks"_a, "shard_bytes"_a)
        .def(
            "submit_store",
            [](Pool& p, int64_t job, int group, const Array<uint32_t>& slots,
               const Array<uint64_t>& generations, const Array<uint64_t>& offsets,
               const py::bytes& keys, const Array<int32_t>& block_ids) {
                p.submit_store(job, group, items_of(slots, generations, offsets, keys, block_ids));
            },
            "job"_a, "group"_a, "slots"_a, "generations"_a, "offsets"_a, "keys"_a, "block_ids"_a)
        .def(
            "submit_load",
            [](Pool& p, int64_t job, int group, const Array<uint32_t>& slots,
               const Array<uint64_t>& generations, const Array<uint64_t>& offsets,
               const py::bytes& keys, const Array<int32_t>& block_ids, int64_t deadline_ms,
               bool verify) {
                p.submit_load(job, group, items_of(slots, generations, offsets, keys, block_ids),
                              deadline_ms, verify);
            },
            "job"_a, "group"_a, "slots"_a, "generations"_a, "offsets"_a, "keys"_a, "block_ids"_a,
            "deadline_ms"_a, "verify"_a = true)
        .def("cancel", &Pool::cancel, "job"_a)
        .def("poll",
             [done_type](Pool& p) {
                 py::list out;
                 for (const CopyDone& d : p.poll())
                     out.append(done_type(d.job, d.kind, d.status, d.failed_item, d.reason,
                                          d.nbytes, d.wait_ns, d.copy_ns));
                 return out;
             })
        .def("wait", &Pool::wait, "job"_a, "timeout_ms"_a, py::call_guard<py::gil_scoped_release>())
        .def("pending", &Pool::pending)
        .def("inject", &Pool::inject, "fail_every"_a)
        .def("check", &Pool::check)
        .def("close", &Pool::close, py::call_guard<py::gil_scoped_release>());
}

void bind_errors() {
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const OsError& e) {
            // OSError(errno, text) picks FileNotFoundError and its like by itself.
            py::object value = py::reinterpret_borrow<py::object>(PyExc_OSError)(e.err(), e.what());
            PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
        } catch (const CheckError& e) {
            PyErr_SetString(PyExc_AssertionError, e.what());
        }
    });
}

}  // namespace
}  // namespace kvo

PYBIND11_MODULE(_core, m) {
    m.attr("LEAF_BYTES") = kvo::kLeafBytes;
    m.attr("FREE") = int(kvo::kFree);
    m.attr("FILLING") = int(kvo::kFilling);
    m.attr("READY") = int(kvo::kReady);
    m.attr("FAILED") = int(kvo::kFailed);
    kvo::bind_errors();
    kvo::bind_checksum(m);
    kvo::bind_arena(m);
    kvo::bind_copy(m);
    bind_index(m);
    bind_store(m);
}
