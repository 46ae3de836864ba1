// Tests of the CUDA kernels of one side. test_rows.cpp has those of two sides.
#include <random>
#include <vector>

#include "buffers.h"
#include "cuda/draws.h"
#include "cuda/head.h"
#include "cuda/softmax.h"
#include "cuda/top.h"
#include "harness.h"

namespace {

#ifdef KD_SOME
constexpr bool kAll = false;
#else
constexpr bool kAll = true;
#endif

// kSparse: the sequence of calls of a loss against a sparse teacher (kdkernels/fused/sparse.py).
enum Kernel { kHead, kTop, kDraw, kSoftmax, kSoftmaxGradient, kSparse, kKernels };
const char* const kNames[] = {"head", "top", "draw", "softmax", "softmax gradient", "sparse"};

struct Shape { int rows, vocab, cluster, warps; };
struct Features {
    bool bias = false, softcap = false, scale = false, entropy = false, narrow = false, kept = true, unaligned = false, dz = true;
    bool gradient_apart = false;  // a launch of its own, which reads the state
    bool ties = false, odd_rows = false, logarithm = false, in_place = true, unsure = false;  // unsure: most draws are decided in double
    int num_ids = 0, k = 1;
    float temperature = 1.f, offset = 0.f;
};

struct Judge {
    double worst = 0;
    void operator()(double got, double want, double tolerance) {
        if (std::isnan(want) && std::isnan(got)) return;
        if (std::isinf(want) && got == want) return;
        const double e = std::abs(got - want) / tolerance;
        worst = std::max(worst, e == e ? e : INFINITY);
    }
};

// Logits, and their transform in double (z) and in float, as in the kernels (near).
template <class Logit> struct Rows_ {
    static constexpr Dtype kType = kDtype<Logit>;
    int rows, vocab;
    int64_t stride;
    Buffer data;
    std::vector<float> bias;
    RowSide side;
    std::vector<std::vector<double>> z;
    std::vector<std::vector<float>> near;
    Rows_(const Shape& s, const Features& f, std::mt19937& random, unsigned seed)
        : rows(s.rows), vocab(s.vocab), stride(stride_of(s.vocab, f.unaligned, seed)), data(rows * stride * sizeof(Logit)), bias(vocab), z(rows, std::vector<double>(vocab)),
          near(rows, std::vector<float>(vocab)) {
        std::normal_distribution<float> normal;
        const float spread = seed % 2 ? 4.f : 1.f;
        for (float& b : bias) b = f.ties ? 0.f : .5f * normal(random);
        side = {data.data, f.bias ? bias.data() : nullptr, stride, kType, f.scale ? (f.ties ? .5f : -.5f) : 1.f, f.softcap ? 6.f : 0.f};
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < vocab; ++c) {
                float x = f.offset + spread * normal(random);
                if (f.ties) x = r == 1 ? 1.5f : float(int(random() % 5) - 2) * (random() % 7 == 0 ? -0.f : 1.f);
                if (f.odd_rows && ((r == 0 && c != 1 && c % 2) || r == 1)) x = -INFINITY;
                if (f.odd_rows && r == 2 && c == vocab / 2) x = NAN;
                put(data.data, r * stride + c, kType, x);
                const double stored = get(data.data, r * stride + c, kType);
                double v = (stored + (side.bias ? side.bias[c] : 0.f)) * double(side.scale);
                z[r][c] = side.softcap != 0 ? side.softcap * std::tanh(v / side.softcap) : v;
                near[r][c] = transformed(float(stored), side, c);
            }
    }
    static int64_t stride_of(int vocab, bool unaligned, unsigned seed) {
        const int vec = 16 / int(sizeof(Logit));
        return unaligned ? vocab : (vocab + vec - 1) / vec * int64_t(vec) + (seed % 2) * vec;
    }
};

