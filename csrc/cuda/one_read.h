// The one-read row kernel (sm_90 and newer). Reads the student's and the teacher's row once from memory, and writes loss, state and dz. dz
// may overwrite the student's logits.
//
//   HBM --bulk copy--> ring slot (private to a warp) --sweep 1--> (max, sum) of both sides
//                           |                                         | pushed to every CTA, one cluster barrier
//                           |<-------- log-sum-exps <-----------------+
//                           |--sweep 2 (only if the sum of slopes is unknown)--> sum of slopes --> one cluster barrier
//                           |--last sweep--> dz; the slot is freed --> the copy of the NEXT row's chunk starts
//
// A persistent cluster of CTAs processes rows cluster_index, cluster_index + cluster_count, ... Each warp has a span of columns, and a
// ring of chunk slots in shared memory that its lane 0 fills. The ring holds more chunks than a row has: the next row is loaded while this
// one is reduced. Rings are private to warps, so a __syncwarp is enough to reuse a slot; each reduction has one cluster barrier. Sums that
// the gradient does not need (loss, entropies) are reduced with the next row's first reduction.
//
// Runs the stages NORMALISERS and SUMS together, with or without GRADIENT.
#pragma once
#include "row.h"

namespace kd {

#ifndef KD_NO_CLUSTERS

// The part that each warp of a cluster sends to every CTA: the sums of sweep 1, and the tail of the previous row.
template <class Tail> struct FirstPart {
    LogSums sums;
    Tail tail;
};

// Reduces over a cluster; all threads return the same bits. Every warp sends its part to every CTA, and each thread reduces in the shared
// memory of its own CTA: one barrier per reduction, and no reads from a CTA that may have ended.
template <class T, class Merge> KD_DEVICE T cluster_reduce(T x, unsigned char* parts, int& parity, Merge&& merge) {
    struct alignas(16) Padded { T value; };
    static_assert(sizeof(Padded) <= kPartBytes);
    const int warp = thread_index() / kLanes, warps = block_threads() / kLanes, lane = thread_index() % kLanes;
    const int count = cluster_size() * warps;
#pragma unroll
    for (int mask = 16; mask; mask /= 2) merge(x, shuffle_xor(x, mask));
    auto* const of_all = reinterpret_cast<Padded*>(parts + parity * count * kPartBytes);
    if (lane < cluster_size()) store_remote(&of_all[cluster_rank() * warps + warp], lane, Padded{x});
    cluster_arrive();
    cluster_wait();
    x = T{};
    for (int i = lane; i < count; i += kLanes) merge(x, of_all[i].value);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) merge(x, shuffle_xor(x, mask));
    parity ^= 1;
    return x;
}

