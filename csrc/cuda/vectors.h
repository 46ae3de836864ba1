// Reading logits: 16 bytes at a time, converted to float.
#pragma once
#include <type_traits>

#include "layout.h"
#include "row.h"

namespace kd {

KD_DEVICE bool starts_vector(const void* p, int bytes = kVectorBytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// The four words of one load. Unpacking them at once would stall on the load, and delay issuing the next.
struct alignas(kVectorBytes) Raw { uint32_t word[4]; };

template <class Logit> constexpr int kVec = kVectorBytes / int(sizeof(Logit));

template <class Logit> KD_DEVICE float logit_of(const Raw& raw, int i) {
    if constexpr (sizeof(Logit) == 4) return bits<float>(raw.word[i]);
    else if constexpr (std::is_same_v<Logit, bf16>) return bits<float>(i % 2 ? raw.word[i / 2] & 0xffff0000u : raw.word[i / 2] << 16);
    else return to_float(bits<Logit>(uint16_t(raw.word[i / 2] >> i % 2 * 16)));
}
template <class Logit> KD_DEVICE void unpack(float* z, const Raw& raw) {
#pragma unroll
    for (int i = 0; i < kVec<Logit>; ++i) z[i] = logit_of<Logit>(raw, i);
}
// Where a row begins or ends, or does not start at a multiple of 16 bytes: columns `apart`, 0 outside the row.
template <class Logit> KD_DEVICE Raw load_apart(const Logit* row, int column, int apart, int vocab) {
    using Word = std::conditional_t<sizeof(Logit) == 4, uint32_t, uint16_t>;
    Raw raw{};
#pragma unroll
    for (int i = 0; i < kVec<Logit>; ++i) {
        const int at = column + i * apart;
        const uint32_t word = at >= 0 && at < vocab ? bits<Word>(row[at]) : 0;
        if constexpr (sizeof(Logit) == 4) raw.word[i] = word;
        else raw.word[i / 2] |= word << i % 2 * 16;
    }
    return raw;
}
// kCount columns, `apart`, after bias, scale and softcap; -inf outside the row, unless all are inside (`whole`). As `transformed`, with
// a branch for all columns and not for each.
template <int kCount> KD_DEVICE void transform(float* z, const RowSide& side, int column, int apart, int vocab, bool whole) {
    if (side.bias) {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (const int at = column + i * apart; whole || (at >= 0 && at < vocab)) z[i] += side.bias[at];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = rounded_product(z[i], side.scale);
    if (side.softcap != 0.f) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) z[i] = rounded_product(side.softcap, tanh(z[i] / side.softcap));
    }
    if (whole) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (const int at = column + i * apart; at < 0 || at >= vocab) z[i] = -infinity();
}

}  // namespace kd
