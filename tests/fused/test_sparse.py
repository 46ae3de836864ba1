"""Losses against TopK and Sampled teachers, compared with the definition in float64 and with torch in the same dtype."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from conftest import require
from oracle import FLOATS, assert_close_2x, dense_logits, make_labels, make_side, name_of, to_dtype
from torch import Tensor

import kdkernels as kd
from kdkernels.sides.head import HeadRows

MODES = [
    ("bucket", kd.ForwardKL()),
    ("bucket", kd.ReverseKL()),
    ("bucket", kd.JSD(0.3)),
    ("renorm", kd.ForwardKL()),
    ("renorm", kd.JSD(0.3)),
    ("zero", kd.ForwardKL()),
    ("sampled", kd.ForwardKL()),
]
VOCAB = 613


def make_teacher(
    tail: str, many: int, leading: tuple[int, ...], vocab: int = VOCAB, temperature: float = 1.0, device: str = "cpu"
) -> kd.TopK | kd.Sampled:
    """Return the top-k or samples of a random teacher. Top-k includes the first and last column, and a row with padding in between."""
    logits = make_side(leading, vocab, None, seed=7)
    assert isinstance(logits, Tensor)
    if tail == "sampled":
        samples = kd.sample(logits, many, temperature=temperature, generator=torch.Generator().manual_seed(3))
        return kd.Sampled(samples.ids.to(device), samples.counts.to(device))
    logits[..., 0] = 9.0
    logits[..., -1] = 8.5
    top = kd.topk_logprobs(logits, many, temperature=temperature)
    ids, logprobs = top.ids.clone(), top.logprobs.clone()
    if many > 2:
        ids.view(-1, many)[0, 1::2] = -1
        logprobs.view(-1, many)[0, 1::2] = math.nan  # padding may hold any value
    return kd.TopK(ids.to(device), logprobs.to(device), tail=tail, temperature=temperature)  # type: ignore[arg-type]


def dense_loss(
    student: kd.LMHead | Tensor,
    teacher: kd.TopK | kd.Sampled,
    *,
    divergence: kd.divergences.Divergence,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    **no_effect: Any,
) -> Tensor:
    """Compute the loss by its definition, over explicit outcomes: the listed tokens, or the vocabulary, and a bucket for the others."""
    z = dense_logits(student)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    valid = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if labels is None else labels != -100
    z = z[valid]
    ids = teacher.ids[valid].long()
    listed = ids >= 0
    log_q = torch.log_softmax(z / temperature, -1)
    full = torch.zeros_like(z)  # the teacher's probabilities over the vocabulary
    if isinstance(teacher, kd.Sampled):
        weights = teacher.counts[valid].to(z.dtype) * listed
        full.scatter_add_(-1, ids.clamp(min=0), weights / weights.sum(-1, keepdim=True))
        value = -(full * log_q).sum(-1)
    else:
        logprobs = teacher.logprobs[valid].to(z.dtype).masked_fill(~listed, -math.inf)
        p = logprobs.exp()
        if teacher.tail == "renorm":
            # softmax(z_t / T) over the ids only, computed from log softmax(z_t / T').
            p = torch.softmax(logprobs * teacher.temperature / temperature, -1)
        full.scatter_add_(-1, ids.clamp(min=0), p)
        if teacher.tail == "bucket":
            inside = full > 0
            rest_p = 1 - p.sum(-1)
            rest_q = torch.where(inside, 0.0, log_q.exp()).sum(-1)
            p_all = torch.cat([full, rest_p.unsqueeze(-1)], -1)
            log_q_all = torch.cat([torch.where(inside, log_q, -math.inf), rest_q.log().unsqueeze(-1)], -1)
        else:
            p_all, log_q_all = full, log_q
        q_all, log_p_all = log_q_all.exp(), p_all.log()

        def kl(weight: Tensor, log_weight: Tensor, log_other: Tensor) -> Tensor:
            zero = weight == 0
            gap = torch.where(zero, 0.0, log_weight) - torch.where(zero, 0.0, log_other)
            return torch.where(zero, 0.0, weight * gap).sum(-1)

        if isinstance(divergence, kd.ForwardKL):
            value = kl(p_all, log_p_all, log_q_all)
        elif isinstance(divergence, kd.ReverseKL):
            value = kl(q_all, log_q_all, log_p_all)
        else:
            assert isinstance(divergence, kd.JSD)
            b = divergence.beta
            m = b * p_all + (1 - b) * q_all
            log_m = torch.where(m == 0, 0.0, torch.where(m == 0, 1.0, m).log())
            value = b * kl(p_all, log_p_all, log_m) + (1 - b) * kl(q_all, log_q_all, log_m)
    total = kd_weight * temperature**2 * value
    if ce_weight:
        assert labels is not None
        total = total + ce_weight * torch.nn.functional.cross_entropy(z, labels[valid], reduction="none")
    if token_weights is not None:
        total = total * token_weights[valid].to(z.dtype)
    if reduction == "none":
        return torch.zeros(valid.shape, dtype=z.dtype, device=z.device).masked_scatter(valid, total)
    return total.sum() / valid.sum().clamp(min=1) if reduction == "mean" else total.sum()


def run(loss_fn: Any, student: Any, teacher: Any, options: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    student = to_dtype(student, dtype, requires_grad=True)
    loss = loss_fn(student, teacher, **options)
    loss.backward(torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape))
    tensors = {"logits": student} if isinstance(student, Tensor) else vars(student)
    return {"loss": loss.detach(), **{f"d_{n}": t.grad for n, t in tensors.items() if isinstance(t, Tensor)}}


def check(backend: str, student: Any, teacher: Any, options: dict[str, Any]) -> None:
    result = run(kd.distillation_loss, student, teacher, {**options, "backend": backend})
    eager, truth = run(dense_loss, student, teacher, options), run(dense_loss, student, teacher, options, torch.float64)
    for name, value in result.items():
        assert_close_2x(name, value, eager[name], truth[name])


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("tail", "divergence"), MODES, ids=name_of)
@pytest.mark.parametrize("dim", [None, 24], ids=["logits", "head"])
def test_each_mode_equals_the_dense_formula(
    any_backend: str, device: str, tail: str, divergence: Any, dim: int | None, dtype: torch.dtype
) -> None:
    require(any_backend, device, dtype)
    leading = (2, 4)
    side = make_side(
        leading, VOCAB, dim, dtype=dtype, bias=dim is not None, softcap=None if dim is None else 20.0, pad=None if dim is None else 3
    )
    options = {"divergence": divergence, "labels": make_labels(leading, VOCAB, device), "ce_weight": 0.3, "temperature": 1.0}
    check(any_backend, side, make_teacher(tail, 8, leading, device=device), options)


@pytest.mark.parametrize("many", [1, 64, 512])
@pytest.mark.parametrize(("tail", "divergence"), MODES, ids=name_of)
def test_any_number_of_ids_equals_the_dense_formula(engine_backend: str, device: str, tail: str, divergence: Any, many: int) -> None:
    """The loss includes cross-entropy at T = 1 and has an upstream gradient for each token."""
    leading = (7,)
    options = {
        "divergence": divergence, "labels": make_labels(leading, VOCAB, device), "ce_weight": 0.5, "temperature": 2.0, "reduction": "none",
        "token_weights": torch.linspace(0.1, 2.0, 7, device=device), "chunk_rows": 2,
    }  # fmt: skip
    teacher = make_teacher(tail, many, leading, temperature=2.0, device=device)
    for dim in (None, 16):
        check(engine_backend, make_side(leading, VOCAB, dim, device=device), teacher, options)


def test_ids_of_every_dtype_may_repeat(engine_backend: str, device: str) -> None:
    ids = torch.tensor([[0, 5, 5, 12, -1], [12, 12, 12, 0, 12]], device=device)
    counts = torch.tensor([[1, 2, 3, 1, 9], [1, 1, 1, 1, 1]], device=device)
    z = make_side((2,), 13, None, device=device)
    assert isinstance(z, Tensor)
    truth = -(torch.tensor([[1, 5, 1], [1, 0, 4]], device=device) * torch.log_softmax(z, -1)[:, [0, 5, 12]]).sum(-1)
    for dtype in (torch.int16, torch.int32, torch.int64):
        loss = kd.distillation_loss(z, kd.Sampled(ids.to(dtype), counts), reduction="none", backend=engine_backend)
        torch.testing.assert_close(loss, truth / torch.tensor([7.0, 5.0], device=device))


def test_renormalised_topk_can_change_its_temperature() -> None:
    z, zt = make_side((3,), VOCAB, None), make_side((3,), VOCAB, None, seed=1)
    assert isinstance(zt, Tensor)
    at_1 = kd.topk_logprobs(zt, 8, temperature=1.0)
    at_3 = kd.topk_logprobs(zt, 8, temperature=3.0)
    a, b = (kd.distillation_loss(z, kd.TopK(t.ids, t.logprobs, "renorm", t.temperature), temperature=3.0) for t in (at_1, at_3))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tail", ["bucket", "zero", "renorm"])
def test_topk_of_the_whole_vocabulary_equals_the_dense_loss(tail: str, engine_backend: str, device: str) -> None:
    z, zt = make_side((5,), 40, None, device=device), make_side((5,), 40, None, seed=1, device=device)
    top = kd.topk_logprobs(zt, 40)
    sparse = kd.distillation_loss(z, kd.TopK(top.ids, top.logprobs, tail), backend=engine_backend)  # type: ignore[arg-type]
    torch.testing.assert_close(sparse, kd.distillation_loss(z, zt, backend=engine_backend), rtol=1e-5, atol=1e-5)


def test_rows_without_ids_have_no_loss(any_backend: str, device: str) -> None:
    ids, values = torch.full((3, 2), -1, device=device), torch.full((3, 2), math.nan, device=device)
    for tail, divergence in MODES[:-1]:
        z = torch.randn(3, 20, device=device).requires_grad_()
        loss = kd.distillation_loss(z, kd.TopK(ids, values, tail), divergence=divergence, backend=any_backend)  # type: ignore[arg-type]
        loss.backward()
        assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
        assert z.grad is not None
        assert float(z.grad.abs().max()) < 1e-6


@pytest.mark.parametrize(("tail", "divergence"), MODES, ids=name_of)
def test_listed_tokens_with_probability_0(tail: str, divergence: Any, any_backend: str, device: str) -> None:
    """A token excluded by both sides has no effect. If only the student excludes it, forward KL is infinite."""
    z = torch.randn(3, 12, device=device)
    z[:, 3] = -math.inf
    ids = torch.tensor([[3, 5, -1], [2, 3, 0], [11, 0, 3]], device=device)
    shares = torch.tensor([[0.0, 3.0, 1.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]], device=device) / 5
    teacher = kd.Sampled(ids, shares) if tail == "sampled" else kd.TopK(ids, shares.log(), tail)  # type: ignore[arg-type]
    options = {"divergence": divergence, "reduction": "none"}
    result = run(kd.distillation_loss, z, teacher, {**options, "backend": any_backend})
    shorter = torch.where(ids == 3, -1, ids)
    same = kd.Sampled(shorter, shares) if tail == "sampled" else kd.TopK(shorter, shares.log(), tail)  # type: ignore[arg-type]
    expected = run(dense_loss, z[:, [*range(3), *range(4, 12)]], without_token_3(same), options)
    torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result["d_logits"][:, [*range(3), *range(4, 12)]], expected["d_logits"], rtol=1e-5, atol=1e-6)
    assert (result["d_logits"][:, 3] == 0).all()
    z[0, 5] = -math.inf  # the teacher's most likely token
    loss = kd.distillation_loss(z, teacher, **options, backend=any_backend)
    assert bool(loss[0] == math.inf) == isinstance(divergence, kd.ForwardKL)
    assert torch.isfinite(loss[1:]).all()


def without_token_3(teacher: kd.TopK | kd.Sampled) -> Any:
    """Renumber the ids for a vocabulary without token 3."""
    return dataclasses.replace(teacher, ids=torch.where(teacher.ids > 3, teacher.ids - 1, teacher.ids))


def test_gradients_of_a_confident_student_are_accurate(engine_backend: str, device: str) -> None:
    """At the ids the gradient is q - p, also if the tails differ by a factor of 2000."""
    z, zt = (torch.randn(4, 500, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    z[:, :4] += 20
    zt[:, :4] += 12
    top = kd.topk_logprobs(zt, 4)
    assert (top.ids < 4).all()
    z = z.to(device)
    actual = run(
        kd.distillation_loss, z, kd.TopK(top.ids.to(device), top.logprobs.to(device)), {"reduction": "sum", "backend": engine_backend}
    )
    q = torch.softmax(z.double(), -1).gather(-1, top.ids.long().to(device))
    truth = 0.5 * (q - top.logprobs.to(device).double().exp())
    assert_close_2x("d_logits at ids", actual["d_logits"].gather(-1, top.ids.long().to(device)), truth.float(), truth)


@pytest.mark.parametrize("tail", ["bucket", "sampled"])
def test_more_ids_than_a_block_holds_equal_the_dense_formula(tail: str, engine_backend: str, device: str) -> None:
    teacher = make_teacher(tail, 1500, (2,), vocab=2000, device=device)
    check(engine_backend, make_side((2,), 2000, 8, device=device), teacher, {"divergence": kd.ForwardKL()})


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_label_may_be_inside_or_outside_the_ids(temperature: float, any_backend: str, device: str) -> None:
    """Padding must not write to token 0. Each column's gradient is written once, including the label's part."""
    ids = torch.tensor([[0, 4, 7], [-1, 4, 7], [-1, -1, -1], [-1, -1, -1], [0, -1, -1], [7, -1, 0]], device=device)
    labels = torch.tensor([4, 0, 0, 5, 0, 0], device=device)
    logprobs = torch.full(ids.shape, -1.5, device=device)
    for dim in (None, 8):
        side = make_side((6,), 11, dim, device=device, softcap=None if dim is None else 8.0)
        for divergence in (kd.ForwardKL(), kd.ReverseKL(), kd.JSD()):
            options = {"divergence": divergence, "labels": labels, "ce_weight": 0.7, "temperature": temperature, "reduction": "sum"}
            check(any_backend, side, kd.TopK(ids, logprobs, temperature=temperature), options)


def test_strided_views_of_a_teacher_equal_copies(engine_backend: str, device: str) -> None:
    """Use the first 3 of 8 ids at every other position, which is a strided view."""
    z = make_side((2, 3), 40, None, device=device)
    top = kd.topk_logprobs(make_side((2, 6), 40, None, seed=1, device=device), 8)
    for dtype in (torch.int32, torch.int64):
        ids, logprobs = top.ids.to(dtype)[:, ::2, :3], top.logprobs[:, ::2, :3]
        views, copies = (
            kd.distillation_loss(z, kd.TopK(a, b), backend=engine_backend, chunk_rows=2, reduction="none")
            for a, b in ((ids, logprobs), (ids.contiguous(), logprobs.contiguous()))
        )
        assert torch.equal(views, copies)
    drawn = kd.sample(make_side((2, 3), 40, None, device=device), 4)  # its counts have stride 0
    kd.distillation_loss(z, drawn, backend=engine_backend, chunk_rows=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_16_bit_logit_gradients_are_as_accurate_as_eager(
    dtype: torch.dtype, temperature: float, engine_backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logit gradients are 16-bit, scaled by a power of two, as on a GPU."""
    monkeypatch.setattr(HeadRows, "dz_dtype", property(lambda head: head.dtype))
    labels = make_labels((6,), VOCAB, device)
    options = {"divergence": kd.ForwardKL(), "labels": labels, "ce_weight": 0.5, "temperature": temperature, "chunk_rows": 4}
    for tail in ("bucket", "sampled"):
        side = make_side((6,), VOCAB, 16, dtype=dtype, device=device, softcap=9.0)
        check(engine_backend, side, make_teacher(tail, 8, (6,), temperature=temperature, device=device), options)


