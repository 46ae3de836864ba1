# The compiled extension: see csrc/params.h for what the fields mean. Addresses are ints, 0 for none.

class Side:
    logits: int
    stride: int
    dtype: int
    bias: int
    scale: float
    softcap: float

class RowArguments:
    student: Side
    teacher: Side
    rows: int
    vocab: int
    divergence: int
    a: float
    b: float
    normalizer: int
    temperature: float
    value_scale: float
    slope_scale: float
    ce_weight: float
    dz_scale: float
    double_precision: bool
    statistics: bool
    labels: int
    weight: int
    state: int
    state_stride: int
    loss: int
    stats: int
    stats_stride: int
    dz: int
    dz_stride: int
    dz_dtype: int

def cpu_rows(arguments: RowArguments, threads: int, isa: str | None = None) -> None: ...
def cuda_rows(arguments: RowArguments, stream: int) -> None: ...
def cuda_targets() -> list[str]: ...
def cuda_launch(
    major: int,
    multiprocessors: int,
    shared_per_block: int,
    shared_per_multiprocessor: int,
    rows: int,
    vocab: int,
    itemsize: int,
    one_read_possible: bool,
) -> dict[str, int]: ...
def cpu_isas() -> list[str]: ...
def divergences() -> list[tuple[int, str, float | None]]: ...
def divergence_terms(id: int, log_q: float, log_p: float, q: float, p: float, a: float, b: float) -> tuple[float, float]: ...
