// The row kernel of one side (log-sum-exp, entropy, log-probabilities, their gradient, top-k, draws), and softmax.
// Each row is read once, into scratch rows in the core's cache, as in rows.cpp.
#include "../philox.h"
#include "columns.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kTopBlock = 32;  // columns per block of the top-k search

// ---- top-k ----------------------------------------------------------------------------------------------------------

// A heap of the k best (value, id) pairs, the worst on top. Offer ids in rising order: of equal values, the first ones stay.
template <class Real> struct Heap {
    Real* value;
    int32_t* id;
    int64_t capacity, size = 0;

    KD_INLINE bool worse(int64_t i, int64_t j) const { return value[i] < value[j] || (value[i] == value[j] && id[i] > id[j]); }
    KD_INLINE void swap(int64_t i, int64_t j) {
        const Real v = value[i];
        const int32_t n = id[i];
        value[i] = value[j], id[i] = id[j];
        value[j] = v, id[j] = n;
    }
    void sift_down(int64_t i) {
        for (int64_t child; (child = 2 * i + 1) < size; i = child) {
            if (child + 1 < size && worse(child + 1, child)) ++child;
            if (!worse(child, i)) return;
            swap(i, child);
        }
    }
    KD_INLINE void offer(Real v, int64_t n) {
        if (size < capacity) {
            value[size] = v, id[size] = int32_t(n);
            for (int64_t i = size++, parent; i > 0 && worse(i, parent = (i - 1) / 2); i = parent) swap(i, parent);
        } else if (v > value[0]) {
            value[0] = v, id[0] = int32_t(n);
            sift_down(0);
        }
    }
    void sort() {  // best first; destroys the heap
        while (size > 1) {
            swap(0, --size);
            sift_down(0);
        }
    }
};

// Writes the k largest values of a row to `heap`, sorted. `largest` is the maximum of each block. At least k columns reach the k-th largest
// of these maxima, so blocks whose maximum is below it are skipped. NaN counts as -inf.
template <class Real> void find_largest(const Real* __restrict z, int64_t vocab, Real* __restrict largest, Heap<Real>& heap) {
    const int64_t blocks = (vocab + kTopBlock - 1) / kTopBlock, k = heap.capacity;
    for (int64_t b = 0; b < blocks; ++b) {
        const Real* __restrict block = z + b * kTopBlock;
        const int64_t width = vocab - b * kTopBlock < kTopBlock ? vocab - b * kTopBlock : kTopBlock;
        Real top = -kInfinity<Real>;
#pragma omp simd reduction(max : top)
        for (int64_t v = 0; v < width; ++v) top = block[v] > top ? block[v] : top;
        largest[b] = top;
    }
    Real bound = -kInfinity<Real>;
    if (blocks > k) {
        for (int64_t b = 0; b < blocks; ++b) heap.offer(largest[b], b);
        bound = heap.value[0];
        heap.size = 0;
    }
    for (int64_t b = 0; b < blocks; ++b) {
        if (largest[b] < bound) continue;
        const int64_t end = (b + 1) * kTopBlock < vocab ? (b + 1) * kTopBlock : vocab;
        for (int64_t v = b * kTopBlock; v < end; ++v) {
            const Real x = z[v] == z[v] ? z[v] : -kInfinity<Real>;
            if (!(x < bound)) heap.offer(x, v);
        }
    }
    heap.sort();
}

// ---- draws ----------------------------------------------------------------------------------------------------------

// Gumbel-max draw as a race: column v arrives at time E_v / exp(z_v / T), E_v exponential, and is first with probability softmax(z / T)_v.
// Times are compared in double, as (z - reference) / T - log E (larger is earlier), from the stored logits. Backends whose float32 results
// differ in the last place therefore draw the same ids. The reference is the logit of one column.
template <class Real> double exact_logit(const HeadArguments& a, int64_t row, int64_t v) {
    double z = 0;
    with_dtype(a.side.dtype,
               [&](auto format) { z = double(widen(static_cast<const decltype(format)*>(a.side.logits)[row * a.side.stride + v])); });
    if (a.side.bias) z += double(static_cast<const Real*>(a.side.bias)[v]);
    z *= a.side.scale;
    return a.side.softcap != 0 ? a.side.softcap * std::tanh(z / a.side.softcap) : z;
}
KD_INLINE double log_exponential(uint32_t high, uint32_t low) { return std::log(-std::log1p(-uniform(high, low))); }