def test_module_under_autocast_equals_bfloat16_operands(engine_backend: str, device: str) -> None:
    side = make_side((6,), VOCAB, 8, device=device)
    teacher = make_teacher("bucket", 8, (6,), temperature=2.0, device=device)
    loss = kd.DistillationLoss(temperature=2.0, divergence="jsd", backend=engine_backend)
    with torch.autocast(device, torch.bfloat16):
        mixed = run(loss, side, teacher, {})
    exact = run(loss, to_dtype(side, torch.bfloat16), teacher, {})
    torch.testing.assert_close(mixed["loss"], exact["loss"])
    for name in ("d_hidden", "d_weight"):
        assert mixed[name].dtype == torch.float32
        torch.testing.assert_close(mixed[name], exact[name].float(), rtol=0.02, atol=1e-4)
    with torch.inference_mode():
        assert kd.distillation_loss(side, teacher, temperature=2.0, backend=engine_backend).isfinite()


def test_second_backward_gives_equal_gradients(engine_backend: str, device: str) -> None:
    for dim in (None, 8):
        student = to_dtype(make_side((4,), 50, dim, device=device), None, requires_grad=True)
        leaf = student if isinstance(student, Tensor) else student.weight
        teacher = kd.topk_logprobs(torch.randn(4, 50, device=device), 4)
        loss = kd.distillation_loss(student, teacher, reduction="none", backend=engine_backend)
        first, second = (torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize(("tail", "divergence"), MODES, ids=name_of)
def test_sparse_losses_pass_gradcheck(tail: str, divergence: Any) -> None:
    teacher = make_teacher(tail, 5, (3,), 11)
    hidden, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (11, 4)))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return kd.distillation_loss(kd.LMHead(h, w), teacher, divergence=divergence, reduction="none", backend="torch")

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_statistics_equal_those_of_a_dense_teacher(any_backend: str, device: str) -> None:
    z, zt = make_side((6,), VOCAB, None, device=device), make_side((6,), VOCAB, None, seed=1, device=device)
    labels = make_labels((6,), VOCAB, device)
    top = kd.topk_logprobs(zt, VOCAB)
    options = {"labels": labels, "return_stats": True, "backend": any_backend}
    _, dense = kd.distillation_loss(z, zt, **options)
    _, sparse = kd.distillation_loss(z, kd.TopK(top.ids, top.logprobs, "zero"), **options)
    for name, expected in vars(dense).items():
        torch.testing.assert_close(getattr(sparse, name), expected, rtol=1e-4, atol=1e-5)
    _, topk_stats = kd.distillation_loss(z, kd.TopK(top.ids[:, :3], top.logprobs[:, :3], "bucket"), **options)
    mass = top.logprobs[:, :3].exp()
    rest = 1 - mass.sum(-1)
    entropy = -(torch.xlogy(mass, mass).sum(-1) + torch.xlogy(rest, rest))
    torch.testing.assert_close(topk_stats.teacher_entropy, torch.where(labels == -100, 0.0, entropy), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(topk_stats.student_entropy, dense.student_entropy, rtol=1e-4, atol=1e-5)


def test_sparse_losses_compile_into_one_graph(engine_backend: str) -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    top = kd.topk_logprobs(torch.randn(6, 40), 4)

    def step(h: Tensor, w: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        drawn = kd.distillation_loss(kd.LMHead(h, w), kd.Sampled(ids, logprobs.exp()), reduction="none", backend=engine_backend)
        return kd.distillation_loss(kd.LMHead(h, w), kd.TopK(ids, logprobs), backend=engine_backend) + drawn.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for function in (step, compiled):
        function(hidden, weight, top.ids, top.logprobs).backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    for _ in range(2):
        step(hidden, weight, top.ids, top.logprobs).backward()
    for gradient, leaf in zip(grads, (hidden, weight), strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


def test_plan_counts_only_the_students_logits() -> None:
    head = kd.LMHead(torch.randn(8, 4), torch.randn(1000, 4))
    plan = kd.plan(head, kd.topk_logprobs(torch.randn(8, 1000), 4), backend="torch")
    assert plan.buffer_bytes < 8 * 1100 * 4
    assert plan.dense_bytes == 8 * 1000 * 4


@pytest.mark.parametrize(
    ("tail", "divergence", "way_out"),
    [
        ("renorm", "reverse_kl", "forward_kl, jsd, or tail='bucket'"),
        ("zero", "reverse_kl", "tail='bucket'"),
        ("zero", "jsd", "tail='bucket'"),
        ("sampled", "reverse_kl", "Use forward_kl"),
        ("sampled", "jsd", "Use forward_kl"),
        ("bucket", "total_variation", "forward_kl, jsd, reverse_kl"),
    ],
)
def test_undefined_losses_raise(tail: str, divergence: str, way_out: str) -> None:
    with pytest.raises(ValueError, match=f"{divergence} is not defined.*{way_out}"):
        kd.distillation_loss(torch.randn(2, VOCAB), make_teacher(tail, 4, (2,)), divergence=divergence)


def test_invalid_sparse_teachers_raise() -> None:
    z, logprobs = torch.randn(2, 10), torch.log_softmax(torch.randn(2, 3), -1)

    def teacher(*ids: int) -> kd.TopK:
        return kd.TopK(torch.tensor([list(ids), [0, 1, 2]]), logprobs)

    with pytest.raises(ValueError, match=r"TopK.ids contain 10 .*vocabulary \[0, 10\)"):
        kd.distillation_loss(z, teacher(1, 10, 2))
    with pytest.raises(ValueError, match=r"TopK.ids contain -2 "):
        kd.distillation_loss(z, teacher(1, -2, 2))
    with pytest.raises(ValueError, match="token 7 twice"):
        kd.distillation_loss(z, teacher(7, 1, 7))
    with pytest.raises(ValueError, match=r"Sampled.counts contain -2 \(1 such .* they must be finite and not negative"):
        kd.distillation_loss(z, kd.Sampled(torch.tensor([[1, -1], [2, 3]]), torch.tensor([[1, -5], [-2, 3]])))
    for tail in ("bucket", "zero"):
        probabilities = kd.TopK(torch.tensor([[1, -1], [2, 3]]), torch.tensor([[-0.1, 9.0], [0.7, 0.1]]), tail)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"TopK.logprobs contain 0.7 \(2 such .* at most 0.*\.log\(\).*tail='renorm'"):
            kd.distillation_loss(z, probabilities)
        assert torch.isfinite(kd.distillation_loss(z, dataclasses.replace(probabilities, tail="renorm")))
    with pytest.raises(ValueError, match="leading shape"):
        kd.distillation_loss(torch.randn(3, 10), teacher(1, 2, 3))
    for tail in ("bucket", "zero"):
        topk = kd.TopK(torch.tensor([[0], [1]]), torch.zeros(2, 1), tail)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"temperature=2.0, but .* at 1.0.*tail='renorm'"):
            kd.distillation_loss(z, topk, temperature=2.0)
    # Rows without a valid label are not checked.
    kd.distillation_loss(z, teacher(7, 99, 7), labels=torch.tensor([-100, 3]))
