"""The kernels themselves, in Triton: what `golf_ray.kernels` calls where it is told to.

Nothing else imports these modules, because Triton may not be installed.
"""
