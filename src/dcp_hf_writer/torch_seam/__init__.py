"""Everything that reaches into torch beyond its public interface, one module a mechanism.

A lookup that finds nothing raises `UnsupportedTorchError`: no check is left out in silence.
"""
