"""MixMask inside other libraries, one module for each; none is imported by `mixmask` itself."""
