"""Programmatic dependent launch of Gluon kernels, as :mod:`qtts_compile.kernels.pdl` describes it."""

from triton.experimental import gluon

from qtts_compile.kernels import pdl

announce, wait_for_inputs = gluon.jit(pdl.announce.fn), gluon.jit(pdl.wait_for_inputs.fn)
