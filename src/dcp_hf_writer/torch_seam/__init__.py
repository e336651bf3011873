"""Everything that reaches into torch beyond its public interface, one module a mechanism.

A lookup that finds nothing raises an error; it never lets a check pass.
"""
