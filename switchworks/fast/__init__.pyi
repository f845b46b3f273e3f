from .checkpointing import checkpoint_blocks as checkpoint_blocks
from .compile_step import compile_step as compile_step
from .compiler import require_compiler as require_compiler
from .decode import CompiledDecoder as CompiledDecoder
from .kernels import use_fast_kernels as use_fast_kernels
from .seams import swapped as swapped
from .skip_losses import skip_losses as skip_losses
from .small_batch import for_decoding as for_decoding
