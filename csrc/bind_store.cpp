// Python's SegmentStore (kvoffload/_core.pyi).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <unordered_map>

#include "bind.h"
#include "errors.h"
#include "store.h"
#include "store_io.h"

namespace py = pybind11;

namespace kvo::store {
namespace {

template <class T>
using Array =
    py::array_t<T, py::array::c_style>;  // no forcecast: a lossy conversion is a TypeError

void check_deadline(int64_t ms) {
    if (ms < 0 || ms > 86'400'000)
        throw std::invalid_argument("deadline_ms must be 0 (none) to 86400000");
}

// Buffers of one job. Released with the GIL when the job has been polled.
struct Held {
    std::vector<Py_buffer> views;
    Held() = default;
    Held(Held&&) = default;
    ~Held() {
        for (auto& v : views) PyBuffer_Release(&v);
    }
};

class PyStore {
  public:
    PyStore(const std::string& path, uint64_t max_bytes, uint64_t segment_bytes, unsigned threads,
            uint64_t queue_bytes, bool direct, bool read_only, const std::string& io_engine) {
        StoreOptions o{path,        max_bytes, segment_bytes, threads,
                       queue_bytes, direct,    read_only,     io_engine};
        py::gil_scoped_release nogil;
        s_ = std::make_unique<SegmentStore>(o);
    }
    ~PyStore() { close(5000); }

    SegmentStore& store() { return *s_; }

    void slots(bool put, int64_t job, const PyArena& arena, const py::bytes& keys,
               const Array<uint32_t>& slots, const Array<uint64_t>& gens,
               const Array<uint64_t>& offsets, uint64_t nbytes, uint64_t ns,
               const Array<uint32_t>* depths, int64_t deadline_ms) {
        auto a = arena.get();
        check_deadline(deadline_ms);
        auto k = kvo::keys_in(keys);
        auto n = py::ssize_t(k.size());
        if (slots.size() != n || gens.size() != n || offsets.size() != n ||
            (depths && depths->size() != n))
            throw std::invalid_argument("keys, slots, generations and offsets differ in length");
        if (nbytes == 0 || nbytes % kBlock || nbytes > UINT32_MAX)
            throw std::invalid_argument(
                "nbytes of a slot must be a positive multiple of 4096 below 4 GiB");
        std::vector<StoreItem> items;
        for (size_t i = 0; i < k.size(); ++i) {
            uint64_t off = offsets.data()[i];
            a->check_slot(slots.data()[i]);
            a->check_range(off, nbytes);
            items.push_back({k[i], a->data() + off, nbytes, a->leaf_ptr(off), slots.data()[i],
                             gens.data()[i], depths ? depths->data()[i] : 0});
        }
        if (put)
            s_->put(job, a, std::move(items), uint32_t(ns), deadline_ms);
        else
            s_->get(job, a, std::move(items), deadline_ms);
    }

    void plain(bool put, int64_t job, const py::bytes& keys, const py::sequence& buffers,
               uint64_t ns, int64_t deadline_ms) {
        check_deadline(deadline_ms);
        auto k = kvo::keys_in(keys);
        if (buffers.size() != k.size()) throw std::invalid_argument("one buffer per key");
        Held held;
        held.views.reserve(k.size());
        std::vector<StoreItem> items;
        for (size_t i = 0; i < k.size(); ++i) {
            py::object o = buffers[i];
            Py_buffer v;
            if (PyObject_GetBuffer(o.ptr(), &v, put ? PyBUF_SIMPLE : PyBUF_WRITABLE) != 0)
                throw py::error_already_set();
            held.views.push_back(v);
            if (put && (v.len == 0 || uint64_t(v.len) > UINT32_MAX))
                throw std::invalid_argument("a payload must have 1 byte to 4 GiB");
            items.push_back({k[i], static_cast<uint8_t*>(v.buf), uint64_t(v.len)});
        }
        if (put)
            s_->put(job, nullptr, std::move(items), uint32_t(ns), deadline_ms);
        else
            s_->get(job, nullptr, std::move(items), deadline_ms);
        held_.emplace(job, std::move(held));
    }

    py::list poll() {
        py::list out;
        for (auto& d : s_->poll()) {
            held_.erase(d.job);
            py::bytes results(reinterpret_cast<const char*>(d.results.data()), d.results.size());
            out.append(done_type()(d.job, d.kind, results, d.nbytes, d.ns));
        }
        return out;
    }