struct Softened {
    double top, log_sum, entropy;  // top: the largest logit; log_sum: from `reported`
    std::vector<double> log_q;
};
Softened soften(const std::vector<double>& z, double per_t, double reported) {
    Softened s{-INFINITY, 0, 0, std::vector<double>(z.size())};
    double sum = 0;
    for (double v : z) if (v > s.top) s.top = v;
    const double reference = std::isinf(s.top) ? 0 : s.top * per_t;
    for (double v : z) sum += std::exp(v * per_t - reference);
    for (size_t c = 0; c < z.size(); ++c) {
        s.log_q[c] = z[c] * per_t - (s.top * per_t) - std::log(sum);
        if (const double q = std::exp(s.log_q[c]); !(q == 0)) s.entropy -= q * s.log_q[c];
    }
    s.log_sum = std::log(sum) + (std::isinf(s.top) ? 0 : (s.top - reported) * per_t);
    return s;
}

int64_t kept_bytes(int vocab, int itemsize, int cluster, int threads) {
    const int vec = 16 / itemsize;
    const int64_t vectors = (vocab + 2 * vec - 2) / vec, share = (vectors + cluster - 1) / cluster, step = threads * kVectors;
    return (share + step - 1) / step * step * 16;
}

// Returns the largest ratio of an error to its tolerance; above 1 is wrong.
template <class Logit> double run(Kernel kernel, const Shape& s, const Features& f, unsigned seed, emu::Launch launch) {
    std::mt19937 random(seed * 31 + s.vocab + 7 * kernel);
    std::normal_distribution<float> normal;
    Rows_<Logit> rows(s, f, random, seed);
    constexpr Dtype kType = kDtype<Logit>;
    const int threads = 32 * s.warps, vocab = s.vocab;
    const float per_t = 1 / f.temperature;
    launch.threads = threads, launch.clusters = s.rows, launch.cluster_size = s.cluster;
    launch.shared_bytes = one_read_shared_bytes(s.warps, 0, s.cluster);
    Judge judge;
    double largest = f.softcap ? 6 : 0;  // largest number in the computation of the logits
    for (const auto& row : rows.near) for (float v : row) if (std::isfinite(v)) largest = std::max(largest, std::abs(double(v)));
    // Tolerance of a logarithm: errors of lg2 and the sum, of the transform, and of rounding the logarithm.
    const double off = 3e-6 + (f.bias || f.softcap || f.scale ? 0x1p-21 * largest * per_t : 0);
    const auto unit_of = [&](double log_q) { return off + 0x1p-21 * std::abs(std::isfinite(log_q) ? log_q : 0); };

    if (kernel == kSoftmax || kernel == kSoftmaxGradient) {
        const int64_t bytes = f.kept ? kept_bytes(vocab, sizeof(Logit), s.cluster, threads) : 0;
        Softmaxes a{};
        a.x = rows.side, a.x.bias = nullptr, a.x.scale = 1, a.x.softcap = 0;
        a.rows = s.rows, a.vocab = vocab, a.per_t = per_t, a.logarithm = f.logarithm;
        if (f.kept) a.kept_at = int(launch.shared_bytes), a.kept_bytes = int(bytes), launch.shared_bytes += bytes * (kernel == kSoftmax ? 1 : 2);
        Buffer dy(s.rows * rows.stride * sizeof(Logit) + 16), apart(s.rows * rows.stride * sizeof(Logit));
        const int shift = f.unaligned ? 1 : 0;  // 1: a different offset within 16 bytes than x
        std::vector<std::vector<double>> want(s.rows, std::vector<double>(vocab)), tolerance = want;
        for (int r = 0; r < s.rows; ++r) {
            std::vector<double> stored(vocab), up(vocab);
            for (int c = 0; c < vocab; ++c) stored[c] = get(rows.data.data, r * rows.stride + c, kType);
            const Softened soft = soften(stored, per_t, 0);
            double total = 0, size = 0;
            for (int c = 0; c < vocab && kernel == kSoftmaxGradient; ++c) {
                put(rows.data.data, r * rows.stride + c, kType, float(f.logarithm ? soft.log_q[c] : std::exp(soft.log_q[c])));
                put(dy.data, shift + r * rows.stride + c, kType, normal(random));
                stored[c] = get(rows.data.data, r * rows.stride + c, kType), up[c] = get(dy.data, shift + r * rows.stride + c, kType);
                total += f.logarithm ? up[c] : stored[c] * up[c], size += f.logarithm ? std::abs(up[c]) : std::abs(stored[c] * up[c]);
            }
            for (int c = 0; c < vocab; ++c) {
                const double l = soft.log_q[c], p = std::exp(f.logarithm ? stored[c] : l);
                double part = std::abs(l), relative = unit_of(l);
                if (kernel == kSoftmax) want[r][c] = f.logarithm ? l : std::exp(l), part = f.logarithm ? 1 : std::exp(l);
                else {
                    want[r][c] = (f.logarithm ? up[c] - p * total : stored[c] * (up[c] - total)) * per_t;
                    part = (f.logarithm ? std::abs(up[c]) + p * size : std::abs(stored[c]) * (std::abs(up[c]) + size)) * per_t;
                    relative = 3e-6 + (f.logarithm ? 0x1p-21 * std::abs(std::isfinite(l) ? l : 0) : 0);
                }
                tolerance[r][c] = unit(kType) * std::abs(want[r][c]) + relative * part + (kType == Dtype::f16 ? 1e-7 : 1e-37);
            }
        }
        a.dy = {dy.data + shift * sizeof(Logit), nullptr, rows.stride, kType, 1.f, 0.f};
        unsigned char* const out = f.in_place ? rows.data.data : kernel == kSoftmaxGradient && seed % 2 ? dy.data + shift * sizeof(Logit) : apart.data;
        a.out = out, a.out_stride = rows.stride;
        emu::launch(launch, [&] { kernel == kSoftmax ? softmax_rows<Logit>(a) : softmax_gradient_rows<Logit>(a); });
        for (int r = 0; r < s.rows; ++r)
            for (int c = 0; c < vocab; ++c) judge(get(out, r * rows.stride + c, kType), want[r][c], tolerance[r][c]);
        return judge.worst;
    }

    Heads a{};
    std::vector<float> top(s.rows, NAN), log_sum(s.rows, NAN), entropy(s.rows, NAN), d_lse(s.rows), d_entropy(s.rows);
    a.side = rows.side, a.rows = s.rows, a.vocab = vocab, a.statistics = true, a.per_t = per_t;
    a.top = top.data(), a.log_sum = log_sum.data();
    a.exact_per_t = 1.0 / f.temperature, a.exact_scale = a.side.scale, a.exact_softcap = a.side.softcap;
    if (kernel == kTop) launch.shared_bytes += top_shared_bytes(a.top_capacity = top_capacity(f.k));
    const auto keep = [&](bool kept) {
        a.kept_at = kept ? int(launch.shared_bytes) : 0;
        if (kept) launch.shared_bytes += kept_bytes(vocab, sizeof(Logit), s.cluster, threads);
    };
    std::vector<Softened> soft;
    const auto judge_statistics = [&] {
        for (int r = 0; r < s.rows; ++r) {
            soft.push_back(soften(rows.z[r], double(per_t), double(top[r])));
            judge(top[r], soft[r].top, 0x1p-22 * (std::abs(soft[r].top) + largest * (off > 3e-6)) + 1e-30);
            judge(log_sum[r], soft[r].log_sum, unit_of(soft[r].log_sum) + off);
        }
    };

    if (kernel == kTop) {
        const int k = std::min(f.k, vocab);
        std::vector<int32_t> ids(s.rows * k, -7);
        std::vector<float> logprobs(s.rows * k, NAN);
        a.num_top = k, a.top_ids = ids.data(), a.top_logprobs = logprobs.data();
        keep(f.kept);
        emu::launch(launch, [&] { top_rows<Logit>(a); });
        judge_statistics();
        for (int r = 0; r < s.rows; ++r) {
            std::vector<int> order(vocab);
            for (int c = 0; c < vocab; ++c) order[c] = c;
            const auto value = [&](int c) { const float v = rows.near[r][c]; return v == v ? v : -INFINITY; };
            std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return value(x) > value(y); });
            for (int i = 0; i < k; ++i) {
                judge(ids[r * k + i], order[i], .5);
                judge(logprobs[r * k + i], soft[r].log_q[order[i]], unit_of(soft[r].log_q[order[i]]));
            }
        }
        return judge.worst;
    }

    if (kernel == kDraw) {
        const uint64_t key = 0x123456789abcdefull * (seed + 1);
        std::vector<int32_t> ids(s.rows * f.k, -7);
        a.num_draws = f.k, a.draws = ids.data(), a.seed = key, a.first_row = seed % 3 ? 5 : (int64_t(1) << 33) + 1;
        a.draw_parts = std::min(f.k, 1 + int(seed / 2 % 3)), launch.clusters = s.rows * a.draw_parts;
        if (seed % 2) a.seed_at = &key, a.seed = 0;
        if (f.unsure) a.extreme = 1u << 28, a.time_error = 2.f;
        emu::launch(launch, [&] { draw_rows<Logit>(a); });
        judge_statistics();
        for (int r = 0; r < s.rows; ++r)
            for (int d = 0; d < f.k; ++d) {
                double best = -INFINITY;
                int winner = -1;
                for (int c = 0; c < vocab && std::isfinite(soft[r].log_sum); ++c) {
                    const uint32_t slot = uint32_t(c / kGroup * kWordColumns + c % kWordColumns), w = uint32_t(c % kGroup / kWordColumns);
                    const double u = uniform(words(key, a.first_row + r, d, slot, 0).w[w], words(key, a.first_row + r, d, slot, 1).w[w]);
                    const double time = (rows.z[r][c] - soft[r].top) / double(f.temperature) - std::log(-std::log1p(-u));
                    if (time > best) best = time, winner = c;
                }
                judge(ids[r * f.k + d], winner, .5);
            }
        return judge.worst;
    }

    const Dtype dz_dtype = kType == Dtype::f32 && f.narrow ? (seed % 2 ? Dtype::bf16 : Dtype::f16) : kType;
    const int n = f.num_ids;
    std::vector<int64_t> ids(s.rows * n);
    std::vector<float> logprobs(s.rows * n, NAN), d_logprobs(s.rows * n);
    for (float& d : d_logprobs) d = normal(random);
    for (int i = 0; i < s.rows * n; ++i) ids[i] = random() % 5 == 0 ? -1 : random() % 4 == 0 && i % n ? ids[i - 1] : int64_t(random() % vocab);
    const bool sparse = kernel == kSparse, with_lse = n == 0 || sparse || seed % 3 == 0;
    for (int r = 0; r < s.rows; ++r) d_lse[r] = normal(random), d_entropy[r] = normal(random);
    if (n) a.ids = ids.data(), a.num_ids = n, a.logprobs = logprobs.data(), a.d_logprobs = d_logprobs.data();
    if (f.entropy) a.entropy = entropy.data(), a.d_entropy = d_entropy.data();
    if (with_lse) a.d_lse = d_lse.data();
    if (sparse) {  // statistics and the largest logit first, then a gradient that is a multiple of q
        a.d_lse = a.d_entropy = a.d_logprobs = nullptr;
        std::fill(d_entropy.begin(), d_entropy.end(), 0.f), std::fill(d_logprobs.begin(), d_logprobs.end(), 0.f);
    }
    std::vector<int32_t> best(s.rows, -7);
    std::vector<float> best_logprob(s.rows, NAN);
    if (sparse && f.entropy) {
        a.num_top = 1, a.top_ids = best.data(), a.top_logprobs = best_logprob.data(), a.top_capacity = top_capacity(1);
        emu::Launch first = launch;
        first.cluster_size = 1, first.shared_bytes = one_read_shared_bytes(s.warps, 0, 1) + top_shared_bytes(a.top_capacity);
        emu::launch(first, [&] { top_rows<Logit>(a); });
        std::fill(top.begin(), top.end(), NAN), std::fill(log_sum.begin(), log_sum.end(), NAN);
    }
    Buffer apart(s.rows * rows.stride * sizeof(Logit));
    unsigned char* const dz = f.in_place ? rows.data.data : apart.data;
    a.dz_dtype = dz_dtype, a.dz_stride = rows.stride * int64_t(sizeof(Logit)) / size_of(dz_dtype), a.dz_scale = dz_dtype == Dtype::f16 ? 4.f : 1.f;
    if (!f.gradient_apart) {
        if (f.dz) a.dz = dz;
        keep(f.kept && f.dz);
        emu::launch(launch, [&] { head_rows<Logit>(a); });
    } else {
        emu::launch(launch, [&] { head_rows<Logit>(a); });
        emu::Launch second = launch;
        second.cluster_size = 1, second.shared_bytes = one_read_shared_bytes(s.warps, 0, 1);
        a.statistics = false, a.dz = dz;
        if (sparse) a.ids = nullptr, a.num_ids = 0, a.logprobs = nullptr, a.entropy = nullptr, a.d_lse = d_lse.data();
        else std::fill(logprobs.begin(), logprobs.end(), NAN);
        emu::launch(second, [&] { head_rows<Logit>(a); });
    }
    judge_statistics();
    for (int r = 0; r < s.rows; ++r) {
        const Softened& t = soft[r];
        if (a.num_top) {
            int want = 0;
            for (int c = 1; c < vocab; ++c) if (rows.near[r][c] > rows.near[r][want] || std::isnan(rows.near[r][want])) want = c;
            judge(best[r], want, .5), judge(best_logprob[r], t.log_q[want], unit_of(t.log_q[want]));
        }
        if (f.entropy) judge(entropy[r], t.entropy, 4 * unit_of(t.entropy) + off * t.entropy);
        double sum = 0, sums = 0;
        for (int i = 0; i < n; ++i) {
            const int64_t id = ids[r * n + i];
            judge(logprobs[r * n + i], id < 0 ? 0 : t.log_q[id], id < 0 ? 1e-30 : unit_of(t.log_q[id]));
            if (id >= 0) sum += d_logprobs[r * n + i], sums += std::abs(d_logprobs[r * n + i]);
        }
        if (!f.dz && !f.gradient_apart) continue;
        const double up = with_lse ? d_lse[r] : 0, down = f.entropy ? d_entropy[r] : 0;
        for (int c = 0; c < vocab; ++c) {
            const double l = t.log_q[c], q = std::exp(l);
            double g = q == 0 ? 0 : q * (up - sum - (f.entropy ? down * (t.entropy + l) : 0)), size = q * (std::abs(up) + sums + std::abs(down) * (t.entropy + std::abs(std::isfinite(l) ? l : 0)));
            for (int i = 0; i < n; ++i) if (ids[r * n + i] == c) g += d_logprobs[r * n + i], size += std::abs(d_logprobs[r * n + i]);
            const double straight = double(a.side.scale) * per_t * a.dz_scale, bend = a.side.softcap != 0 ? rows.z[r][c] / a.side.softcap : 0;
            const double want = g * straight * (1 - bend * bend);
            const double tolerance = unit(dz_dtype) * std::abs(want) + 3 * unit_of(l) * size * std::abs(straight) + (bend != 0 ? 4e-6 * std::abs(g * straight) : 0);
            judge(get(dz + r * rows.stride * sizeof(Logit), c, dz_dtype), want, tolerance + (dz_dtype == Dtype::f16 ? 1e-7 : 1e-30));
        }
    }
    return judge.worst;
}

