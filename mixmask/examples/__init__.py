"""Training loops to copy: MoCo with MixMask in plain PyTorch and in four common frames.

Each module is one loop that reads from top to bottom, marks the lines of MixMask, and runs by
itself on the embedded photographs, on a CPU or a GPU::

    python -m mixmask.examples.plain
    python -m mixmask.examples.amp                # autocast and a gradient scaler
    python -m mixmask.examples.accelerate_loop    # or: accelerate launch -m …
    python -m mixmask.examples.lightning_module
    torchrun --nproc-per-node 2 -m mixmask.examples.ddp

`parts` holds what your own code has already: encoder, momentum update, queue and pairs of views.
"""
