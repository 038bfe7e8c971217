"""What a parameter is made of, and where a slice of it lies.

In: shapes, tensor-parallel splits, kinds of fused weights, users' rows from YAML.
Out: `MatrixSpec`s with their logical matrices, and views of a slice or a share as those. No ranks, no communication.
"""
