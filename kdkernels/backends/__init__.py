"""Row kernels. Each backend module has these functions:

``unavailable(device, dtypes)``: why it cannot run such rows there, or None.
``rows(problem, batch, statistics)``: for each row of the batch, with ``statistics``, the state and the loss (and the token
statistics if there is room for them), else from the state as it is; then, if ``batch.dz`` is set, the logit gradient.
``head_rows(problem, batch, statistics)``: of one side alone, whatever of a ``HeadBatch`` there is room for: log-sum-exp and
entropy (or, without ``statistics``, from them as they are), log-probabilities, the largest, draws, the logit gradient.
``softmax_rows(x, out, temperature, logarithm)``, ``softmax_gradient_rows(y, dy, out, temperature, logarithm)``: ``[C, V]``, unit
stride along V; ``out`` may be any of the inputs.
"""
