// A row of one side: its threads, their columns, and the log-sum-exp. Shared by the kernels of one side.
//
// A team processes a row: one CTA, or a cluster of CTAs (sm_90 and newer). Each CTA has a slice of the row's 16-byte vectors. Vectors start
// at multiples of 16 bytes in memory, wherever the row starts: the first and the last can contain columns outside the row. A slice that is
// read twice is kept in shared memory if it fits. Each thread reads there only what it has written itself, so no barrier is needed.
#pragma once
#include "one_read.h"
#include "two_read.h"

namespace kd {

struct Team {
    int size = 1, rank = 0;  // number of CTAs, index of this one
    int64_t row;
    int parity = 0;
    bool waits = false;  // wait until the others have started

#ifdef KD_NO_CLUSTERS
    KD_DEVICE Team() : row(block_index()) {}
#else
    KD_DEVICE Team() : size(cluster_size()), rank(cluster_rank()), row(cluster_index()), waits(size > 1) {
        if (waits) cluster_arrive();
    }
#endif
    KD_DEVICE bool reports() const { return rank == 0 && thread_index() == 0; }

    // Reduces over the team; all threads return the same bits. Also a barrier: after it, memory that was read before may be overwritten.
    template <class T, class Merge> KD_DEVICE T reduce(const T& x, Merge&& merge) {
#ifndef KD_NO_CLUSTERS
        if (size > 1) {
            if (waits) cluster_wait();
            waits = false;
            return cluster_reduce(x, shared_memory(), parity, merge);
        }
#endif
        return block_reduce(x, parity, merge);
    }
};

// ---- columns --------------------------------------------------------------------------------------------------------

// Vectors of this thread, kept in shared memory for the next sweep (see choose_team).
struct Kept {
    int at;  // 0: read again from memory
    KD_DEVICE Raw* slot(int step, int j) const {
        return reinterpret_cast<Raw*>(shared_memory() + at) + ((step * kVectors + j) * block_threads() + thread_index());
    }
    KD_DEVICE void put(int step, const Raw* raw) const {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) store_vector(slot(step, j), raw[j]);
    }
    KD_DEVICE void get(int step, Raw* raw) const {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) raw[j] = load_vector<Raw>(slot(step, j));
    }
};

template <class Logit> struct Slice {
    static constexpr int kVec = kd::kVec<Logit>, kCount = kVec * kVectors;
    const Logit* row;
    int vocab, lead;  // lead: columns between the start of the first vector and column 0
    int begin, end;  // vectors of this CTA
    int steps;  // of its threads, each of which takes kVectors in a step

    KD_DEVICE Slice(const void* logits, int64_t offset, int vocab, const Team& team)
        : row(static_cast<const Logit*>(logits) + offset), vocab(vocab),
          lead(int(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(Logit))) {
        const int vectors = (vocab + lead + kVec - 1) / kVec, share = (vectors + team.size - 1) / team.size;
        begin = share * team.rank < vectors ? share * team.rank : vectors;
        end = begin + share < vectors ? begin + share : vectors;
        const int step = kVectors * block_threads();
        steps = (end - begin + step - 1) / step;
    }
    // Returns the first column of this thread's j-th vector in a step: negative if the row starts within it, `vocab` outside the slice.
    KD_DEVICE int column(int step, int j) const {
        const int v = begin + (step * kVectors + j) * block_threads() + thread_index();
        return v < end ? v * kVec - lead : vocab;
    }
    KD_DEVICE bool has(int column) const { return (column + lead) / kVec >= begin && (column + lead) / kVec < end; }
    KD_DEVICE bool inside(int column) const { return column >= 0 && column < vocab; }
    // Returns true if all columns of this thread's step are in the row.
    KD_DEVICE bool whole(int step) const { return column(step, 0) >= 0 && column(step, kVectors - 1) + kVec <= vocab; }
    // Loads this thread's columns of a step, from this row or another one of the same dtype; 0 outside the row.
    KD_DEVICE void load(const Logit* from, int step, Raw* raw) const {
        if (whole(step) && starts_vector(from + column(step, 0))) {
#pragma unroll
            for (int j = 0; j < kVectors; ++j) raw[j] = load_vector<Raw>(from + column(step, j));
        } else {
#pragma unroll
            for (int j = 0; j < kVectors; ++j) raw[j] = load_apart(from, column(step, j), 1, vocab);
        }
    }
    // Converts and writes kVec numbers, without those outside the row.
    template <class T> KD_DEVICE void store(T* to, int column, const float* x) const {
        constexpr int kBytes = int(sizeof(T)) * kVec < kVectorBytes ? int(sizeof(T)) * kVec : kVectorBytes;
        if (column >= 0 && column + kVec <= vocab && starts_vector(to + column, kBytes)) {
            Vec<T, kVec> out;
#pragma unroll
            for (int i = 0; i < kVec; ++i) out.at[i] = from_float<T>(x[i]);
            store_vector(to + column, out);
        } else {
#pragma unroll
            for (int i = 0; i < kVec; ++i)
                if (inside(column + i)) to[column + i] = from_float<T>(x[i]);
        }
    }
};