double run(int dtype, Kernel kernel, const Shape& s, const Features& f, unsigned seed, emu::Launch launch = {}) {
    launch.seed = seed;
    if (dtype == 1) return run<float>(kernel, s, f, seed, launch);
    if constexpr (kAll) if (dtype == 2) return run<half>(kernel, s, f, seed, launch);
    return run<bf16>(kernel, s, f, seed, launch);
}

Features draw(unsigned seed, int salt, Kernel kernel, const Shape& s) {
    std::mt19937 random(seed * 977 + salt);
    const auto coin = [&](int of) { return random() % of == 0; };
    Features f;
    f.temperature = coin(2) ? 1.f : coin(2) ? 2.f : .7f, f.kept = s.cluster > 1 || coin(2), f.unaligned = coin(2), f.in_place = !coin(3);
    f.offset = coin(4) ? 3000.f : 0.f, f.logarithm = coin(2), f.odd_rows = coin(4), f.unsure = coin(2);
    if (coin(2)) f.bias = coin(2), f.softcap = coin(3);
    f.scale = coin(4);
    if (f.softcap) f.offset = 0, f.odd_rows = false;
    if (f.scale) f.odd_rows = false;
    f.entropy = coin(3), f.narrow = coin(2), f.dz = !coin(5), f.gradient_apart = coin(4);
    f.num_ids = f.entropy ? 0 : coin(3) ? 0 : coin(2) ? 1 : coin(2) ? 3 : 70;
    if (f.unaligned && f.in_place) f.narrow = false;
    if (kernel == kTop) f.ties = coin(2), f.k = coin(3) ? 1 : coin(2) ? 100 : s.vocab;
    if (kernel == kTop && f.ties) f.odd_rows = false, f.bias = false, f.softcap = false;
    if (kernel == kDraw) f.k = 1 + random() % 4;
    if (kernel == kSparse) f.gradient_apart = true, f.num_ids = coin(3) ? 1 : coin(2) ? 5 : 65;
    const bool forward = kernel != kSparse && kernel != kSoftmaxGradient && !f.gradient_apart;
    if (coin(4) && forward && !f.bias && !f.softcap && !f.scale) f.temperature = 1e-10f, f.dz = f.logarithm = false;  // only for logits without a transform
    return f;
}

