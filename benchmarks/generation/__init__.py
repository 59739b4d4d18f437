"""The parts of `benchmarks.generate`: Lathe's inference side by side with its peers on a CPU.

`shapes` are the models and what a step reads of them, `rows` the contestants, `by_…` one library each,
`bandwidth` the machine's limit, `worker` the process that one contestant lives in and `pool` its parent's side,
`contest` what becomes of one shape: `checks` whether all compute the same, `rounds` the measuring, `startup` new
processes; `table` is what is printed, with the `aims`.

A worker may run in an environment that has neither torch nor Lathe, so `base`, `worker` and the peers' modules
import nothing of the kind at their top.
"""