enum class Sweep { first, again };

// Calls body(z, step) for each step of this thread, with the kCount logits z of the step, -inf outside the row. All threads run all steps.
template <Sweep kSweep, class Logit, class Body>
KD_DEVICE void sweep(const Slice<Logit>& slice, const RowSide& side, Kept kept, Body&& body) {
    for (int step = 0; step < slice.steps; ++step) {
        Raw raw[kVectors];
        if (kSweep == Sweep::again && kept.at) kept.get(step, raw);
        else slice.load(slice.row, step, raw);
        if (kSweep == Sweep::first && kept.at) kept.put(step, raw);
        const bool whole = slice.whole(step);
        float z[Slice<Logit>::kCount];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            unpack<Logit>(z + j * kVec<Logit>, raw[j]);
            transform<kVec<Logit>>(z + j * kVec<Logit>, side, slice.column(step, j), 1, slice.vocab, whole);
        }
        body(z, step);
    }
}

// ---- log-sum-exp ----------------------------------------------------------------------------------------------------

// One side of LogSums, and for the entropy `weighted`, the sum of 2^d d with d = (z - max) c.
struct LogSum {
    float max = -infinity(), sum = 0.f, weighted = 0.f;

    template <int kCount> KD_DEVICE void add(const float* z, float c, bool entropy) {
        const float now = LogSums::largest<kCount>(max, z);
        if (entropy) {
            const float to = LogSums::reference(now);
            move(to, c);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float d = (z[i] - to) * c, e = exp2_fast(d);
                sum += e, weighted += e == 0.f ? 0.f : e * d;
            }
        } else {
            LogSums::add<kCount>(sum, max, now, z, c);
        }
        max = now;
    }
    KD_DEVICE void merge(LogSum o, float c) {
        const float now = fmaxf(max, o.max), to = LogSums::reference(now);
        move(to, c), o.move(to, c);
        sum += o.sum, weighted += o.weighted, max = now;
    }
    KD_DEVICE float entropy() const { return (log2_fast(sum) - weighted / sum) * kLn2; }

private:
    KD_DEVICE void move(float to, float c) {
        const float by = max == -infinity() ? 0.f : (max - to) * c, factor = exp2_fast(by);
        weighted = factor == 0.f ? 0.f : (weighted + sum * by) * factor;
        sum *= factor;
    }
};

// Maps a logit to log q = (z - top) / T - rest. top and rest are results of a call, and inputs of later calls.
struct LogProbability {
    float per_t, top, rest;
    KD_DEVICE float operator()(float z) const { return fmaf(z - top, per_t, -rest); }
};
KD_DEVICE LogProbability log_probability(const LogSum& s, float per_t) { return {per_t, s.max, log2_fast(s.sum) * kLn2}; }
KD_DEVICE float probability(float log_q) { return exp2_fast(log_q * kLog2E); }

}  // namespace kd
