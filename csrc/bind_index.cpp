// Python's KeyIndex (kvoffload/_core.pyi).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <mutex>

#include "bind.h"
#include "key_index.h"

namespace py = pybind11;

namespace kvo::store {
namespace {

using Values = py::array_t<uint64_t, py::array::c_style>;

// The index with a lock. An entry's value lies where the store keeps a chunk's checksum.
class PyIndex {
    template <class Fn>
    auto locked(Fn&& fn) {
        py::gil_scoped_release nogil;
        std::lock_guard lk(mu_);
        return fn();
    }

  public:
    PyIndex() = default;
    PyIndex(uint64_t seed0, uint64_t seed1) : index_(seed0, seed1) {}

    size_t insert(const py::bytes& keys, const Values& values) {
        auto k = keys_in(keys);
        if (values.ndim() != 1 || size_t(values.size()) != k.size())
            throw std::invalid_argument("values: one number per key");
        const uint64_t* v = values.data();
        return locked([&] {
            size_t fresh = 0;
            for (size_t i = 0; i < k.size(); ++i) {
                auto [e, is_new] = index_.try_emplace(k[i]);
                e->root = v[i];
                fresh += is_new;
            }
            return fresh;
        });
    }

    size_t erase(const py::bytes& keys) {
        auto k = keys_in(keys);
        return locked([&] {
            size_t gone = 0;
            for (const Key& key : k) gone += index_.erase(key);
            return gone;
        });
    }

    py::bytes contains(const py::bytes& keys) {
        auto k = keys_in(keys);
        std::string out(k.size(), '\0');
        locked([&] {
            index_.each_of(k, [&](size_t i, const StoreEntry* e) {
                out[i] = e != nullptr;
                return true;
            });
        });
        return py::bytes(out);
    }

    Values get(const py::bytes& keys, uint64_t missing) {
        auto k = keys_in(keys);
        Values out{py::ssize_t(k.size())};
        uint64_t* v = out.mutable_data();
        locked([&] {
            index_.each_of(k, [&](size_t i, const StoreEntry* e) {
                v[i] = e ? e->root : missing;
                return true;
            });
        });
        return out;
    }

    size_t longest_prefix(const py::bytes& keys) {
        auto k = keys_in(keys);
        return locked(
            [&] { return index_.longest_prefix(k, [](const StoreEntry&) { return true; }); });
    }

    void reserve(size_t n) {
        locked([&] { index_.reserve(n); });
    }
    void check() {
        locked([&] { index_.check(); });
    }
    size_t memory_bytes() {
        return locked([&] { return index_.memory_bytes(); });
    }
    size_t size() {
        return locked([&] { return index_.size(); });
    }

  private:
    std::mutex mu_;
    KeyIndex index_;
};

}  // namespace
}  // namespace kvo::store

void bind_index(py::module_& m) {
    using kvo::store::PyIndex;
    py::class_<PyIndex>(m, "KeyIndex")
        .def(py::init<>())
        .def(py::init<uint64_t, uint64_t>(), py::arg("seed0"), py::arg("seed1"))
        .def("insert", &PyIndex::insert, py::arg("keys"), py::arg("values"))
        .def("erase", &PyIndex::erase, py::arg("keys"))
        .def("contains", &PyIndex::contains, py::arg("keys"))
        .def("get", &PyIndex::get, py::arg("keys"), py::arg("missing"))
        .def("longest_prefix", &PyIndex::longest_prefix, py::arg("keys"))
        .def("reserve", &PyIndex::reserve, py::arg("n"))
        .def("memory_bytes", &PyIndex::memory_bytes)
        .def("check", &PyIndex::check)
        .def("__len__", &PyIndex::size);
}
