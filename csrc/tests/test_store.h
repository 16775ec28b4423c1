// Shared by the chunk store's native tests.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <string>

#define MUST(cond)                                                                  \
    do {                                                                            \
        if (!(cond)) {                                                              \
            std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #cond); \
            std::exit(1);                                                           \
        }                                                                           \
    } while (0)

void test_key_index();  // test_key_index.cpp
// test_store_engine.cpp: `kind` is "threads" or "uring", `dir` an existing directory.
void test_engine(const std::string& kind, const std::string& dir);
