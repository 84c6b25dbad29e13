// The path of bf16 pairs, with products of many rows by tiles. Its own file, so that it gets its own flags.
#define DELTAW_BF16_DOT
#define DELTAW_TILES
#include "path_avx512.cpp"
