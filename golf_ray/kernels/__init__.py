"""Fused operations of the forward: each an op with its gradient, and a twin in torch's own.

Each module is one operation: what it computes in plain torch (the *twin*, used on CPUs and for
float32), the same as a custom op for torch.compile and autograd, and when the op can be used. The
kernels behind the ops are in `golf_ray.kernels.triton`, which is imported where a kernel is first
launched. Which of the two the forward takes is `golf_ray.model.compute`'s to say.
"""
