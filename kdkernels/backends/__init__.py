"""Row kernels. Each backend module has two functions:

``unavailable(device_type, dtypes)``: why it cannot run such rows here, or None.
``rows(problem, batch, statistics)``: for each row of the batch, with ``statistics``, the state and the loss (and the token
statistics if there is room for them), else from the state as it is; then, if ``batch.dz`` is set, the logit gradient.
"""
