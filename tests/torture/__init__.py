"""Kills, power cuts, flipped bits, races and fuzzed files: nothing may be lost, mixed up in silence, or answered by a traceback.

`make torture`, or python -m tests.torture --help. What is tested is the package that Python finds as `awrsr`.
"""