template <bool kFull, class Logit, class D> KD_KERNEL KD_BOUNDS(kOneReadThreads, 2) one_read_rows(const Rows a) {
    using RowTail = std::conditional_t<kFull, Tail, LeanTail>;
    using First = FirstPart<RowTail>;
    using Sums = RunningSums<std::conditional_t<!kFull && sizeof(Logit) == 2, PackedLargest<Logit>, Largest>>;
    constexpr int kVec = kd::kVec<Logit>;
    const int lane = thread_index() % kLanes, warp = thread_index() / kLanes, warps = block_threads() / kLanes;
    const Span span(a.vocab, cluster_rank() * warps + warp, cluster_size() * warps, sizeof(Logit));
    const int span_end = span.begin + span.length;

    unsigned char* const ring = shared_memory() + warp * a.slots * kSlotBytes;
    unsigned char* const parts = shared_memory() + warps * a.slots * kSlotBytes;
    auto* const landed = reinterpret_cast<Mbarrier*>(parts + 2 * cluster_size() * warps * kPartBytes) + warp * a.slots;

    // Lane 0 runs ahead of the sweeps: the next chunk to load, its row and its slot.
    int64_t load_row = cluster_index();
    int load_chunk = 0, load_slot = 0;
    auto load_next = [&] {
        if (load_row >= a.rows || span.chunks == 0) return;
        const int column = span.begin + load_chunk * span.chunk;
        const int bytes = (span.chunk_length(load_chunk) * int(sizeof(Logit)) + 15) / 16 * 16;
        unsigned char* const slot = ring + load_slot * kSlotBytes;
        mbarrier_expect(&landed[load_slot], 2 * bytes);
        bulk_load(slot, static_cast<const Logit*>(a.student.logits) + load_row * a.student.stride + column, bytes, &landed[load_slot]);
        bulk_load(slot + kChunkBytes, static_cast<const Logit*>(a.teacher.logits) + load_row * a.teacher.stride + column, bytes,
                  &landed[load_slot]);
        if (++load_slot == a.slots) load_slot = 0;
        if (++load_chunk == span.chunks) load_chunk = 0, load_row += cluster_count();
    };

    if (lane == 0) {
        for (int i = 0; i < a.slots; ++i) mbarrier_init(&landed[i], 1);
        fence_mbarrier_init();
        for (int i = 0; i < a.slots; ++i) load_next();
    }
    cluster_arrive();  // CTAs must have started before others write to them,
    cluster_wait();  // and all lanes see the mbarriers

    const float per_t = a.inv_temperature * kLog2E;
    const float c_s = kFull ? per_t : per_t * a.student.scale, c_t = kFull ? per_t : per_t * a.teacher.scale;
    const auto merge_first = [&](First& x, const First& o) { x.sums.merge(o.sums, c_s, c_t), x.tail.merge(o.tail); };

    // Each lane takes one vector of every kLanes in a chunk of both sides.
    constexpr int kStep = kLanes * kVec;
    const auto slot_at = [&](int slot) { return reinterpret_cast<Logit*>(ring + slot * kSlotBytes); };
    constexpr int kTeacher = kChunkBytes / sizeof(Logit);  // from the student's columns in a slot to the teacher's
    // Writes -inf beyond the span, on both sides: such columns add 0 to every sum, and no sweep needs a mask.
    const auto pad = [&](int slot, int length) {
        for (int first = 0; first < length; first += kStep) {
            const int at = first + lane * kVec;
#pragma unroll
            for (int i = 0; i < kVec; ++i)
                if (at + i >= length) slot_at(slot)[at + i] = slot_at(slot)[at + i + kTeacher] = from_float<Logit>(-infinity());
        }
        fence_bulk_loads();
    };
    // Calls body(student's vector, teacher's, z, y, first column) for this lane's vectors of a chunk.
    const auto for_lane = [&](int slot, int c, auto&& body) {
        const int length = span.chunk_length(c);
        const Logit* from = slot_at(slot) + lane * kVec;
        int column = span.begin + c * span.chunk + lane * kVec;
#pragma unroll 1
        for (int first = 0; first < length; first += kStep, from += kStep, column += kStep) {
            const Raw raw_s = load_vector<Raw>(from), raw_t = load_vector<Raw>(from + kTeacher);
            float z[kVec], y[kVec];
            unpack<Logit>(z, raw_s), unpack<Logit>(y, raw_t);
            if constexpr (kFull) {
                const bool whole = column + kVec <= span_end;
                transform<kVec>(z, a.student, column, 1, span_end, whole), transform<kVec>(y, a.teacher, column, 1, span_end, whole);
            }
            body(raw_s, raw_t, z, y, column);
        }
    };

    RowTail tail;  // of this thread's columns in the previous row
    int parity = 0, slot = 0, phase = 0;  // start of the current row in the ring
    const bool reports = cluster_rank() == 0 && thread_index() == 0;

    int64_t row = cluster_index();
    for (; row < a.rows; row += cluster_count()) {
        const bool has_labels = kFull && a.labels;
        const int label = has_labels ? int(a.labels[row]) : kNoLabels;
        const bool second_sum = has_labels && a.inv_temperature != 1.f;  // cross-entropy is at T = 1
        // Read it now: the row may be overwritten after the next reduction.
        float target = -infinity();
        if (kFull && reports && label >= 0) target = transformed(logit_at(a.student, row, label), a.student, label);

        // Sweep 1, as the chunks land: log-sum-exps.
        Sums running(c_s, c_t);
        for (int c = 0, at = slot, flip = phase; c < span.chunks; ++c) {
            mbarrier_wait(&landed[at], flip);
            if (const int length = span.chunk_length(c); length < span.chunk) pad(at, length);
            for_lane(at, c, [&](const Raw& raw_s, const Raw& raw_t, const float* z, const float* y, int) {
                running.template add<kVec>(raw_s, raw_t, z, y, second_sum);
            });
            if (++at == a.slots) at = 0, flip ^= 1;
        }
        First mine;
        mine.sums = running.total(), mine.tail = tail;
        const First all = cluster_reduce(mine, parts, parity, merge_first);
        if (reports && row != cluster_index()) report(a, row - cluster_count(), all.tail);
        const LogSums& sums = all.sums;
        if (reports) {
            LogSums saved = sums;
            if (!second_sum) saved.sum_ce = sums.sum_s;
            if constexpr (!kFull)  // the state holds logits, after their scale
                saved.max_s = rounded_product(sums.max_s, a.student.scale), saved.max_t = rounded_product(sums.max_t, a.teacher.scale);
            save_normalisers(a, row, saved, has_labels, target);
        }
        const Norm norm_s = norm_of(sums.max_s, sums.sum_s, c_s), norm_t = norm_of(sums.max_t, sums.sum_t, c_t);
        Norm at_one;
        if (has_labels) at_one = second_sum ? norm_of(sums.max_s, sums.sum_ce, kLog2E) : norm_s;
        tail = RowTail{};

        const auto hand_back = [&] {  // the current slot, for a copy of the next row's chunk
            sync_warp();  // all lanes are done with it
            if (lane == 0) load_next();
            if (++slot == a.slots) slot = 0, phase ^= 1;
        };

        // Sweep 2, only if the sum of the slopes is not a known constant. Without dz it is the last sweep.
        float slope_sum = float(D::slope_sum);
        if constexpr (!D::knows_slope_sum) {
            float slopes = 0.f;
            for (int c = 0, at = slot; c < span.chunks; ++c) {
                for_lane(at, c, [&](const Raw&, const Raw&, const float* z, const float* y, int) {
#pragma unroll
                    for (int i = 0; i < kVec; ++i) {
                        const float log2_q = norm_s(z[i]), log2_p = norm_t(y[i]);
                        slopes += column_slope<D>(a, log2_q, log2_p, exp2_fast(log2_q));
                    }
                });
                if (++at == a.slots) at = 0;
            }
            slope_sum = slope_sum_of(cluster_reduce(slopes, parts, parity, [](float& x, float o) { x += o; }), norm_t);
            if (reports) state_at(a, row, kSlopeSum) = slope_sum;
        }

        // Last sweep: dz. Slots are handed back one by one.
        const Gradient<kFull> gradient(a, slope_sum, at_one, weight_of(a, row), label);
        void* const dz = a.dz ? dz_row(a, row) : nullptr;
        for (int c = 0; c < span.chunks; ++c) {
            for_lane(slot, c, [&](const Raw&, const Raw&, const float* z, const float* y, int column) {
                float g[kVec], q[kVec];
#pragma unroll
                for (int i = 0; i < kVec; ++i) {
                    const float log2_q = norm_s(z[i]), log2_p = norm_t(y[i]);
                    q[i] = exp2_fast(log2_q);
                    const Terms<float> t = column_terms<D>(a, log2_q, log2_p, q[i]);
                    tail.value += t.value, g[i] = t.slope;
                }
                if constexpr (kFull) {
                    if (a.stats) tail.template add<kVec>(z, y, norm_s, norm_t, sums, column, 1);
                }
                if (!dz) return;
                gradient.template operator()<kVec>(g, q, z, column, 1);
                store_dz<Logit, kVec>(a, dz, column, 1, g, span_end);
            });
            hand_back();
        }
    }
    if (row != cluster_index()) {  // the tail of the last row is not reduced yet
        First mine;
        mine.tail = tail;
        const First all = cluster_reduce(mine, parts, parity, merge_first);
        if (reports) report(a, row - cluster_count(), all.tail);
    }
}

#else
template <bool kFull, class Logit, class D> KD_KERNEL one_read_rows(const Rows) {}
#endif

}  // namespace kd
