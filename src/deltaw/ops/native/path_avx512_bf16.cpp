// The AVX-512 path with products of bf16 pairs. Its own file, so that it gets its own flags.
#define DELTAW_BF16_DOT
#include "path_avx512.cpp"