// Draws one id. e = exp((z - top) / T), 0 from vocab to the end of its group. Since E_v > u_v, only columns with
// u_v < e_v * exp(top - best) can beat the best so far. One product and one comparison per column test this on 24 bits of u_v; the exact
// time is computed only for the few columns that pass.
template <class Real> int32_t draw_one(const HeadArguments& a, int64_t row, int64_t draw, const Real* __restrict e, Real top,
                                       int64_t argmax) {
    const int64_t number = a.first_row + row, groups = (a.vocab + kGroup - 1) / kGroup;
    const auto low_word = [&](int64_t v) {
        return words(a.seed, number, draw, uint32_t(v / kGroup * kWordColumns + v % kWordColumns), 1).w[v % kGroup / kWordColumns];
    };
    // Allow for the rounding error of e, whose argument has the rounding error of the logits.
    const double margin = 0x1p24 * (1.0 + 1e-3 + 1e-6 * (std::fabs(double(top)) + a.side.softcap) * a.inv_temperature);
    const double reference = exact_logit<Real>(a, row, argmax);
    int64_t winner = argmax;
    const uint32_t slot = uint32_t(argmax / kGroup * kWordColumns + argmax % kWordColumns);
    double best = -log_exponential(words(a.seed, number, draw, slot, 0).w[argmax % kGroup / kWordColumns], low_word(argmax));
    Real bound = Real(std::exp(-best) * margin);
    uint32_t high[kGroup];
    for (int64_t g = 0; g < groups; ++g) {
        const Real* __restrict eg = e + g * kGroup;
        const uint32_t base = uint32_t(g * kWordColumns);
        int hits = 0;
#pragma omp simd reduction(| : hits)
        for (int64_t lane = 0; lane < kWordColumns; ++lane) {
            const Words r = words(a.seed, number, draw, base + uint32_t(lane), 0);
            for (int64_t w = 0; w < 4; ++w) {
                high[w * kWordColumns + lane] = r.w[w];
                hits |= Real(int32_t(r.w[w] >> 8)) < eg[w * kWordColumns + lane] * bound;
            }
        }
        if (!hits) continue;
        for (int64_t j = 0; j < kGroup; ++j) {
            if (!(Real(int32_t(high[j] >> 8)) < eg[j] * bound)) continue;
            const int64_t v = g * kGroup + j;
            const double time = (exact_logit<Real>(a, row, v) - reference) * a.inv_temperature - log_exponential(high[j], low_word(v));
            if (time > best || (time == best && v < winner)) {
                best = time, winner = v;
                bound = Real(std::exp(-best) * margin);
            }
        }
    }
    return int32_t(winner);
}

// ---- the row --------------------------------------------------------------------------------------------------------

struct Moments { double sum, weighted; };

// Writes e = exp(x), x = (z - top) / T, and returns sum(e) and sum(e * x). Their quotient is the mean of x.
template <class Real> Moments moments(const Real* __restrict z, Real inv_t, Real top, int64_t vocab, Real* __restrict e) {
    const Real reference = top == -kInfinity<Real> ? Real(0) : top;
    Moments total{0, 0};
    for (int64_t start = 0; start < vocab; start += kBlock) {
        const int64_t stop = start + kBlock < vocab ? start + kBlock : vocab;
        Real sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
        for (int64_t v = start; v < stop; ++v) {
            const Real x = (z[v] - reference) * inv_t, y = exp(x);
            e[v] = y;
            sum += y;
            weighted += y == Real(0) ? Real(0) : y * x;
        }
        total.sum += sum, total.weighted += weighted;
    }
    return total;
}

template <class Real> Real at(const void* array, int64_t i) { return array ? static_cast<const Real*>(array)[i] : Real(0); }

