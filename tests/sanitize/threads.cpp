// cpu_rows and cpu_product on many threads, and from several callers at once, under ThreadSanitizer: no race, and the bits of one thread.
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/product.h"
#include "cpu/rows.h"

namespace {

struct Call {
    static constexpr int64_t kVocab = 4099;
    int64_t rows;
    std::vector<float> student, teacher, weight, state, loss, stats;
    std::vector<int64_t> labels;
    kd::RowArguments args;

    Call(int64_t count, int divergence, uint32_t seed)
        : rows(count), student(count * kVocab), teacher(student.size()), weight(count), state(kd::kStateRows * count), loss(count), stats(5 * count), labels(count) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0, 3);
        for (float& x : student) x = normal(random);
        for (float& x : teacher) x = normal(random);
        for (float& x : weight) x = normal(random);
        for (int64_t& x : labels) x = int64_t(random() % kVocab);
        args.student.logits = student.data(), args.teacher.logits = teacher.data();
        args.student.stride = args.teacher.stride = args.dz_stride = kVocab;
        args.rows = rows, args.vocab = kVocab, args.divergence = divergence, args.a = 0.3, args.b = 0.7;
        args.normalizer = divergence == 9 ? kd::Normalizer::mean : kd::Normalizer::softmax;
        args.ce_weight = 0.5, args.labels = labels.data(), args.weight = weight.data();
        args.state = state.data(), args.state_stride = args.stats_stride = rows;
        args.loss = loss.data(), args.stats = stats.data();
        args.dz = student.data();  // over the logits
    }
    bool same_bits(const Call& other) const {
        const auto equal = [](const std::vector<float>& a, const std::vector<float>& b) {
            return !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
        };
        return equal(student, other.student) && equal(state, other.state) && equal(loss, other.loss) && equal(stats, other.stats);
    }
};

bool check(int64_t rows, int divergence, int threads, uint32_t seed) {
    Call alone(rows, divergence, seed), shared(rows, divergence, seed);
    kd::cpu_rows(alone.args, 1);
    kd::cpu_rows(shared.args, threads);
    if (alone.same_bits(shared)) return true;
    std::fprintf(stderr, "divergence %d, %d threads: other bits than on one thread\n", divergence, threads);
    return false;
}

bool check_product(int64_t rows, int64_t columns, int threads) {
    constexpr int64_t kDepth = 2100;  // more than one panel
    std::mt19937 random(7);
    std::vector<uint16_t> a(rows * kDepth), b(columns * kDepth);
    for (std::vector<uint16_t>* operand : {&a, &b})
        for (uint16_t& x : *operand) x = uint16_t(0x3f00 + random() % 0x100);  // from 0.5 to 2
    std::vector<float> alone(rows * columns), shared(rows * columns);
    const auto into = [&](std::vector<float>& out) {
        return kd::ProductArguments{a.data(), b.data(), out.data(), rows, columns, kDepth, kDepth, kDepth, columns};
    };
    kd::cpu_product(into(alone), 1);
    kd::cpu_product(into(shared), threads);
    if (alone == shared) return true;
    std::fprintf(stderr, "product, %d threads: other bits than on one thread\n", threads);
    return false;
}

}  // namespace

int main() {
    bool good = true;
    for (int divergence = 0; divergence < 10; ++divergence)
        for (int threads : {2, 3, 5}) good &= check(67, divergence, threads, uint32_t(threads));
    // Two callers, as of two Python threads: neither holds the GIL. The list of instruction sets is first made by both.
    bool left = true, right = true;
    std::thread other([&] { kd::cpu_isas(); left = check(131, 3, 4, 5); });
    kd::cpu_isas(), right = check(131, 4, 4, 6);
    other.join();
    good &= left && right;
    int products = 0;
    if (kd::cpu_has_product())
        for (int threads : {2, 5}) good &= check_product(19, 700, threads), ++products;
    if (good) std::printf("tsan: %d calls on 2 to 5 threads\n", 32 + products);
    else std::puts("tsan: FAILED");
    return good ? 0 : 1;
}