    void close(int timeout_ms) {
        if (!s_) return;
        py::gil_scoped_release nogil;
        s_->close(timeout_ms);
    }

    static py::object done_type() {
        PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> storage;
        return storage
            .call_once_and_store_result([] {
                py::object t = py::module_::import("collections")
                                   .attr("namedtuple")("StoreDone", "job kind results nbytes ns");
                t.attr("__module__") = "kvoffload._core";
                return t;
            })
            .get_stored();
    }

  private:
    std::unique_ptr<SegmentStore> s_;
    std::unordered_map<int64_t, Held> held_;
};

py::dict stats(PyStore& p) {
    py::dict out;
    for (auto& [k, v] : p.store().stats()) {
        if (k == "recover_ms")
            out[k.c_str()] = v;
        else
            out[k.c_str()] = uint64_t(v);
    }
    return out;
}

py::list ls(PyStore& p, size_t limit) {
    py::list out;
    for (auto& c : p.store().ls(limit))
        out.append(py::make_tuple(py::bytes(reinterpret_cast<const char*>(c.key.b), 16), c.ns,
                                  c.depth, c.nbytes, c.seg, c.seq));
    return out;
}

py::dict verify(PyStore& p, bool repair, const py::object& progress) {
    VerifyReport r;
    std::optional<py::error_already_set> failed;
    {
        py::gil_scoped_release nogil;
        r = p.store().verify(repair, [&](uint64_t done, uint64_t total, uint64_t bytes) {
            py::gil_scoped_acquire gil;
            try {
                if (PyErr_CheckSignals() != 0) throw py::error_already_set();
                if (!progress.is_none()) progress(done, total, bytes);
                return true;
            } catch (py::error_already_set& e) {
                failed.emplace(std::move(e));
                return false;
            }
        });
    }
    if (failed) throw std::move(*failed);
    py::dict d;
    d["checked"] = r.checked;
    d["bad"] = r.bad;
    d["bytes"] = r.bytes;
    d["seconds"] = r.seconds;
    d["dropped"] = r.dropped;
    return d;
}

py::bytes contains(PyStore& p, const py::bytes& keys) {
    auto k = kvo::keys_in(keys);
    std::string out(k.size(), '\0');
    p.store().contains(k, reinterpret_cast<uint8_t*>(out.data()));
    return py::bytes(out);
}

py::bytes retain(PyStore& p, const py::bytes& keys, double seconds, unsigned level,
                 uint64_t owner) {
    auto k = kvo::keys_in(keys);
    std::string out(k.size(), '\0');
    p.store().retain(k, seconds, level, owner, reinterpret_cast<uint8_t*>(out.data()));
    return py::bytes(out);
}

py::bytes retained(PyStore& p, const py::bytes& keys, uint64_t owner) {
    auto k = kvo::keys_in(keys);
    std::string out(k.size(), '\0');
    p.store().retained(k, owner, reinterpret_cast<uint8_t*>(out.data()));
    return py::bytes(out);
}

int64_t length(PyStore& p, const py::bytes& key) {
    auto k = kvo::keys_in(key);
    if (k.size() != 1) throw std::invalid_argument("one key of 16 bytes");
    return p.store().length(k[0]);
}

}  // namespace
}  // namespace kvo::store