template <class Real> void one_row(const HeadArguments& a, int64_t row, void* memory) {
    const int64_t vocab = a.vocab, width = (vocab + kGroup - 1) / kGroup * kGroup;
    Real* const z = static_cast<Real*>(memory);  // see head_scratch
    Real* const e = z + width;
    Real* const spare = e + width;
    const Real inv_t = Real(a.inv_temperature);
    const Real top = load_row(a.side, row, vocab, z);

    // log q = (z - shift) / T - rest: see STATE in kdkernels/backends/rows.py.
    Real shift = top, rest = 0, entropy = 0, per_sum = 1;
    if (a.statistics) {
        Moments m{0, 0};
        if (a.entropy) m = moments(z, inv_t, top, vocab, e);
        else m.sum = exp_row(z, inv_t, top, vocab, a.dz || a.num_draws ? e : nullptr);
        const double log_sum = std::log(m.sum);
        rest = Real(log_sum), entropy = Real(log_sum - m.weighted / m.sum), per_sum = Real(1.0 / m.sum);
        static_cast<Real*>(a.top)[row] = top, static_cast<Real*>(a.log_sum)[row] = rest;
        if (a.entropy) static_cast<Real*>(a.entropy)[row] = entropy;
    } else {
        shift = at<Real>(a.top, row), rest = at<Real>(a.log_sum, row), entropy = at<Real>(a.entropy, row);
    }
    const int64_t* const ids = a.ids ? a.ids + row * a.num_ids : nullptr;
    for (int64_t k = 0; k < a.num_ids; ++k)
        static_cast<Real*>(a.logprobs)[row * a.num_ids + k] = ids[k] < 0 ? Real(0) : (z[ids[k]] - shift) * inv_t - rest;

    if (a.num_top) {
        Heap<Real> heap{spare, a.top_ids + row * a.num_top, a.num_top};
        find_largest(z, vocab, spare + a.num_top, heap);
        for (int64_t k = 0; k < a.num_top; ++k)
            static_cast<Real*>(a.top_logprobs)[row * a.num_top + k] = (heap.value[k] - shift) * inv_t - rest;
    }
    if (a.num_draws) {
        for (int64_t v = vocab; v < width; ++v) e[v] = 0;
        const bool possible = rest - rest == Real(0);  // finite
        const int64_t argmax = possible ? find(z, top, vocab) : -1;
        for (int64_t d = 0; d < a.num_draws; ++d)
            a.draws[row * a.num_draws + d] = possible ? draw_one<Real>(a, row, d, e, top, argmax) : -1;
    }
    if (!a.dz) return;

    // dz = (c0 + c1 log q) q, plus the upstream gradients at the ids.
    const Real d_entropy = at<Real>(a.d_entropy, row), c1 = -d_entropy;
    Real c0 = at<Real>(a.d_lse, row) - (a.d_entropy ? d_entropy * entropy : Real(0));
    const Real* const d_logprobs = a.d_logprobs ? static_cast<const Real*>(a.d_logprobs) + row * a.num_ids : nullptr;
    for (int64_t k = 0; d_logprobs && k < a.num_ids; ++k)
        if (ids[k] >= 0) c0 -= d_logprobs[k];
    if (!a.statistics) {
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) e[v] = exp((z[v] - shift) * inv_t - rest);
    }
    Real* __restrict g = e;
    if (a.d_entropy) {
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) {
            const Real q = g[v] * per_sum;
            g[v] = q == Real(0) ? Real(0) : q * (c0 + c1 * ((z[v] - shift) * inv_t - rest));
        }
    } else {
        const Real factor = c0 * per_sum;
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] *= factor;
    }
    for (int64_t k = 0; d_logprobs && k < a.num_ids; ++k)
        if (ids[k] >= 0) g[ids[k]] += d_logprobs[k];
    const Real outer = Real(a.side.scale * a.inv_temperature * a.dz_scale);
    const Real per_cap = a.side.softcap != 0 ? Real(1.0 / a.side.softcap) : Real(0);
    write_gradient(g, z, outer, per_cap, vocab, a.dz, a.dz_dtype, row * a.dz_stride);
}

// ---- softmax --------------------------------------------------------------------------------------------------------

template <class Real> void softmax_row(const SoftmaxArguments& a, int64_t row, void* memory) {
    const int64_t vocab = a.vocab, at = row * a.out_stride;
    Real* const x = static_cast<Real*>(memory);
    Real* const d = x + scratch_width(vocab);
    const Real inv_t = Real(a.inv_temperature);
    if (!a.backward) {
        const Real top = load_row(a.x, row, vocab, x);
        const double sum = exp_row(x, inv_t, top, vocab, a.logarithm ? nullptr : d);
        if (a.logarithm) {
            const Real log_sum = Real(std::log(sum));
            write_row<Real>(vocab, a.out, a.out_dtype, at, [&](int64_t v) KD_INLINE_LAMBDA { return (x[v] - top) * inv_t - log_sum; });
        } else {
            const Real per_sum = Real(1.0 / sum);
            write_row<Real>(vocab, a.out, a.out_dtype, at, [&](int64_t v) KD_INLINE_LAMBDA { return d[v] * per_sum; });
        }
        return;
    }
    read_row(a.x, row, vocab, x);
    read_row(a.dy, row, vocab, d);
    if (a.logarithm) {
        const Real total = Real(sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return d[v]; }));
        write_row<Real>(vocab, a.out, a.out_dtype, at, [&](int64_t v) KD_INLINE_LAMBDA { return (d[v] - exp(x[v]) * total) * inv_t; });
    } else {
        const Real mean = Real(sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return x[v] * d[v]; }));
        write_row<Real>(vocab, a.out, a.out_dtype, at, [&](int64_t v) KD_INLINE_LAMBDA { return x[v] * (d[v] - mean) * inv_t; });
    }
}

}  // namespace

void head_row(const HeadArguments& a, int64_t row, void* scratch) {
    a.double_precision ? one_row<double>(a, row, scratch) : one_row<float>(a, row, scratch);
}

void softmax_row(const SoftmaxArguments& a, int64_t row, void* scratch) {
    a.double_precision ? softmax_row<double>(a, row, scratch) : softmax_row<float>(a, row, scratch);
}

}  // namespace kd::KD_ISA
