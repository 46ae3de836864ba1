"""Row kernels. Each backend module has these functions:

``unavailable(device, dtypes)``: why it cannot run such rows there, or None.
``rows(problem, batch, stages)``: the named stages of each row of the batch: see ``rows.Stage``. What a stage that is not named would
have written to the state is read from there.
``head_rows(problem, batch, stages)``: the same of one side alone: log-sum-exp (NORMALISERS); entropy, log-probabilities, the largest and
draws, whichever the ``HeadBatch`` has room for (SUMS); the logit gradient (GRADIENT).
``softmax_rows(x, out, temperature, logarithm)``, ``softmax_gradient_rows(y, dy, out, temperature, logarithm)``: ``[C, V]``, unit
stride along V; ``out`` may be any of the inputs.
"""