void bind_store(py::module_& m) {
    using namespace kvo::store;
    using kvo::PyArena;
    m.attr("StoreDone") = PyStore::done_type();
    m.def(
        "io_uring_problem",
        []() -> std::optional<std::string> {
            std::string why;
            {
                py::gil_scoped_release nogil;
                why = uring_problem();
            }
            if (why.empty()) return std::nullopt;
            return why;
        },
        "None when io_engine=uring works in this process, else why not, in a few words.");
    auto nogil = py::call_guard<py::gil_scoped_release>();
    py::class_<PyStore>(m, "SegmentStore")
        .def(py::init<const std::string&, uint64_t, uint64_t, unsigned, uint64_t, bool, bool,
                      const std::string&>(),
             py::arg("path"), py::arg("max_bytes"), py::arg("segment_bytes") = 0,
             py::arg("threads") = 4, py::arg("queue_bytes") = 268435456, py::arg("direct") = true,
             py::arg("read_only") = false, py::arg("io_engine") = "auto")
        .def_property_readonly("path", [](PyStore& p) { return p.store().path(); })
        .def_property_readonly("writer_dir", [](PyStore& p) { return p.store().writer_dir(); })
        .def_property_readonly("io_engine", [](PyStore& p) { return p.store().io_engine(); })
        .def_property_readonly("io_engine_note",
                               [](PyStore& p) { return p.store().io_engine_note(); })
        .def(
            "put_slots",
            [](PyStore& p, int64_t job, const PyArena& a, const py::bytes& keys,
               const Array<uint32_t>& slots, const Array<uint64_t>& gens,
               const Array<uint64_t>& offsets, uint64_t nbytes, uint64_t ns,
               const Array<uint32_t>& depths, int64_t ms) {
                p.slots(true, job, a, keys, slots, gens, offsets, nbytes, ns, &depths, ms);
            },
            py::arg("job"), py::arg("arena"), py::arg("keys"), py::arg("slots"),
            py::arg("generations"), py::arg("offsets"), py::arg("nbytes"), py::arg("namespace"),
            py::arg("depths"), py::arg("deadline_ms") = 0)
        .def(
            "get_slots",
            [](PyStore& p, int64_t job, const PyArena& a, const py::bytes& keys,
               const Array<uint32_t>& slots, const Array<uint64_t>& gens,
               const Array<uint64_t>& offsets, uint64_t nbytes, int64_t ms) {
                p.slots(false, job, a, keys, slots, gens, offsets, nbytes, 0, nullptr, ms);
            },
            py::arg("job"), py::arg("arena"), py::arg("keys"), py::arg("slots"),
            py::arg("generations"), py::arg("offsets"), py::arg("nbytes"),
            py::arg("deadline_ms") = 0)
        .def(
            "put",
            [](PyStore& p, int64_t job, const py::bytes& keys, const py::sequence& buffers,
               uint64_t ns, int64_t ms) { p.plain(true, job, keys, buffers, ns, ms); },
            py::arg("job"), py::arg("keys"), py::arg("buffers"), py::arg("namespace") = 0,
            py::arg("deadline_ms") = 0)
        .def(
            "get",
            [](PyStore& p, int64_t job, const py::bytes& keys, const py::sequence& buffers,
               int64_t ms) { p.plain(false, job, keys, buffers, 0, ms); },
            py::arg("job"), py::arg("keys"), py::arg("buffers"), py::arg("deadline_ms") = 0)
        .def(
            "cancel", [](PyStore& p, int64_t job) { return p.store().cancel(job); }, py::arg("job"))
        .def(
            "abandon", [](PyStore& p, int64_t job) { return p.store().abandon(job); },
            py::arg("job"))
        .def("poll", &PyStore::poll)
        .def(
            "wait", [](PyStore& p, int64_t job, int ms) { return p.store().wait(job, ms); },
            py::arg("job"), py::arg("timeout_ms"), nogil)
        .def(
            "wait_any", [](PyStore& p, int ms) { return p.store().wait_any(ms); },
            py::arg("timeout_ms"), nogil)
        .def("contains", &contains, py::arg("keys"))
        .def(
            "longest_prefix",
            [](PyStore& p, const py::bytes& keys) {
                return p.store().longest_prefix(kvo::keys_in(keys));
            },
            py::arg("keys"))
        .def("length", &length, py::arg("key"))
        .def(
            "delete",
            [](PyStore& p, const py::bytes& keys) { return p.store().remove(kvo::keys_in(keys)); },
            py::arg("keys"))
        .def("retain", &retain, py::arg("keys"), py::arg("seconds"), py::arg("level") = 0,
             py::arg("owner") = 0)
        .def("retained", &retained, py::arg("keys"), py::arg("owner") = 0)
        .def("retain_none", [](PyStore& p) { p.store().retain_none(); })
        .def("queued_bytes", [](PyStore& p) { return p.store().queued_bytes(); })
        .def(
            "flush", [](PyStore& p, int ms) { return p.store().flush(ms); }, py::arg("timeout_ms"),
            nogil)
        .def("stats", &stats)
        .def("ls", &ls, py::arg("limit") = 0)
        .def("verify", &verify, py::arg("repair") = false, py::arg("progress") = py::none())
        .def(
            "inject",
            [](PyStore& p, const std::string& what, int every) { p.store().inject(what, every); },
            py::arg("what"), py::arg("every"))
        .def(
            "check", [](PyStore& p) { p.store().check(); }, nogil)
        .def(
            "_abandon", [](PyStore& p) { p.store().abandon(); }, nogil,
            "Test hook: stop as a kill would; nothing is flushed, journalled or sealed.")
        .def("close", &PyStore::close, py::arg("timeout_ms") = 5000);
}
