"""JIT compilation ahead of time: which kernels a problem reaches, compiling them, and watching for others.

Importing this package imports no compiler and nothing that one drives. See `kernel` for the words.
"""

from custom_ops.jit.kernel import MODES, Compiler, Kernel, Operand, Problem, Target
from custom_ops.monitor import JitError, JitEvent

__all__ = ["MODES", "Compiler", "JitError", "JitEvent", "Kernel", "Operand", "Problem", "Target"]
