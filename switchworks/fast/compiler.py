"""The C++ compiler that torch.compile needs where a CPU is to run the result."""

from functools import cache

from switchworks.config import ConfigError


@cache
def require_compiler() -> None:
    """Raises ConfigError if there is none, before minutes are spent on the way to it."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            f"Compiling for a CPU takes a C++ compiler: {error}.\n"
            "  Install g++, name another in the environment's CXX, or leave compiling out."
        ) from error