// Vocabularies of one column, odd, below and above a thread's step; one CTA, and clusters of up to 8.
const Shape kShapes[] = {{2, 1, 1, 1}, {3, 7, 2, 1}, {3, 127, 1, 1}, {4, 1000, 2, 2}, {3, 1031, 4, 1}, {3, 4099, 1, 2}, {2, 5021, 8, 1}};

int test(int seeds) {
    Tests tests;
    for (int kernel = 0; kernel < kKernels; ++kernel)
        for (Shape s : kShapes)
            for (unsigned seed = 0; seed <= unsigned(seeds); ++seed) {
                if (kernel == kTop) s.cluster = 1;
                const int dtype = int(seed + kernel) % 3;
                const Features f = draw(seed, kernel + s.vocab, Kernel(kernel), s);
                tests([&] { return run(dtype, Kernel(kernel), s, f, seed); }, [&] {
                    return text("%s dtype %d rows %d vocab %d, %d CTAs of %d warps, seed %u:%s%s%s%s%s%s%s%s%s%s%s%s%s%s ids %d k %d T %g offset %g",
                                kNames[kernel], dtype, s.rows, s.vocab, s.cluster, s.warps, seed, f.bias ? " bias" : "", f.softcap ? " softcap" : "",
                                f.scale ? " scale" : "", f.entropy ? " entropy" : "", f.narrow ? " narrow" : "", f.kept ? " kept" : "",
                                f.unaligned ? " unaligned" : "", f.dz ? "" : " no-dz", f.gradient_apart ? " gradient-apart" : "", f.ties ? " ties" : "",
                                f.odd_rows ? " odd-rows" : "", f.logarithm ? " log" : "", f.in_place ? " in-place" : "", f.unsure ? " unsure" : "", f.num_ids,
                                f.k, double(f.temperature), double(f.offset));
                });
            }
    return tests.status();
}

