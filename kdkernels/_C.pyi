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
    inv_temperature: float
    value_scale: float
    slope_scale: float
    ce_weight: float
    dz_scale: float
    double_precision: bool
    stages: int
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

class HeadArguments:
    side: Side
    rows: int
    vocab: int
    inv_temperature: float
    double_precision: bool
    statistics: bool
    top: int
    log_sum: int
    entropy: int
    ids: int
    num_ids: int
    logprobs: int
    d_lse: int
    d_entropy: int
    d_logprobs: int
    dz_scale: float
    dz: int
    dz_stride: int
    dz_dtype: int
    num_top: int
    top_ids: int
    top_logprobs: int
    num_draws: int
    draws: int
    seed: int
    seed_at: int
    first_row: int

class SoftmaxArguments:
    x: Side
    dy: Side
    out: int
    out_stride: int
    out_dtype: int
    rows: int
    vocab: int
    inv_temperature: float
    logarithm: bool
    backward: bool
    double_precision: bool

def cpu_has_product() -> bool: ...
def cpu_product(
    a: int,
    b: int,
    out: int,
    rows: int,
    columns: int,
    depth: int,
    a_stride: int,
    b_stride: int,
    out_stride: int,
    threads: int,
) -> None: ...
def cpu_rows(arguments: RowArguments, threads: int, isa: str | None = None) -> None: ...
def cpu_head_rows(arguments: HeadArguments, threads: int, isa: str | None = None) -> None: ...
def cpu_softmax_rows(arguments: SoftmaxArguments, threads: int, isa: str | None = None) -> None: ...
def cuda_rows(arguments: RowArguments, stream: int) -> None: ...
def cuda_head_rows(arguments: HeadArguments, stream: int) -> None: ...
def cuda_softmax_rows(arguments: SoftmaxArguments, stream: int) -> None: ...

interface: int
cuda_most_top: int

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
def cuda_team(
    major: int,
    multiprocessors: int,
    shared_per_block: int,
    shared_per_multiprocessor: int,
    rows: int,
    vocab: int,
    itemsize: int,
    sweeps: int,
    inputs: int = 1,
    threads: int = 512,
    more_shared: int = 0,
    clusters: bool = True,
    draws: int = 1,
) -> dict[str, int]: ...
def cpu_isas() -> list[str]: ...
def divergences() -> list[tuple[int, str, float | None]]: ...
def divergence_terms(id: int, log_q: float, log_p: float, q: float, p: float, a: float, b: float) -> tuple[float, float]: ...