// Runs each kernel in the forms that need its synchronisation: in a cluster, in one CTA, with dz that overwrites unread logits, with ties.
int mutate(int seeds) {
    struct Form { Kernel kernel; Shape shape; int dtype; };
    const Form forms[] = {{kHead, {3, 5021, 4, 2}, 1}, {kHead, {3, 5021, 1, 4}, 1}, {kTop, {3, 5021, 1, 4}, 1}, {kDraw, {3, 5021, 2, 2}, 0}, {kDraw, {3, 5021, 1, 4}, 1},
                          {kSoftmax, {3, 2053, 2, 2}, 0}, {kSoftmax, {3, 2053, 1, 4}, 1}, {kSoftmaxGradient, {3, 2053, 2, 2}, 0}, {kSoftmaxGradient, {3, 2053, 1, 4}, 1}};
    Mutations mutations{seeds};
    for (const Form& form : forms) {
        Features f;
        f.temperature = 2.f, f.num_ids = 70, f.narrow = true, f.kept = form.shape.cluster > 1, f.k = form.kernel == kTop ? 300 : 3;
        f.ties = form.kernel == kTop;
        mutations(text("%s, %d CTAs", kNames[form.kernel], form.shape.cluster),
                  [&](const emu::Launch& launch, unsigned seed) { return run(form.dtype, form.kernel, form.shape, f, seed, launch); });
    }
    return mutations.status();
}
}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, test, 23, mutate); }
